from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Fake
from tests.engine.tiny import save
from tests.server.hosting import endpoint, hosting, settings_for

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name: str) -> Callable[..., None]:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[..., None] = module.main
    return main


@pytest.fixture
def _reached(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_BASE_URL", fake.url)
    monkeypatch.setenv("MEZZOTINT_API_KEY", fake.key)


@pytest.mark.usefixtures("_reached")
def test_the_contact_sheet_holds_eight_pictures(tmp_path: Path) -> None:
    main_of("contact_sheet")("a red apple", str(tmp_path / "sheet.png"))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 32, 2 * 32)


def test_watching_tells_of_steps_and_previews(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    painted = endpoint("fake:step_s=0.03,size=32", id="emoji")  # so slow that there is something to watch
    with hosting(settings_for(tmp_path, painted)) as host:
        monkeypatch.setenv("MEZZOTINT_BASE_URL", host.url)
        monkeypatch.setenv("MEZZOTINT_API_KEY", host.first_key or "")
        main_of("watch")("a red apple", str(tmp_path / "apple.png"))
    told = capsys.readouterr().out
    assert "a preview of (32, 32) pixels" in told
    assert "step " in told
    assert (tmp_path / "apple.png").exists()


def test_the_engine_works_offline(tmp_path: Path) -> None:
    save("flux", tmp_path / "model", sizes=[(32, 32)])
    main_of("offline")(str(tmp_path / "model"), str(tmp_path))
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_the_trained_adapter_changes_what_its_model_draws(tmp_path: Path) -> None:
    from mezzotint.engine import Engine, Request
    from mezzotint.spec import AdapterUse

    save("flux", tmp_path / "model")
    main_of("train_lora")(str(tmp_path / "model"), str(tmp_path / "ink.safetensors"), "2")
    engine = Engine.load(str(tmp_path / "model"))
    engine.enable_adapters().add("ink", tmp_path / "ink.safetensors")
    used: tuple[tuple[AdapterUse, ...], ...] = ((), (AdapterUse("ink"),))
    requests = [Request(prompt="a cat", num_inference_steps=2, seed=7, adapters=uses) for uses in used]
    plain, adapted = engine.generate(requests)
    assert adapted.error is None
    assert plain.image is not None
    assert (plain.image != adapted.image).any()


def test_every_example_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert [file.name for file in EXAMPLES.glob("*.py") if f'main_of("{file.stem}")' not in text] == []
