"""Code that comes with a model: it runs only where the operator has named the source and its version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from mezzotint.engine.models import loading, remote_code
from mezzotint.errors import ModelLoadError
from mezzotint.spec import EngineSettings
from tests.attacks import attack
from tests.engine import fake_hub
from tests.engine.models.test_loading import REPOSITORY, flux, hub, one_thread, point_at

__all__ = ["flux", "hub", "one_thread", "point_at"]

CODE = """
from pathlib import Path
from diffusers import FluxPipeline

Path({trace!r}).write_text("ran")


class Mine(FluxPipeline):
    pass
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A file that the model's own code writes when it runs."""
    return tmp_path / "trace"


@pytest.fixture
def own_code(flux: Path, tmp_path: Path, trace: Path) -> Path:
    folder = Path(shutil.copytree(flux, tmp_path / "model"))
    give_code(folder, trace)
    return folder


def give_code(folder: Path, trace: Path) -> None:
    (folder / "pipeline.py").write_text(CODE.format(trace=str(trace)))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Mine"]}))


def load(source: str | Path, permission: str | None) -> loading.Loaded:
    settings = {"num_threads": 1, "dtype": "fp32", "performance": "reference"}
    return loading.load(source, EngineSettings(allow_remote_code=permission, **settings))


def refusal(source: str | Path, permission: str | None) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(source, permission)
    assert caught.value.code == "remote_code"
    return caught.value.message


def permission_in(message: str) -> str:
    """What the refusal says to write into the configuration file."""
    written: str = json.loads(message.partition("allow_remote_code = ")[2].partition(" in the")[0])
    return written


@attack(
    "A model folder with a Python class of its own, without permission",
    outcome="refused before anything runs; the refusal names what to permit",
)
def test_the_refusal_says_how_to_permit_a_pipeline_class_of_the_folder(own_code: Path, trace: Path) -> None:
    message = refusal(own_code, None)
    assert not trace.exists()
    loaded = load(own_code, permission_in(message))
    assert type(loaded.pipe).__name__ == "Mine"
    assert trace.exists()


CHANGES: dict[str, Callable[[Path], object]] = {
    "its code": lambda at: (at / "pipeline.py").write_text((at / "pipeline.py").read_text() + "\n"),
    "more code": lambda at: (at / "transformer" / "more.py").write_text("pass"),
    "its configuration": lambda at: (at / "vae" / "config.json").write_text(
        (at / "vae" / "config.json").read_text() + "\n"
    ),
}


@attack("Changing permitted code after the permission was given", outcome="the permission has ended; refused")
@pytest.mark.parametrize("change", CHANGES)
def test_a_permission_ends_when_the_folder_changes(own_code: Path, trace: Path, change: str) -> None:
    permission = permission_in(refusal(own_code, None))
    CHANGES[change](own_code)
    refusal(own_code, permission)
    assert not trace.exists()


@attack("A permission for one folder used for another one", outcome="refused")
def test_a_permission_is_for_one_folder(own_code: Path, tmp_path: Path, trace: Path) -> None:
    permission = permission_in(refusal(own_code, None))
    other = Path(shutil.copytree(own_code, tmp_path / "other"))
    refusal(other, permission)
    assert not trace.exists()


@attack("A repository moves its branch to other code", outcome="refused: the permission names a commit")
def test_a_permission_for_a_repository_names_the_commit(
    hub: fake_hub.FakeHub, own_code: Path, trace: Path
) -> None:
    hub.folders[REPOSITORY] = own_code
    permission = permission_in(refusal(REPOSITORY, None))
    assert permission.startswith(f"{REPOSITORY}@")
    stale = permission[:-1] + ("0" if permission[-1] != "0" else "1")
    refusal(REPOSITORY, stale)
    assert not trace.exists()
    assert type(load(REPOSITORY, permission).pipe).__name__ == "Mine"
    assert trace.exists()


@attack("Permitted configuration that refers to code in a third repository", outcome="refused")
def test_permitted_code_brings_in_no_code_of_another_repository(own_code: Path) -> None:
    config = own_code / "transformer" / "config.json"
    values = json.loads(config.read_text()) | {"auto_map": {"AutoModel": "evil/other--model.Model"}}
    config.write_text(json.dumps(values))
    permission = remote_code.permission_for(str(own_code), own_code)
    assert "another repository" in refusal(own_code, permission)


@pytest.mark.parametrize("value", [True, "owner/name", "owner/name@main", "@" + "0" * 40, ""])
def test_a_permission_that_names_no_version_is_refused(value: object) -> None:
    with pytest.raises(ValidationError, match="allow_remote_code"):
        EngineSettings.model_validate({"allow_remote_code": value})


def test_the_earlier_no_is_no_permission() -> None:
    assert EngineSettings.model_validate({"allow_remote_code": False}).allow_remote_code is None
