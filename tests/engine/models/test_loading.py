"""Loading from every kind of source, and what is said of a model that cannot load."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from mezzotint.engine.models import checks, doctor, hardware, host, loading, sources
from mezzotint.errors import ModelLoadError
from mezzotint.messages import DOWNLOADING, LOADING
from mezzotint.spec import EngineSettings
from tests.attacks import attack
from tests.engine import fake_hub, tiny
from tests.engine.tiny import single_file

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

REPOSITORY = "studio/tiny-flux"


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("flux", tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("stable-diffusion", tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def folder(flux: Path, tmp_path: Path) -> Path:
    """A copy of the small Flux that a test may damage."""
    return Path(shutil.copytree(flux, tmp_path / "model"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flux: Path) -> Iterator[fake_hub.FakeHub]:
    with fake_hub.serve() as running:
        point_at(monkeypatch, running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        running.folders[REPOSITORY] = flux
        yield running


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(source: Any, **settings: Any) -> loading.Loaded:
    progress = settings.pop("progress", sources.ignore_progress)
    chosen = {"num_threads": 1, "dtype": "fp32", "performance": "reference", **settings}
    return loading.load(source, EngineSettings(**chosen), progress=progress)


def refusal(source: Any, **settings: Any) -> ModelLoadError:
    with pytest.raises(ModelLoadError) as caught:
        load(source, **settings)
    return caught.value


def picture(pipe: Any, name: str = "flux") -> np.ndarray[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    arguments = {"num_inference_steps": 2, "output_type": "np", **tiny.call(name)}
    images: np.ndarray[Any, Any] = pipe(prompt="a red fox", generator=generator, **arguments).images[0]
    return images


# ------------------------------------------------------------------ sources


@pytest.mark.parametrize("name", ["flux", "stable-diffusion-xl", "z-image", "sana", "kandinsky3"])
def test_a_diffusers_folder_loads(name: str, tmp_path: Path) -> None:
    loaded = load(tiny.save(name, tmp_path / "model"))
    assert type(loaded.pipe) is type(tiny.build(name))
    assert (loaded.dtype, loaded.device, loaded.num_threads) == ("fp32", "cpu", 1)
    assert loaded.num_parameters > 100_000
    assert np.allclose(picture(loaded.pipe, name), picture(tiny.build(name), name), atol=1e-3)


def test_a_built_in_name_is_a_folder_of_the_package(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(flux, tmp_path / "models" / "emoji")
    (tmp_path / "models" / "not-yet").mkdir()
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    assert sources.built_in_names() == ["emoji"]
    assert sources.locate("emoji") == tmp_path / "models" / "emoji"
    assert "no built-in name (emoji)" in refusal("not-yet").message


def test_a_ready_pipeline_keeps_its_dtype() -> None:
    pipe = tiny.build("flux", torch.bfloat16)
    loaded = load(pipe, dtype="auto")
    assert loaded.pipe is pipe
    assert loaded.dtype == "bf16"
    assert load(pipe, dtype="fp32").pipe.dtype == torch.float32


def test_a_ready_pipeline_may_be_of_a_class_of_ones_own_but_must_make_pictures_from_text() -> None:
    class Mine(diffusers.FluxPipeline):  # type: ignore[misc]
        pass

    class MineImg2Img(diffusers.FluxPipeline):  # type: ignore[misc]
        pass

    parts = tiny.build("flux").components
    assert load(Mine(**parts)).num_parameters > 0
    assert refusal(MineImg2Img(**parts)).code == "unsupported_class"


def test_a_repository_is_fetched_once_and_then_needs_no_network(
    hub: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, float | None]] = []
    first = picture(load(REPOSITORY, progress=lambda *step: said.append(step)).pipe)
    assert {name.partition("/")[0] for name in hub.downloads()} >= {"model_index.json", "transformer", "vae"}
    fractions = [fraction for stage, fraction in said if stage == DOWNLOADING and fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert said[-1][0] == LOADING

    point_at(monkeypatch, "http://127.0.0.1:9")  # the discard port: nobody listens
    assert np.array_equal(picture(load(REPOSITORY).pipe), first)


@attack("A repository with Python files and pickles", outcome="not fetched")
def test_only_what_the_pipeline_needs_is_fetched(hub: fake_hub.FakeHub, folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for name in (
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.fp16.safetensors",
        "flax_model.msgpack",
    ):
        shutil.copy(weights, weights.with_name(name))
    shutil.copy(weights, folder / "everything_in_one.safetensors")
    (folder / "transformer" / "evil.py").write_text("raise SystemExit")
    (folder / "mezzotint.json").write_text('{"examples": ["a cat"]}')
    hub.folders[REPOSITORY] = folder
    path = loading.pull(REPOSITORY)
    names = {file.name for file in path.rglob("*") if file.is_file()}
    assert weights.name in names
    assert not {name for name in names if "fp16" in name or name.endswith((".bin", ".py", ".msgpack"))}
    assert "everything_in_one.safetensors" not in names
    assert "mezzotint.json" in names


def test_a_download_that_was_cut_goes_on_where_it_stopped(
    hub: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cut_once = "transformer/diffusion_pytorch_model.safetensors"
    path = loading.pull(REPOSITORY)
    assert checks.check_folder(path).class_name == "FluxPipeline"
    ranges = [
        given
        for _, asked, given in hub.requests
        if asked.endswith("transformer/diffusion_pytorch_model.safetensors")
    ]
    assert any(given.startswith("bytes=") and given != "bytes=0-" for given in ranges)


def test_a_revision_is_taken_from_the_setting_or_the_source(hub: fake_hub.FakeHub) -> None:
    loading.pull(REPOSITORY, "v1")
    loading.pull(f"{REPOSITORY}@v1")
    assert sum("/revision/v1" in path for _, path, _ in hub.requests) == 2


def test_weights_that_exist_only_as_a_variant_are_found(folder: Path) -> None:
    for file in [*folder.rglob("*.safetensors")]:
        if file.parent.name != "vae":
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert checks.check_folder(folder).variant == "fp16"
    assert load(folder).num_parameters == load(tiny.build("flux")).num_parameters


def test_a_single_file_checkpoint_loads(
    hub: fake_hub.FakeHub, stable_diffusion: Path, tmp_path: Path
) -> None:
    hub.folders["stable-diffusion-v1-5/stable-diffusion-v1-5"] = stable_diffusion
    pipe = tiny.build("stable-diffusion")
    path = single_file.write(pipe, tmp_path / "checkpoint.safetensors")
    loaded = load(path)
    assert np.allclose(picture(loaded.pipe, "stable-diffusion"), picture(pipe, "stable-diffusion"), atol=1e-3)
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]


# ------------------------------------------------------------------ dtype, device, threads, layout


def test_auto_dtype_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for features, wanted in (
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ):
        monkeypatch.setattr(host, "cpu_features", lambda features=features: features)
        assert hardware.choose_dtype("auto", cpu)[0] == wanted
    assert hardware.choose_dtype("fp16", cpu)[0] == torch.float16


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"device": "toaster"}, "device_unavailable", "use auto, cpu, cuda"),
        ({"device": "cuda:77"}, "device_unavailable", "cuda:77"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(
    flux: Path, settings: dict[str, Any], code: str, words: str
) -> None:
    error = refusal(flux, **settings)
    assert (error.code, error.permanent) == (code, True)
    assert words in error.message


def test_a_dtype_that_does_not_exist_is_refused_before_anything_loads(flux: Path) -> None:
    with pytest.raises(ValidationError, match="'auto', 'bf16', 'fp16' or 'fp32'"):
        load(flux, dtype="int8")


def test_the_thread_count_is_set_and_zero_means_one_per_usable_core(flux: Path) -> None:
    assert load(flux, num_threads=3).num_threads == torch.get_num_threads() == 3
    assert load(flux, num_threads=0).num_threads == torch.get_num_threads() == host.num_cores()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_auto_layout_changes_the_picture_by_a_level_or_two_and_keeps_its_own_promise(
    flux: Path, dtype: str
) -> None:
    reference = picture(load(flux, dtype=dtype).pipe)
    first = load(flux, dtype=dtype, performance="auto").pipe
    again = load(flux, dtype=dtype, performance="auto").pipe
    assert first.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(parameter.data_ptr() % 64 for parameter in first.transformer.parameters())
    assert np.array_equal(picture(first), picture(again))
    assert np.abs(picture(first) - reference).max() <= (0.02 if dtype == "bf16" else 0.004)


def test_bits_under_the_auto_layout_do_not_depend_on_where_weights_lie_in_the_file(folder: Path) -> None:
    before = picture(load(folder, performance="auto").pipe)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "note": "moves every tensor by some bytes"})
    assert np.array_equal(picture(load(folder, performance="auto").pipe), before)


# ------------------------------------------------------------------ models that cannot load


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def edit_index(folder: Path, **changes: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file: Path, size: int = 1000) -> None:
    file.write_bytes(file.read_bytes()[:size])


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no index": (lambda at: remove(at / "model_index.json"), "not_a_pipeline", "it has no model_index.json"),
    "broken index": (lambda at: cut(at / "model_index.json", 50), "corrupt_file", "fetch the model again"),
    "a component is gone": (
        lambda at: remove(at / "vae"),
        "missing_file",
        "the folder vae (AutoencoderKL) is missing",
    ),
    "weights are gone": (
        lambda at: remove(at / "vae" / "diffusion_pytorch_model.safetensors"),
        "missing_file",
        "no safetensors weights",
    ),
    "only pickles": (
        lambda at: (at / "text_encoder" / "model.safetensors").rename(
            at / "text_encoder" / "pytorch_model.bin"
        ),
        "pickle_only",
        "can run any program",
    ),
    "cut weights": (
        lambda at: cut(at / "transformer" / "diffusion_pytorch_model.safetensors", 100_000),
        "corrupt_file",
        "damaged or cut short",
    ),
    "weights that are none": (
        lambda at: (at / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"<html>not here</html>"),
        "corrupt_file",
        "fetch the model again",
    ),
    "weights without a place in their file": (
        lambda at: (at / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(
            struct.pack("<Q", 25) + b'{"a":{"data_offsets":[]}}'
        ),
        "corrupt_file",
        "fetch the model again",
    ),
    "unknown class": (
        lambda at: edit_index(at, _class_name="Flux9Pipeline"),
        "unsupported_class",
        "Flux9Pipeline",
    ),
    "image to image": (
        lambda at: edit_index(at, _class_name="FluxImg2ImgPipeline"),
        "unsupported_class",
        "makes pictures from pictures",
    ),
    "video": (lambda at: edit_index(at, _class_name="WanPipeline"), "unsupported_class", "from text alone"),
    "own code": (
        lambda at: edit_index(at, _class_name=["pipeline", "Mine"]),
        "remote_code",
        "allow_remote_code",
    ),
    "a component with own code": (
        lambda at: edit_index(at, transformer=["my_module", "Mine"]),
        "remote_code",
        "allow_remote_code",
    ),
    "wrong class for a component": (
        lambda at: edit_index(at, transformer=["diffusers", "NoSuchModel"]),
        "model_load_failed",
        "could not be loaded by diffusers",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_says_what_is_wrong(folder: Path, damage: str) -> None:
    harm, code, words = DAMAGE[damage]
    harm(folder)
    error = refusal(folder)
    assert (error.code, error.permanent) == (code, True)
    assert words in error.message


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    pipe = tiny.build("flux")
    pipe.save_pretrained(tmp_path, max_shard_size="300kB")
    shards = sorted((tmp_path / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert load(tmp_path).num_parameters == load(pipe).num_parameters
    shards[0].unlink()
    error = refusal(tmp_path)
    assert error.code == "missing_file"
    assert shards[0].name in error.message


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("adapter_config.json", "register it as an adapter"),
        ("config.json", "one component of a pipeline"),
        ("checkpoint.safetensors", "give the file, checkpoint.safetensors"),
    ],
)
def test_a_folder_that_is_something_else_is_recognised(tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / file).write_text("{}")
    assert words in refusal(tmp_path).message


@attack("Pickles as weights", outcome="refused; nothing is unpickled")
def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"x")
    assert refusal(pickle).code == "pickle_only"
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"x" * 100)
    assert refusal(broken).code == "corrupt_file"


@pytest.mark.parametrize("source", ["no-such-name", "/no/such/folder", "gone.safetensors", "a/b/c", "../up"])
def test_a_source_that_is_nowhere_is_not_found(source: str) -> None:
    error = refusal(source)
    assert (error.code, error.permanent) == ("model_not_found", True)
    assert source in error.message


def test_too_little_memory_is_known_before_loading(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = checks.check_folder(flux)
    needed = checks.check_memory(plan, torch.float32, 2**40, 2**40)
    half = checks.check_memory(plan, torch.bfloat16, 2**40, 2**40)
    assert needed / checks.OVERHEAD == pytest.approx(4 * load(flux).num_parameters, rel=0.01)
    assert half == pytest.approx(needed / 2, rel=0.01)
    assert checks.check_memory(plan, torch.float32, 2**40, 2**40, offload=True) < needed

    monkeypatch.setattr(hardware, "memory", lambda device: (needed // 2, 10 * needed))
    error = refusal(flux)
    assert (error.code, error.permanent) == ("not_enough_memory", False)
    monkeypatch.setattr(hardware, "memory", lambda device: (needed // 2, needed // 2))
    assert refusal(flux).permanent is True


@pytest.mark.parametrize(
    ("source", "code", "permanent", "words"),
    [
        ("studio/secret", "gated_model", True, "accept its terms"),
        ("studio/nothing", "model_not_found", True, "check the spelling"),
        (f"{REPOSITORY}@v9", "model_not_found", True, "no such branch, tag or commit"),
        ("studio/other-kind", "not_a_pipeline", True, "has no model_index.json"),
    ],
)
def test_a_repository_that_cannot_be_had_says_why(
    hub: fake_hub.FakeHub, tmp_path: Path, source: str, code: str, permanent: bool, words: str
) -> None:
    hub.gated.add("studio/secret")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("a language model")
    hub.folders["studio/other-kind"] = tmp_path / "other"
    error = refusal(source)
    assert (error.code, error.permanent) == (code, permanent)
    assert words in error.message


def test_without_a_network_an_unknown_repository_may_be_tried_again(
    hub: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading.pull(REPOSITORY)
    asked = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal("studio/elsewhere").code == "no_network"
    assert loading.pull(REPOSITORY).is_dir()
    assert len(hub.requests) == asked

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    point_at(monkeypatch, "http://127.0.0.1:9")
    error = refusal("studio/elsewhere")
    assert (error.code, error.permanent) == ("no_network", False)
    assert "mezzotint pull studio/elsewhere" in error.message


# ------------------------------------------------------------------ programs


def test_pull_prints_the_folder_and_says_what_went_wrong(
    hub: fake_hub.FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loading.main(["pull", REPOSITORY, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (Path(answer["path"]) / "model_index.json").is_file()
    assert loading.main(["pull", "studio/nothing"]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_doctor_names_what_auto_means_here() -> None:
    facts = doctor.facts()
    assert facts["device"] == str(hardware.choose_device())
    assert facts["dtype"] in hardware.DTYPES
    assert facts["num_threads"] == host.num_cores()
    assert 0 < facts["memory"]["available_bytes"] <= facts["memory"]["total_bytes"]
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["models"]["built_in"]) == set(sources.built_in_names())
    assert json.loads(json.dumps(facts)) == facts


def test_doctor_says_what_torch_says_without_loading_it_where_there_is_no_gpu() -> None:
    code = "import json, sys; from mezzotint.engine.models import doctor, host; print(json.dumps(["
    code += "doctor.facts(), host.may_have_gpu(), 'torch' in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    facts, may_have_gpu, loads_torch = json.loads(found.stdout)
    device = hardware.choose_device()
    assert loads_torch is may_have_gpu
    assert may_have_gpu or device.type == "cpu"
    dtype, reason = hardware.choose_dtype("auto", device)
    assert (facts["device"], hardware.DTYPES[facts["dtype"]], facts["dtype_reason"]) == (
        str(device),
        dtype,
        reason,
    )
    known = torch.cpu.get_capabilities()
    assert facts["cpu"]["features"] == {name: known.get(name, False) for name in host.FEATURES}


@pytest.mark.parametrize(
    "error",
    [
        NameError("name 'SomeProcessor' is not defined"),
        ImportError("SomeVideoProcessor requires the Torchvision library but it was not found"),
        ValueError("<class 'transformers._LazyModule.__getattr__.<locals>.Placeholder'> cannot be loaded"),
    ],
)
def test_a_missing_torchvision_is_named_with_the_command_that_installs_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchvision" else found(name)
    )
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fails)
    with pytest.raises(ModelLoadError, match=re.escape("pip install 'mezzotint[vision]'")) as caught:
        loading.load(tiny.save("flux", tmp_path), EngineSettings(dtype="fp32", device="cpu"))
    assert caught.value.code == "missing_package"
