"""`run`: a command in this process. `fake`: a server that paints without a model, on a data folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mezzotint.cli import main
from mezzotint.config import EndpointSettings, Settings


@pytest.fixture(autouse=True)
def _empty_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MEZZOTINT_")]:
        monkeypatch.delenv(name)


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `mezzotint ARGUMENTS` in this process."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mezzotint", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run


@dataclass(frozen=True)
class Fake:
    url: str
    settings: Settings


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    from mezzotint.cli.hosting import address_file, hosted
    from mezzotint.cli.reach import SERVER_FILE, passing_key

    settings = Settings(
        port=0,
        data_dir=tmp_path_factory.mktemp("data"),
        endpoints=(EndpointSettings(id="emoji", model="fake:step_s=0.0001,size=32"),),
    )
    with (
        passing_key(settings),
        hosted(settings, worker="mezzotint.fake_worker:run") as url,
        address_file(settings.data_dir / SERVER_FILE, url),
    ):
        yield Fake(url, settings)
