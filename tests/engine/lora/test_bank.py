"""Row-wise LoRA: against plain diffusers, against neighbours, and what stays when adapters come and go."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint.engine import Engine, Request
from mezzotint.engine.lora.bank import AdapterBank, Lease
from mezzotint.engine.lora.files import read_adapter
from mezzotint.engine.lora.layers import NotRowWise, Weights, patch_layers
from mezzotint.engine.steps.batching import Call, Part, merge
from mezzotint.errors import ModelLoadError, NotFoundError
from mezzotint.messages import Done, Failed
from tests.attacks import attack
from tests.engine import adapter_files, tiny
from tests.engine.adapter_files import (
    ATTENTION,
    FEED_FORWARD,
    LAYOUTS,
    MODULATION,
    USUAL,
    pairs,
    peft,
    uses,
    write,
)
from tests.engine.conftest import same_alone_and_together
from tests.engine.rules import RULES

BUDGET = 1 << 28
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = 1e-5
"""Largest difference from diffusers with load_lora_weights in fp32, of values from 0 to 1."""
BF16_RATIO = 1.5
"""In bf16 a picture is at most this many times as far from the fp32 one as diffusers' own bf16 picture is."""

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


@pytest.fixture
def pipe() -> Any:
    return tiny.build("flux")


def bank_of(pipe: Any, byte_budget: int = BUDGET) -> AdapterBank:
    return AdapterBank(pipe, byte_budget=byte_budget)


def leased(bank: AdapterBank, route: str, scale: float | None = None) -> Lease:
    lease = bank.acquire(route, scale)
    assert lease is not None
    return lease


def picture(pipe: Any, name: str, *, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        result = pipe(
            prompt="a cat", num_inference_steps=2, output_type="np", generator=generator, **tiny.call(name)
        )
    return result.images[0]


@contextlib.contextmanager
def everywhere(bank: AdapterBank, lease: Lease) -> Iterator[None]:
    """The adapter on all components, for one job alone."""
    with contextlib.ExitStack() as stack:
        for component in bank._layers:
            stack.enter_context(bank.rows(component, [lease]))
        yield


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit: 0.0 is not -0.0 here."""
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


# ---------------------------------------------------------------- against diffusers


def adapted(name: str, file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The picture with the adapter, and the base's, which is the same before and after."""
    pipe = tiny.build(name, dtype)
    before = picture(pipe, name)
    bank = bank_of(pipe)
    bank.add("a", file)
    lease = leased(bank, "a")
    with everywhere(bank, lease):
        found = picture(pipe, name)
    assert (picture(pipe, name) == before).all(), "A, then base: the base's bytes"
    with everywhere(bank, lease):
        assert (picture(pipe, name) == found).all(), "A, base, A: A's bytes"
    return found, before


def by_diffusers(name: str, file: Path, dtype: torch.dtype) -> Any:
    pipe = tiny.build(name, dtype)
    pipe.load_lora_weights(str(file))
    return picture(pipe, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_layout_gives_what_diffusers_gives(name: str, layout: str, tmp_path: Path) -> None:
    file = write(LAYOUTS[name, layout](tiny.build(name), 1), tmp_path / "a.safetensors")
    found, base = adapted(name, file, torch.float32)
    assert abs(found - by_diffusers(name, file, torch.float32)).max() < TOLERANCE
    assert abs(found - base).max() > 0.05, "the adapter changes the picture"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["flux", "stable-diffusion"])
def test_in_bf16_it_is_as_near_to_fp32_as_diffusers_is(name: str, tmp_path: Path) -> None:
    file = write(LAYOUTS[name, "kohya"](tiny.build(name), 1), tmp_path / "a.safetensors")
    exact, _ = adapted(name, file, torch.float32)
    found, _ = adapted(name, file, torch.bfloat16)
    theirs = by_diffusers(name, file, torch.bfloat16)
    assert abs(found - exact).mean() < BF16_RATIO * abs(theirs - exact).mean()


@pytest.mark.filterwarnings("ignore")
def test_an_adapters_own_alpha_and_rank_count(pipe: Any, tmp_path: Path) -> None:
    found = pairs(pipe.transformer, ATTENTION, rank=8)
    config = {
        "r": 8,
        "lora_alpha": 4,
        "target_modules": list(found),
        "alpha_pattern": {"attn.to_q": 16},
        "rank_pattern": {},
    }
    metadata = {f"transformer.{name}": value for name, value in config.items()}
    file = write(peft("transformer.", found), tmp_path / "a.safetensors", metadata)
    assert (
        abs(adapted("flux", file, torch.float32)[0] - by_diffusers("flux", file, torch.float32)).max()
        < TOLERANCE
    )
    weights = read(file, pipe)["transformer"]
    factors = {name.rpartition(".")[2]: weight.factor for name, weight in weights.items()}
    assert (factors["to_q"], factors["to_k"]) == (2.0, 0.5)


def read(file: Path, pipe: Any) -> Any:
    layers = {"transformer": patch_layers(pipe.transformer), "text_encoder": patch_layers(pipe.text_encoder)}
    return read_adapter(file, pipe, layers, max_bytes=BUDGET).weights


def test_a_folder_of_pefts_own_is_read_with_its_configuration(pipe: Any, tmp_path: Path) -> None:
    found = pairs(pipe.transformer, ATTENTION, rank=4)
    state = {f"base_model.model.{key}": tensor for key, tensor in peft("", found).items()}
    write(state, tmp_path / "adapter_model.safetensors")
    plain = read(tmp_path, pipe)["transformer"]
    assert {weight.factor for weight in plain.values()} == {1.0}
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "lora_alpha": 8, "use_rslora": true}'
    )
    assert {weight.factor for weight in read(tmp_path, pipe)["transformer"].values()} == {4.0}


@pytest.mark.filterwarnings("ignore")
def test_ranks_may_differ_from_layer_to_layer(pipe: Any, tmp_path: Path) -> None:
    found = dict(pairs(pipe.transformer, r"attn\.to_[qv]$|proj_mlp$", rank=4, seed=1))
    found |= pairs(pipe.transformer, r"attn\.to_k$", rank=20, seed=2)
    file = write(peft("transformer.", found), tmp_path / "a.safetensors")
    by_us = adapted("flux", file, torch.float32)[0]
    assert abs(by_us - by_diffusers("flux", file, torch.float32)).max() < TOLERANCE


def test_different_alphas_of_kohyas_layers_are_kept_apart(tmp_path: Path) -> None:
    pipe = tiny.build("stable-diffusion")
    state = adapter_files.kohya("lora_unet_", pairs(pipe.unet, r"attn1\.to_q|ff\.net\.2"), alpha=2.0)
    for key in state:
        if key.endswith("to_q.alpha"):
            state[key] = torch.tensor(8.0)
    file = write(state, tmp_path / "a.safetensors")
    weights = read_adapter(file, pipe, {"unet": patch_layers(pipe.unet)}, max_bytes=BUDGET).weights["unet"]
    assert {name.rpartition(".")[2]: weight.factor for name, weight in weights.items()} == {
        "to_q": 2.0,
        "2": 0.5,
    }


def test_a_request_may_override_the_scale(pipe: Any, tmp_path: Path) -> None:
    found = pairs(pipe.transformer, ATTENTION)
    file = write(peft("transformer.", found), tmp_path / "a.safetensors")
    halved = {name: (down, up / 2) for name, (down, up) in found.items()}
    bank = bank_of(pipe)
    bank.add("a", file, scale=0.5)
    bank.add("half", write(peft("transformer.", halved), tmp_path / "b.safetensors"))
    base = picture(pipe, "flux")

    def with_lease(lease: Lease) -> Any:
        with everywhere(bank, lease):
            return picture(pipe, "flux")

    half = with_lease(leased(bank, "half"))
    assert abs(with_lease(leased(bank, "a")) - half).max() < TOLERANCE
    assert abs(with_lease(leased(bank, "a", 1.0)) - half).max() > 0.01
    assert abs(with_lease(leased(bank, "a", 0.0)) - base).max() < TOLERANCE


# ---------------------------------------------------------------- rows and their neighbours


@functools.cache
def first_call(name: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline's denoiser and the arguments of its first forward, by name."""
    pipe = tiny.build(name, dtype)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    seen: list[Call] = []
    rule = RULES[type(denoiser).__name__]
    forward = denoiser.forward
    names = tuple(forward.__wrapped__.__code__.co_varnames[1:] if hasattr(forward, "__wrapped__") else ())
    names = names or tuple(forward.__code__.co_varnames[1:])

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(Call("denoiser", forward, args, kwargs, rule, names))
        return forward(*args, **kwargs)

    denoiser.forward = spy
    picture(pipe, name)
    del denoiser.forward
    return pipe, seen[0].arguments


class Rows:
    """One denoiser and six kinds of rows: no adapter, a, b at half scale, c of a larger rank, d, none."""

    num = 6

    def __init__(self, name: str, dtype: torch.dtype, folder: Path, byte_budget: int) -> None:
        self.pipe, self.arguments = first_call(name, dtype)
        self.component = "unet" if hasattr(self.pipe, "unet") else "transformer"
        self.denoiser = getattr(self.pipe, self.component)
        self.bank = bank_of(self.pipe)
        pattern = f"{USUAL}|{adapter_files.CONVOLUTIONS}|{MODULATION}"
        for index, (route, rank, which) in enumerate(
            (("a", 8, pattern), ("b", 8, pattern), ("c", 20, pattern), ("d", 4, ATTENTION))
        ):
            state = peft(f"{self.component}.", pairs(self.denoiser, which, rank=rank, seed=index))
            self.bank.add(route, write(state, folder / f"{route}.safetensors"))
        a, b, c, d = (leased(self.bank, "a"), leased(self.bank, "b", 0.5), *map(self.lease, "cd"))
        self.leases = (None, a, b, c, d, None)
        self.bank.byte_budget = byte_budget
        rule = RULES[type(self.denoiser).__name__]
        names = tuple(self.arguments)
        self.calls = [
            Call(self.component, self.denoiser.forward, (), self._varied(index), rule, names)
            for index in range(self.num)
        ]
        self.rows_each = self.calls[0].rows

    def lease(self, route: str) -> Lease:
        return leased(self.bank, route)

    def _varied(self, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        rule = RULES[type(self.denoiser).__name__]
        varied = dict(self.arguments)
        for name, value in self.arguments.items():
            if (
                isinstance(value, Tensor)
                and rule.arguments.get(name) == "row"
                and value.is_floating_point()
                and value.ndim > 1
            ):
                varied[name] = torch.randn(value.shape, generator=generator).to(value.dtype)
        return varied

    def run(self, kinds: Sequence[int], *, adapters: bool = True) -> list[Tensor]:
        """The results of rows of these kinds in one forward of a fixed number of rows."""
        padded = [*kinds, *[kinds[-1]] * (self.num - len(kinds))]
        leases = [self.leases[kind] if adapters else None for kind in padded for _ in range(self.rows_each)]
        parts = [Part(self.calls[kind], 0, self.rows_each) for kind in padded]
        with torch.inference_mode(), self.bank.rows(self.component, leases):
            result = self.denoiser.forward(**merge(parts, self.num * self.rows_each))
        tensor = result[0] if isinstance(result, tuple) else result.sample
        return [tensor[i * self.rows_each : (i + 1) * self.rows_each].clone() for i in range(len(kinds))]


EXACT = [
    (name, dtype, budget)
    for name in ("flux", "stable-diffusion")
    for dtype in DTYPES
    for budget in (BUDGET, 1)
]


@pytest.mark.parametrize(
    ("name", "dtype", "byte_budget"),
    EXACT,
    ids=[
        f"{name}-{str(dtype)[6:]}-{'together' if budget > 1 else 'one by one'}"
        for name, dtype, budget in EXACT
    ],
)
def test_a_rows_bytes_do_not_depend_on_its_neighbours(
    name: str, dtype: torch.dtype, byte_budget: int, tmp_path: Path
) -> None:
    rows = Rows(name, dtype, tmp_path, byte_budget)
    alone = [rows.run([kind])[0] for kind in range(rows.num)]
    base = [rows.run([kind], adapters=False)[0] for kind in range(rows.num)]
    for kind, lease in enumerate(rows.leases):
        assert same_bytes(alone[kind], base[kind]) == (lease is None)
    chance = random.Random(0)
    for _ in range(8):
        kinds = chance.choices(range(rows.num), k=chance.randint(2, rows.num))
        for kind, found in zip(kinds, rows.run(kinds), strict=True):
            assert same_bytes(found, alone[kind]), f"row of kind {kind} among {kinds}"
    rows.bank.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_holds_at_the_sizes_of_the_built_in_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """Kernels are chosen by size: 256 wide, 16 and 32 tokens, 8 rows."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"to_q": nn.Linear(256, 256), "up": nn.Linear(256, 1024), "down": nn.Linear(1024, 256)}
    )
    model.requires_grad_(False).to(dtype)
    pipe = _Pipeline(model)
    bank = bank_of(pipe)
    for index, route in enumerate("ab"):
        bank.add(
            route, write(peft("", pairs(model, ".", rank=16, seed=index)), tmp_path / f"{route}.safetensors")
        )
    leases = [None, leased(bank, "a"), leased(bank, "b")]
    inputs = [torch.randn(1, 32, 256, dtype=dtype) for _ in range(3)]

    def run(kinds: Sequence[int]) -> Tensor:
        x = torch.cat([inputs[kind] for kind in kinds])
        with torch.inference_mode(), bank.rows("transformer", [leases[kind] for kind in kinds]):
            result: Tensor = model["down"](model["up"](model["to_q"](x)[:, :16]))
        return result

    alone = [run([kind] * 8)[0] for kind in range(3)]
    chance = random.Random(0)
    for _ in range(10):
        kinds = chance.choices(range(3), k=8)
        for kind, found in zip(kinds, run(kinds), strict=True):
            assert same_bytes(found, alone[kind])


class _Pipeline:
    """The least that the bank asks of a pipeline."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer


def test_preparing_changes_no_parameter_and_closing_gives_the_layers_back(pipe: Any) -> None:
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    bank = bank_of(pipe)
    after = pipe.transformer.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    bank.close()
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())


def test_a_layer_whose_rows_cannot_be_told_apart_says_so(tmp_path: Path) -> None:
    linear = nn.Linear(16, 16).requires_grad_(False)
    model = nn.ModuleDict({"to_q": linear})
    bank = bank_of(_Pipeline(model))
    bank.add("a", write(peft("", pairs(model, ".")), tmp_path / "a.safetensors"))
    lease = leased(bank, "a")
    tokens = torch.randn(7, 16)
    with (
        bank.rows("transformer", [lease, None]),
        pytest.raises(NotRowWise, match=r"to_q got .*\[7, 16\].* 2 rows"),
    ):
        model["to_q"](tokens)
    with bank.rows("transformer", [lease]):
        adapted = linear(tokens)
    assert not torch.equal(adapted, linear(tokens))


def inputs_without_rows(name: str) -> set[str]:
    """Layers of a merged forward of three calls whose input does not have the rows in dimension 0."""
    pipe, arguments = first_call(name, torch.float32)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    call = Call("", denoiser.forward, (), arguments, RULES[type(denoiser).__name__], tuple(arguments))
    rows, found = 3 * call.rows, set()
    hooks = [
        module.register_forward_pre_hook(
            lambda module, given, layer=layer: found.add(layer) if len(given[0]) != rows else None
        )
        for layer, module in denoiser.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    with torch.no_grad():
        denoiser.forward(**merge([Part(call, 0, call.rows)] * 3, rows))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if name != "flux-schnell"])
def test_every_layer_that_may_be_adapted_has_rows_first(name: str) -> None:
    pipe = first_call(name, torch.float32)[0]
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    without = inputs_without_rows(name)
    layers = patch_layers(denoiser)
    for layer in layers.values():
        layer.close()
    assert {layer.name for layer in layers.values() if not layer.row_wise} == without
    for name in without:
        weight = denoiser.get_submodule(name).weight
        found = Weights(torch.ones(4, weight.shape[1]), torch.ones(weight.shape[0], 4), 1.0)
        assert "all rows in one piece" in str(layers[name].misfit(found))


# ---------------------------------------------------------------- refusals


def _changed(
    change: Callable[[Any, adapter_files.State], adapter_files.State],
) -> Callable[[Any, Path], Path]:
    def make(pipe: Any, folder: Path) -> Path:
        state = peft("transformer.", pairs(pipe.transformer, ATTENTION))
        return write(change(pipe, state), folder / "a.safetensors")

    return make


def _with(key: str, shape: tuple[int, ...] = (4, 4), value: float = 1.0) -> Callable[[Any, Path], Path]:
    return _changed(lambda pipe, state: state | {key: torch.full(shape, value)})


def _cut(pipe: Any, folder: Path) -> Path:
    file = _changed(lambda pipe, state: state)(pipe, folder)
    file.write_bytes(file.read_bytes()[:-10])
    return file


def _written(name: str, data: bytes = b"x") -> Callable[[Any, Path], Path]:
    def make(pipe: Any, folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def _kohya_plus(key: str) -> Callable[[Any, Path], Path]:
    def make(pipe: Any, folder: Path) -> Path:
        return write(adapter_files.flux_kohya(pipe, 1) | {key: torch.ones(4, 4)}, folder / "a.safetensors")

    return make


FIRST = "transformer_blocks.0.attn.to_q"
_PAIR = (torch.ones(4, 32), torch.ones(32, 4))
REFUSALS: dict[str, tuple[Callable[[Any, Path], Path], str, str]] = {
    "a pickle": (_written("a.bin"), "adapter_unsupported", "a.bin is a pickle file"),
    "a folder of pickles": (
        lambda pipe, folder: _written("a.ckpt")(pipe, folder).parent,
        "adapter_unsupported",
        "a.ckpt is a pickle file",
    ),
    "no file": (lambda pipe, folder: folder / "a.safetensors", "adapter_broken", "no such file"),
    "an empty file": (_written("a.safetensors", b""), "adapter_broken", "not a whole safetensors file"),
    "a torn file": (_cut, "adapter_broken", "not a whole safetensors file"),
    "NaN": (
        _changed(lambda pipe, state: {key: tensor * float("nan") for key, tensor in state.items()}),
        "adapter_broken",
        "NaN",
    ),
    "half a pair": (
        _changed(
            lambda pipe, state: {k: v for k, v in state.items() if k != f"transformer.{FIRST}.lora_B.weight"}
        ),
        "adapter_broken",
        f"transformer.{FIRST} has only one",
    ),
    "another width": (
        _changed(lambda pipe, state: state | {f"transformer.{FIRST}.lora_A.weight": torch.ones(4, 64)}),
        "adapter_wrong_base",
        rf"transformer.{FIRST}: the model's weight is \[32, 32\], the adapter has \[4, 64\]",
    ),
    "another depth": (
        _changed(lambda pipe, state: state | peft("transformer.", {"transformer_blocks.9.attn.to_q": _PAIR})),
        "adapter_wrong_base",
        r"transformer_blocks.9.attn.to_q.* has no layer of that name",
    ),
    "another model": (
        lambda pipe, folder: write(
            adapter_files.unet_peft(tiny.build("stable-diffusion"), 1), folder / "a.safetensors"
        ),
        "adapter_wrong_base",
        "does not fit this endpoint's model",
    ),
    "not a LoRA": (
        lambda pipe, folder: write({"some.weight": torch.ones(4, 4)}, folder / "a.safetensors"),
        "adapter_wrong_base",
        "some.weight",
    ),
    "DoRA": (_with(f"transformer.{FIRST}.lora_magnitude_vector"), "adapter_unsupported", "is DoRA"),
    "kohya's DoRA": (_with("lora_unet_x.dora_scale"), "adapter_unsupported", "is DoRA"),
    "LoHa": (_with("lora_unet_x.hada_w1_a"), "adapter_unsupported", "is LoHa"),
    "LoKr": (_with("lora_unet_x.lokr_w1"), "adapter_unsupported", "is LoKr"),
    "full differences": (_with("diffusion_model.x.diff"), "adapter_unsupported", "full differences"),
    "biases": (_with(f"transformer.{FIRST}.lora_B.bias", (32,)), "adapter_unsupported", "biases"),
    "T5": (_with("text_encoder_2.x.lora_A.weight"), "adapter_unsupported", "a LoRA of text_encoder_2"),
    "a key that the converter drops": (
        _kohya_plus("lora_other_thing.lora_down.weight"),
        "adapter_wrong_base",
        "lora_other_thing",
    ),
    "a norm": (
        _with("transformer.transformer_blocks.0.attn.norm_q.weight", (16, 1)),
        "adapter_wrong_base",
        "norm_q",
    ),
}


@attack("Adapters of other kinds or for other models", outcome="refused by name")
@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_used_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, code, text = REFUSALS[case]
    pipe = first_call("flux", torch.float32)[0]
    bank = bank_of(pipe)
    with pytest.raises(ModelLoadError, match=text) as caught:
        bank.add("a", make(pipe, tmp_path))
    bank.close()
    assert caught.value.code == code
    assert str(tmp_path) not in caught.value.message


def test_an_adapter_above_the_byte_limit_is_refused(pipe: Any, tmp_path: Path) -> None:
    file = write(peft("transformer.", pairs(pipe.transformer, rank=4)), tmp_path / "a.safetensors")
    for budget in (1000, file.stat().st_size):
        with pytest.raises(ModelLoadError, match="raise adapter_bytes") as caught:
            bank_of(pipe, budget).add("a", file)
        assert caught.value.code == "adapter_too_large"


def test_a_compiled_model_takes_no_adapters_and_is_left_alone(pipe: Any, tmp_path: Path) -> None:
    file = write(peft("transformer.", pairs(pipe.transformer)), tmp_path / "a.safetensors")
    pipe.transformer.forward = torch.compile(pipe.transformer.forward)
    with pytest.raises(ModelLoadError, match="uncompiled") as caught:
        bank_of(pipe).add("a", file)
    assert caught.value.code == "adapter_unsupported"
    assert not any("forward" in vars(module) for module in pipe.transformer.children())


def test_differences_that_are_all_zero_are_no_obstacle(pipe: Any, tmp_path: Path) -> None:
    state = adapter_files.flux_comfy(pipe, 1) | {"diffusion_model.x.diff_b": torch.zeros(4)}
    assert bank_of(pipe).add("a", write(state, tmp_path / "a.safetensors")).file.rank == 4


@attack("An adapter's file changed behind the server's back", outcome="its requests fail; it is not used")
def test_a_file_that_has_changed_since_is_not_used(pipe: Any, tmp_path: Path) -> None:
    file = write(peft("transformer.", pairs(pipe.transformer)), tmp_path / "a.safetensors")
    bank = bank_of(pipe)
    bank.add("a", file)
    write(peft("transformer.", pairs(pipe.transformer, seed=1)), file)
    with pytest.raises(ModelLoadError, match="SHA-256"):
        bank.acquire("a")
    file.unlink()
    bank.prefetch("a")
    with pytest.raises(ModelLoadError, match="no such file"):
        bank.acquire("a")


def test_an_unknown_route_names_the_nearest(pipe: Any, tmp_path: Path) -> None:
    bank = bank_of(pipe)
    bank.add("watercolour", write(peft("transformer.", pairs(pipe.transformer)), tmp_path / "a.safetensors"))
    with pytest.raises(NotFoundError, match="nearest: watercolour") as caught:
        bank.acquire("watercolor")
    assert caught.value.code == "adapter_not_found"


# ---------------------------------------------------------------- residency


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Forty files of adapters of the same size."""
    folder, model = tmp_path_factory.mktemp("many"), first_call("flux", torch.float32)[0].transformer
    return [
        write(peft("transformer.", pairs(model, r"attn\.to_q$", rank=2, seed=n)), folder / f"{n}.safetensors")
        for n in range(40)
    ]


def filled(pipe: Any, files: Sequence[Path], room: int) -> tuple[AdapterBank, int]:
    """A bank that knows the files by number, with room for `room` of them; and the bytes of one."""
    one = bank_of(pipe).add("0", files[0]).file.num_bytes
    bank = bank_of(pipe, one * room)
    for number, file in enumerate(files):
        bank.add(str(number), file)
    return bank, one


def test_the_least_recently_used_goes_first_and_never_one_in_use(pipe: Any, many: list[Path]) -> None:
    bank, one = filled(pipe, many[:5], room=3)
    held = leased(bank, "0")
    for route in ("1", "2", "1"):
        leased(bank, route).release()
    leased(bank, "3").release()
    stats = bank.stats()
    assert set(stats.resident_routes) == {"0", "1", "3"}
    assert (stats.hits, stats.loads, stats.evictions, stats.num_bytes) == (1, 4, 1, 3 * one)
    others = [leased(bank, "1"), leased(bank, "3")]
    assert bank.acquire("2") is None, "everything is in use"
    others[0].release()
    assert bank.acquire("2") is not None
    held.release()
    held.release()
    assert held.resident.num_leases == 0


def test_the_time_of_a_cold_load_is_told_to_the_job_that_caused_it(pipe: Any, many: list[Path]) -> None:
    bank, _ = filled(pipe, many[:2], room=2)
    cold, warm = leased(bank, "0"), leased(bank, "0")
    assert cold.load_s > 0
    assert warm.load_s == 0
    bank.prefetch("1")
    assert leased(bank, "1").load_s > 0, "read ahead for this job"
    assert leased(bank, "1").load_s == 0


def test_a_route_that_is_removed_or_replaced_stays_for_those_who_hold_it(pipe: Any, many: list[Path]) -> None:
    bank, one = filled(pipe, many[:3], room=3)
    lease = leased(bank, "0")
    base = picture(pipe, "flux")
    with everywhere(bank, lease):
        before = picture(pipe, "flux")
    bank.add("0", many[1])
    with everywhere(bank, leased(bank, "0")):
        replaced = picture(pipe, "flux")
    bank.remove("0")
    with everywhere(bank, lease):
        assert (picture(pipe, "flux") == before).all()
    assert (before != replaced).any()
    assert (before != base).any()
    assert bank.stats().num_bytes == 2 * one
    lease.release()
    assert bank.stats().num_bytes == one, "held by the other lease"
    with pytest.raises(NotFoundError):
        bank.acquire("0")


def test_a_prefetched_adapter_is_read_in_the_background(
    pipe: Any, many: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, one = filled(pipe, many[:3], room=2)
    begin, threads = threading.Event(), []
    original = bank._read

    def slow(info: Any) -> Any:
        assert begin.wait(20)
        threads.append(threading.current_thread())
        return original(info)

    monkeypatch.setattr(bank, "_read", slow)
    bank.prefetch("0")
    bank.prefetch("1")
    bank.prefetch("2")
    assert bank.stats().num_bytes == 2 * one, "what is being read counts, and no more is read than has room"
    assert not bank.is_ready("0")
    begin.set()
    first, second = leased(bank, "0"), leased(bank, "1")
    assert all(thread is not threading.main_thread() for thread in threads)
    assert bank.is_ready("2"), "nothing to wait for: there is no room"
    assert bank.acquire("2") is None
    first.release()
    second.release()
    leased(bank, "2").release()
    assert set(bank.stats().resident_routes) == {"1", "2"}
    bank.close()


def test_a_thousand_adapters_share_the_room_of_thirty_two(pipe: Any, many: list[Path]) -> None:
    bank, one = filled(pipe, [many[n % 40] for n in range(1000)], room=32)
    before = tensor_bytes()
    chance = random.Random(0)
    rows = 4
    hidden = torch.randn(rows, 8, 32)
    peak = 0
    for turn in range(150):
        leases = [leased(bank, str(chance.randrange(1000))) for _ in range(rows)]
        with torch.inference_mode(), bank.rows("transformer", leases):
            pipe.transformer.transformer_blocks[0].attn.to_q(hidden)
        if turn in (75, 149):
            peak = max(peak, tensor_bytes() - before)
        for lease in leases:
            lease.release()
    stats = bank.stats()
    assert stats.hits + stats.loads == 600
    assert stats.evictions >= stats.loads - 32
    assert stats.num_bytes <= 1.1 * 32 * one
    assert 16 * one < peak <= 1.1 * 32 * one


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    plain = (Tensor, torch.nn.Parameter)  # others, such as compilation's fake tensors, have no memory
    found = [each for each in gc.get_objects() if type(each) in plain]
    tensors = [each for each in found if each.device.type == "cpu" and each.layout == torch.strided]
    return sum(
        {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values()
    )


# ---------------------------------------------------------------- through the engine


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("three"), first_call("flux", torch.float32)[0].transformer
    patterns = {"a": USUAL, "b": f"{ATTENTION}|{FEED_FORWARD}", "c": ATTENTION}
    return {
        route: write(
            peft("transformer.", pairs(model, pattern, rank=4 + 14 * n, seed=n)),
            folder / f"{route}.safetensors",
        )
        for n, (route, pattern) in enumerate(patterns.items())
    }


def small(adapter: str | None = None) -> Request:
    extra = {"max_sequence_length": 32}
    return Request(
        prompt="a red fox",
        num_inference_steps=2,
        seed=1,
        width=32,
        height=32,
        adapters=uses(adapter),
        extra=extra,
    )


def requests() -> list[Request]:
    """Forty-eight over {none, a, b, c} with mixed steps, guidance and seeds."""
    return [
        Request(
            prompt=("a red fox", "two boats at dawn", "an old map")[index % 3],
            num_inference_steps=(1, 2, 4, 3, 1)[index % 5],
            guidance_scale=1.0 + index % 4,
            seed=index // 8,
            width=32,
            height=32,
            adapters=uses((None, "a", "b", "c")[index % 4], 0.5 if index % 8 == 5 else None),
            extra={"max_sequence_length": 32},
        )
        for index in range(48)
    ]


@pytest.mark.parametrize(
    ("dtype", "batching", "num"),
    [(torch.float32, "exact", 48), (torch.bfloat16, "exact", 48), (torch.float32, "off", 12)],
)
def test_forty_eight_requests_at_once_are_each_what_they_are_alone(
    dtype: torch.dtype, batching: Any, num: int, adapters: dict[str, Path]
) -> None:
    engine = Engine(tiny.build("flux", dtype), batching=batching, rows=4)
    for route, file in adapters.items():
        engine.enable_adapters().add(route, file)
    wanted = requests()[:num]
    alone = [engine.generate([request])[0].image for request in wanted]
    for index, request in enumerate(wanted):
        engine.submit(request, str(index))
    found: dict[int, Any] = {}
    while engine.has_work:
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Done):
                found[int(event.job_id)] = event.payload
    for index, image in enumerate(alone):
        assert image is not None
        assert found[index] == image.tobytes(), f"request {index}"
    engine.close()


@pytest.mark.parametrize("first", [1.0, 0.5])
def test_a_scale_gives_the_same_bytes_where_several_rows_are_computed_one_by_one(
    first: float, adapters: dict[str, Path]
) -> None:
    """An adapter whose copies for all rows would take too much runs row by row, alone or not."""
    engine = Engine(tiny.build("flux", torch.bfloat16), rows=4)
    info = engine.enable_adapters().add("a", adapters["a"])
    engine.enable_adapters().byte_budget = 20 * info.file.num_bytes
    engine.generate([replace(small("a"), adapters=uses("a", first))])  # settles which row counts are exact
    wanted = [replace(small("a"), adapters=uses("a", 0.7), seed=seed) for seed in range(4)]
    same_alone_and_together(engine, wanted)
    engine.close()


def test_each_adapter_changes_the_picture_by_a_margin(adapters: dict[str, Path]) -> None:
    engine = Engine(tiny.build("flux"), rows=4)
    for route, file in adapters.items():
        engine.enable_adapters().add(route, file)
    pictures = [
        result.image for result in engine.generate([small(adapter=route) for route in (None, *adapters)])
    ]
    for index, one in enumerate(pictures):
        for other in pictures[:index]:
            assert one is not None
            assert other is not None
            assert abs(one.astype(int) - other.astype(int)).mean() > 4, "levels of 255, on average"
    engine.close()


def test_fast_mode_stays_near_to_what_a_request_is_alone(adapters: dict[str, Path]) -> None:
    engine = Engine(tiny.build("flux"), batching="fast", max_rows=8)
    for route, file in adapters.items():
        engine.enable_adapters().add(route, file)
    wanted = requests()[:16]
    alone = [engine.generate([request])[0].image for request in wanted]
    for one, found in zip(alone, engine.generate(wanted), strict=True):
        assert one is not None
        assert found.image is not None
        assert abs(one.astype(int) - found.image.astype(int)).max() <= 1
    engine.close()


def test_more_adapters_at_once_than_have_room_take_turns(many: list[Path]) -> None:
    pipe = tiny.build("flux")
    one = bank_of(pipe).add("0", many[0]).file.num_bytes
    engine = Engine(pipe, rows=1, adapter_bytes=3 * one)
    for number in range(8):
        engine.enable_adapters().add(str(number), many[number])
    results = engine.generate([small(adapter=str(n % 8)) for n in range(24)])
    assert [result.error for result in results] == [None] * 24
    assert engine.enable_adapters().stats().num_bytes <= 3 * one
    engine.close()


def test_a_broken_adapter_fails_its_own_request_only(adapters: dict[str, Path], tmp_path: Path) -> None:
    engine = Engine(tiny.build("flux"), rows=1)
    file = tmp_path / "a.safetensors"
    file.write_bytes(adapters["a"].read_bytes())
    engine.enable_adapters().add("a", file)
    save_file({"x": torch.ones(1)}, file)
    bad, good = engine.generate([small(adapter="a"), small()])
    assert bad.error is not None
    assert bad.error.code == "adapter_broken"
    assert good.error is None
    engine.close()
