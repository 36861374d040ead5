"""`fake`: one server for the whole run, on real HTTP, whose worker paints without a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from mezzotint.config import EndpointSettings, Settings


@dataclass(frozen=True)
class Fake:
    """Where it is, with a key for its endpoint `emoji`; commands find it on its data folder."""

    url: str
    settings: Settings
    key: str


@pytest.fixture(scope="session", autouse=True)
def _own_state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither see nor leave records of servers among those of the user who runs them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    from mezzotint.cli.hosting import hosted
    from mezzotint.cli.reach import passing_key
    from mezzotint.cli.running import announced

    settings = Settings(
        port=0,
        data_dir=tmp_path_factory.mktemp("data"),
        endpoints=(EndpointSettings(id="emoji", model="fake:step_s=0.0001,size=32"),),
    )
    with (
        hosted(settings, worker="mezzotint.fake_worker:run") as url,
        passing_key(settings) as key,
        announced(settings, url, None),
    ):
        yield Fake(url, settings, key)
