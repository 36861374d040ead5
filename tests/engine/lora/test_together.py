"""Several adapters in one request: what diffusers makes of them, and the same bytes in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.engine import AdapterUse, Engine, Request
from mezzotint.errors import NotFoundError
from tests.engine import tiny
from tests.engine.adapter_files import ATTENTION, FEED_FORWARD, LAYOUTS, pairs, peft, write
from tests.engine.conftest import same_alone_and_together
from tests.engine.lora.test_bank import TOLERANCE, bank_of, everywhere, leased, picture

USES = (AdapterUse("a", 0.5), AdapterUse("b", -1.5))

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of Flux with different layers and ranks, some layers in both."""
    folder, model = tmp_path_factory.mktemp("two"), tiny.build("flux").transformer
    return {
        route: write(
            peft("transformer.", pairs(model, pattern, rank=rank, seed=rank)), folder / f"{route}.safetensors"
        )
        for route, pattern, rank in (("a", ATTENTION, 4), ("b", f"{ATTENTION}|{FEED_FORWARD}", 18))
    }


@pytest.mark.parametrize("name", ["flux", "stable-diffusion"])
def test_two_together_give_what_diffusers_gives(name: str, tmp_path: Path) -> None:
    files = [
        write(LAYOUTS[name, "kohya"](tiny.build(name), seed), tmp_path / f"{seed}.safetensors")
        for seed in (1, 2)
    ]
    theirs = tiny.build(name)
    for route, file in zip("ab", files, strict=True):
        theirs.load_lora_weights(str(file), adapter_name=route)
    theirs.set_adapters(["a", "b"], [use.scale for use in USES])
    pipe = tiny.build(name)
    bank = bank_of(pipe)
    for route, file in zip("ab", files, strict=True):
        bank.add(route, file)
    with everywhere(bank, leased(bank, bank.name_of(USES))):
        found = picture(pipe, name)
    with everywhere(bank, leased(bank, "a", 0.5)):
        one = picture(pipe, name)
    assert abs(found - picture(theirs, name)).max() < TOLERANCE
    assert abs(found - one).max() > 0.02, "the second one changes the picture"


def request(*uses: AdapterUse, seed: int = 1) -> Request:
    return Request(
        prompt="a red fox", num_inference_steps=2, seed=seed, width=32, height=32, adapters=uses,
        extra={"max_sequence_length": 32},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_several_adapters_keep_their_bytes_among_others(dtype: Any, files: dict[str, Path]) -> None:
    engine = Engine(tiny.build("flux", dtype), batching="exact", rows=4)
    for route, file in files.items():
        engine.enable_adapters().add(route, file)
    a, b = AdapterUse("a"), AdapterUse("b")
    wanted = [
        request(),
        request(a),
        request(*USES),
        request(b),
        request(a, b),
        request(*USES, seed=2),
        request(b, a),
    ]
    same_alone_and_together(engine, wanted)
    engine.close()


def test_an_adapter_that_is_replaced_or_removed_is_no_longer_part_of_any(files: dict[str, Path]) -> None:
    pipe = tiny.build("flux")
    bank = bank_of(pipe)
    for route, file in files.items():
        bank.add(route, file)
    name = bank.name_of(USES)
    bank.prefetch(name)
    lease = leased(bank, name)
    with everywhere(bank, lease):
        before = picture(pipe, "flux")
    assert bank.stats().resident_routes == [], "it is no route"
    bank.add("b", files["a"])
    with everywhere(bank, leased(bank, name)):
        assert (picture(pipe, "flux") != before).any()
    with everywhere(bank, lease):
        assert (picture(pipe, "flux") == before).all(), "who holds it keeps it"
    bank.remove("b")
    with pytest.raises(NotFoundError):
        bank.name_of(USES)
    with pytest.raises(NotFoundError):
        bank.acquire(name)
