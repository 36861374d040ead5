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


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    from mezzotint.cli.hosting import address_file, hosted
    from mezzotint.cli.reach import SERVER_FILE, passing_key

    settings = Settings(
        port=0,
        data_dir=tmp_path_factory.mktemp("data"),
        endpoints=(EndpointSettings(id="emoji", model="fake:step_s=0.0001,size=32"),),
    )
    with (
        passing_key(settings) as key,
        hosted(settings, worker="mezzotint.fake_worker:run") as url,
        address_file(settings.data_dir / SERVER_FILE, url),
    ):
        yield Fake(url, settings, key)
