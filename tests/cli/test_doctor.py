"""What `doctor` makes of a machine's facts and of the settings."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from mezzotint.cli.doctor import judge_compiler, judge_disk, judge_model, judge_port, judge_threads
from mezzotint.config import EndpointSettings, Settings
from mezzotint.engine.models.doctor import model_facts
from tests.engine.tiny import save

GIB = 2**30


def facts(**more: Any) -> dict[str, Any]:
    return {
        "device": "cpu",
        "dtype": "bf16",
        "gpus": [],
        "memory": {"available_bytes": 8 * GIB, "total_bytes": 16 * GIB},
        "cpu": {"usable_cores": 4},
        "load": 0.5,
    } | more


@pytest.mark.parametrize(
    ("needed", "verdict", "said"),
    [
        (GIB, "ok", "8.0 GiB are free"),
        (12 * GIB, "no", "stop other programs"),
        (32 * GIB, "no", "a larger machine"),
        (None, "warning", "mezzotint pull owner/name"),
    ],
)
def test_a_model_is_judged_by_the_free_memory(needed: int | None, verdict: str, said: str) -> None:
    asked = {"source": "owner/name", "needed_bytes": needed, "reason": "it is not on this disk"}
    check = judge_model(asked, facts())
    assert (check.verdict, said in check.text) == (verdict, True), check


def test_a_model_that_can_mean_nothing_is_no() -> None:
    asked = {"source": "emojo", "needed_bytes": None, "reason": "it is not on this disk"}
    assert judge_model(asked, facts()).verdict == "no"


def test_a_gpu_is_judged_by_its_own_memory() -> None:
    gpu = {"available_bytes": 80 * GIB, "total_bytes": 80 * GIB}
    asked = {"source": "x", "needed_bytes": 40 * GIB, "reason": ""}
    assert judge_model(asked, facts(gpus=[gpu], device="cuda:0")).verdict == "ok"


@pytest.mark.parametrize(
    ("endpoints", "load", "verdict", "said"),
    [
        ([{}], 0.5, "ok", "4 threads of workers on 4 cores"),
        ([{"replicas": 2}], 0.5, "warning", "num_threads = 2"),
        ([{"num_threads": 1}, {"num_threads": 1}], 0.5, "ok", "2 threads"),
        ([{}], 9.0, "warning", "other programs keep 9 more busy"),
    ],
)
def test_threads_are_judged_by_the_cores(
    endpoints: list[dict[str, Any]], load: float, verdict: str, said: str
) -> None:
    settings = Settings(endpoints=tuple(EndpointSettings(id=f"e{n}", **e) for n, e in enumerate(endpoints)))
    check = judge_threads(facts(load=load), settings)
    assert (check.verdict, said in check.text) == (verdict, True), check


@pytest.mark.parametrize(
    ("performance", "compiler", "device", "verdict", "said"),
    [
        ("max", None, "cpu", "warning", "painter with performance"),
        ("auto", None, "cpu", "ok", "would need one"),
        ("max", "/usr/bin/g++", "cpu", "ok", "/usr/bin/g++"),
        ("max", None, "cuda:0", "ok", "cuda:0"),
    ],
)
def test_a_compiler_is_missed_only_where_one_is_asked_for(
    performance: Any, compiler: str | None, device: str, verdict: str, said: str
) -> None:
    settings = Settings(endpoints=(EndpointSettings(id="painter", model="x", performance=performance),))
    check = judge_compiler(facts(cpp_compiler=compiler, device=device), settings)
    assert (check.verdict, said in check.text) == (verdict, True), check


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert judge_port(Settings(port=port, data_dir=tmp_path)).verdict == "no"
    assert judge_port(Settings(port=port, data_dir=tmp_path)).verdict == "ok"


def test_the_disk_is_that_of_the_folder_that_would_be_made(tmp_path: Path) -> None:
    check = judge_disk(tmp_path / "not" / "yet")
    assert "GiB free" in check.text
    assert list(tmp_path.iterdir()) == []


def test_what_a_model_takes_is_read_from_its_headers(tmp_path: Path) -> None:
    save("flux", tmp_path / "model")
    half = model_facts(str(tmp_path / "model"), "bf16")["needed_bytes"]
    whole = model_facts(str(tmp_path / "model"), "fp32")["needed_bytes"]
    assert whole == pytest.approx(2 * half, abs=2)
    assert model_facts("emoji", "bf16")["needed_bytes"] > 2**20
    assert model_facts("owner/name", "bf16")["needed_bytes"] is None
    (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    assert "cannot be read" in model_facts(str(tmp_path / "model"), "bf16")["reason"]
