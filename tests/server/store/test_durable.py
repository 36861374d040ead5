"""What is promised is on the disk, and one server owns its data folder."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from mezzotint.errors import ConfigError, InvalidRequestError
from mezzotint.images import Parameters
from mezzotint.server.store import adapter_files, database, durable
from mezzotint.server.store.adapter_files import copy_source
from mezzotint.server.store.folder import Folder
from mezzotint.server.store.pictures import Pictures
from mezzotint.server.store.signing import load_signer
from mezzotint.spec import ImageSpec
from tests.attacks import attack
from tests.server.hosting import hosting, settings_for

MAX_BYTES = 2**20


@attack("Two servers on one data folder", outcome="the second one stops with a sentence; nothing is deleted")
def test_a_second_server_on_a_data_folder_does_not_start(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path)) as host:
        with (
            pytest.raises(ConfigError, match="another server uses"),
            durable.owned(tmp_path / "data", shared=False),
        ):
            pass
        with pytest.raises(ConfigError), durable.owned(tmp_path / "data", shared=True):
            pass
        assert host.post().status_code == 200
    with durable.owned(tmp_path / "data", shared=True), durable.owned(tmp_path / "data", shared=True):
        pass


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to files, in order."""
    events: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def on_audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and watching:
            events.append(f"rename {Path(str(arguments[1])).name}")

    watching = [True]
    sys.addaudithook(on_audit)
    monkeypatch.setattr(os, "fsync", noted)
    return events


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@attack("Power loss right after an answer with a URL", outcome="the picture was synced before the answer")
def test_a_picture_is_on_the_disk_before_its_url_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = database.open_database(f"sqlite:///{tmp_path / 'x.db'}")
    pictures = Pictures(engine, Folder(tmp_path), load_signer(tmp_path), 60, 0, 0)
    events = recorded(monkeypatch)
    name = pictures.save(b"x", ".png", "key", Parameters("one", ImageSpec(prompt="a", num_inference_steps=1)))
    engine.dispose()
    assert events == [f"sync {name}.part", f"rename {name}", f"sync {tmp_path.name}"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@attack("Power loss right after an adapter was added", outcome="its file was synced before the answer")
def test_an_adapter_is_on_the_disk_before_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_safetensors(tmp_path / "a.safetensors", {"x.lora_A.weight": tensor([2, 2])})
    events = recorded(monkeypatch)
    kept = copy_source(str(source), tmp_path / "kept", MAX_BYTES).path
    assert events == [
        f"sync {kept.name}", f"rename {kept.parent.name}", f"sync {kept.parent.name}", "sync kept",
    ]  # fmt: skip


# ------------------------------------------------------------ adapter files made to break the reader


def tensor(shape: Any, size: int = 16, **fields: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, size]} | fields


def write_safetensors(path: Path, header: dict[str, Any], size: int = 16) -> Path:
    import json

    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


@attack("An adapter whose header is no table of tensors", outcome="422 adapter_broken")
@pytest.mark.parametrize(
    "header",
    [
        {"x.lora_A.weight": tensor(["a", 1])},
        {"x.lora_A.weight": tensor([[1], 1])},
        {"x.lora_A.weight": tensor([2.5, 1])},
        {"x.lora_A.weight": tensor([-1, 1])},
        {"x.lora_A.weight": tensor([10**30, 1])},
        {"x.lora_A.weight": tensor("ab")},
        {"x.lora_A.weight": tensor(None)},
        {"x.lora_A.weight": tensor([2, 2], data_offsets=["a", 16])},
        {"x.lora_A.weight": tensor([2, 2], data_offsets=[True, 16])},
        {"x.lora_A.weight": tensor([2, 2], dtype=5)},
        {"x.lora_A.weight": 7},
        {"x.lora_A.weight": {}},
    ],
)
def test_a_header_that_is_no_table_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    source = write_safetensors(tmp_path / "a.safetensors", header)
    with pytest.raises(InvalidRequestError) as caught:
        copy_source(str(source), tmp_path / "kept", MAX_BYTES)
    assert caught.value.code == "adapter_broken"


@attack("An adapter with a header of tens of megabytes", outcome="422 before it is read")
def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    length = adapter_files.MAX_HEADER_BYTES + 1
    source = tmp_path / "a.safetensors"
    with source.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(length + 100)
    with pytest.raises(InvalidRequestError, match="header is longer") as caught:
        copy_source(str(source), tmp_path / "kept", 2 * length)
    assert caught.value.code == "adapter_broken"


@attack("A huge adapter_config.json beside an adapter", outcome="422 adapter_too_large")
def test_a_huge_configuration_is_not_read(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "adapter_model.safetensors", {"x.lora_A.weight": tensor([2, 2])})
    with (tmp_path / "adapter_config.json").open("wb") as file:
        file.truncate(adapter_files.MAX_CONFIG_BYTES + 1)
    with pytest.raises(InvalidRequestError) as caught:
        copy_source(str(tmp_path), tmp_path / "kept", MAX_BYTES)
    assert caught.value.code == "adapter_too_large"


@attack("An adapter source that is a pipe nobody writes to", outcome="422; nothing waits for it")
def test_a_pipe_is_no_adapter(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(InvalidRequestError, match="is no file"):
        copy_source(str(tmp_path / "a.safetensors"), tmp_path / "kept", MAX_BYTES)


# ------------------------------------------------------------ Postgres


@attack("A Postgres that is frozen", outcome="503 within seconds, then as before; SIGTERM ends the server")
def test_a_frozen_postgres_holds_nobody_up_for_ever(
    tmp_path: Path, new_postgres: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mezzotint.server.threads.DATABASE.limit_s", 0.5)
    url = new_postgres()
    with hosting(settings_for(tmp_path, database_url=url)) as host:
        assert host.post().status_code == 200
        with host.service.engine.connect() as connection:
            pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
        postmaster = psutil.Process(pid).parent()
        assert postmaster is not None
        frozen = [postmaster, *postmaster.children()]
        try:
            for process in frozen:
                process.send_signal(signal.SIGSTOP)
            for _ in range(3):
                answer = host.post()
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
            assert host.client.get("/healthz").status_code == 200
        finally:
            for process in frozen:
                process.send_signal(signal.SIGCONT)
        host.until(lambda: host.service.engine.pool is not None)
        assert host.post().status_code in (200, 503)
