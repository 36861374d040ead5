"""How commands find servers from any folder, and that they make no folders of their own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mezzotint.cli import completion
from mezzotint.cli.hosting import hosted
from mezzotint.cli.running import SERVER_FILE, announced, running_servers, state_folder
from mezzotint.config import EndpointSettings, Settings
from tests.cli.conftest import Run
from tests.cli.test_manage import DEADLINE_S, wait_for_status
from tests.conftest import Fake
from tests.server.work.test_adapters import write


@pytest.fixture
def known(fake: Fake) -> Iterator[Fake]:
    """The fake server, with a record in this test's state folder; its own stays as it was."""
    own = (fake.settings.data_dir / SERVER_FILE).read_text()
    with announced(fake.settings, fake.url, None):
        yield fake
    (fake.settings.data_dir / SERVER_FILE).write_text(own)


def test_commands_find_the_one_server_that_runs_from_any_folder(run: Run, known: Fake) -> None:
    assert "emoji" in run("endpoints", "list").stdout
    done = run("generate", "a cat", "--steps", "2", "--out", "cat.png", "--no-show")
    assert (done.returncode, done.stdout) == (0, "cat.png\n"), done.stderr
    made = run("keys", "create", "from-elsewhere")
    assert made.stdout.startswith("mz_")
    assert "from-elsewhere" in run("keys", "list", "--data-dir", str(known.settings.data_dir)).stdout
    assert run("keys", "revoke", "from-elsewhere").returncode == 0
    assert sorted(path.name for path in Path().iterdir()) == ["cat.png", "state"], "no data folder"


def test_an_adapter_is_uploaded_from_any_folder(run: Run, known: Fake) -> None:
    write(Path("ink.safetensors"))
    added = run("adapters", "add", "emoji:ink", "ink.safetensors", "--scale", "0.5", "--json")
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["source"] == "upload of ink.safetensors"
    command = ("generate", "a cat", "--endpoint", "emoji:ink", "--steps", "2", "--out", "cat.png")
    done = run(*command, "--no-show")
    assert (done.returncode, done.stdout) == (0, "cat.png\n"), done.stderr
    assert run("adapters", "remove", "emoji:ink").returncode == 0


def test_the_shell_is_offered_endpoints_routes_and_formats(run: Run, known: Fake) -> None:
    context = cast(Any, SimpleNamespace(params={}))
    write(Path("ink.safetensors"))
    assert run("adapters", "add", "emoji:ink", "ink.safetensors").returncode == 0
    assert completion.endpoint_ids(context, "em") == ["emoji"]
    assert completion.models(context, "em") == ["emoji", "emoji:ink"]
    assert completion.models(context, "emoji:") == ["emoji:ink"]
    assert completion.formats("j") == ["jpeg", "jpg"]
    assert run("adapters", "remove", "emoji:ink").returncode == 0


def test_nothing_is_offered_where_no_server_runs() -> None:
    assert completion.models(cast(Any, SimpleNamespace(params={})), "") == []


def test_ps_lists_servers_and_endpoints(run: Run, known: Fake) -> None:
    (server,) = json.loads(run("ps", "--json").stdout)
    assert (server["url"], server["pid"]) == (known.url, os.getpid())
    assert [(one["id"], one["state"], one["jobs"]) for one in server["endpoints"]] == [
        ("emoji", "ready", "0")
    ]
    assert known.url in run("ps").stdout


def test_ps_names_the_machines_of_workers(run: Run, known: Fake) -> None:
    away = ("--model", "fake:size=8,node=10.0.0.7", "--set", "replicas=2")
    assert run("endpoints", "create", "away", *away).returncode == 0
    try:
        wait_for_status(run, "away", "RUNNING")
        until = time.monotonic() + DEADLINE_S
        while "  2/2 (2 on 10.0.0.7)  " not in (listed := run("ps").stdout):
            assert time.monotonic() < until, listed
        assert "  1/1  " in next(line for line in listed.splitlines() if line.startswith("emoji"))
    finally:
        run("endpoints", "terminate", "away")
        wait_for_status(run, "away", "TERMINATED")
        run("endpoints", "delete", "away")


def test_without_any_server_ps_says_how_to_start_one(run: Run) -> None:
    done = run("ps")
    assert (done.returncode, done.stdout) == (0, "")
    assert "mezzotint serve" in done.stderr


def test_of_several_servers_one_must_be_named(run: Run, known: Fake, tmp_path: Path) -> None:
    other = Settings(
        port=0, data_dir=tmp_path / "other", endpoints=(EndpointSettings(id="second", model="fake"),)
    )
    with hosted(other, worker="mezzotint.fake_worker:run") as url, announced(other, url, None):
        asked = run("endpoints", "list")
        assert asked.returncode == 2
        assert url in asked.stderr
        assert known.url in asked.stderr
        assert "second" in run("endpoints", "list", "--data-dir", str(other.data_dir)).stdout
    assert "emoji" in run("endpoints", "list").stdout, "one is left"


def test_a_configuration_file_means_its_own_server(run: Run, known: Fake) -> None:
    Path("mezzotint.toml").write_text('[[endpoints]]\nid = "mine"\n')
    done = run("endpoints", "list")
    assert done.returncode == 3
    assert f"({known.url} runs on another data folder)" in done.stderr


def test_the_environment_names_a_server(run: Run, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_URL", fake.url)
    monkeypatch.setenv("MEZZOTINT_API_KEY", fake.key)
    done = run("generate", "a cat", "--steps", "2", "--out", "cat.png", "--no-show")
    assert (done.returncode, done.stdout) == (0, "cat.png\n"), done.stderr


def test_records_of_servers_that_are_gone_are_removed(tmp_path: Path) -> None:
    folder = state_folder()
    folder.mkdir(parents=True)
    (folder / "gone").write_text(str(tmp_path / "gone"))
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    (crashed / SERVER_FILE).write_text('{"url": "http://127.0.0.1:1", "pid": 999999999, "data_dir": "x"}')
    (folder / "crashed").write_text(str(crashed))
    assert running_servers() == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [["keys", "list"], ["keys", "create", "x"], ["endpoints", "list"], ["ps"], ["adapters", "list"], ["top"]],
)
def test_no_command_but_serve_and_generate_makes_a_data_folder(run: Run, command: list[str]) -> None:
    done = run(*command)
    assert "mezzotint serve" in done.stderr
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "emojo"], "model 'emojo' was not found"),
        (["--model", "nowhere/model.safetensors"], "was not found"),
        (["--model", "."], "no diffusers pipeline"),
    ],
)
def test_a_model_that_is_not_there_stops_the_start(run: Run, arguments: list[str], said: str) -> None:
    done = run("serve", "--port", "0", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_a_configured_adapter_that_is_missing_stops_the_start(run: Run) -> None:
    Path("mezzotint.toml").write_text(
        '[[endpoints]]\nid = "emoji"\n[[endpoints.adapters]]\nroute = "ink"\nsource = "ink.safetensors"\n'
    )
    done = run("serve", "--port", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mezzotint: endpoint emoji, adapter ink: source 'ink.safetensors' was not")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [""],
        ["two\nlines"],
        ["x" * 101],
        ["mz_abcdefgh"],
        ["x", "--admin", "--endpoint", "emoji"],
        ["x", "--endpoint", "emojo"],
        ["x", "--endpoint", "emoji:flat"],
        ["x", "--requests-per-minute", "0"],
        ["x", "--requests-per-minute", "nan"],
        ["x", "--step-seconds-per-day", "-1"],
        ["x", "--weight", "inf"],
        ["x", "--weight", "0"],
        ["x", "--priority", "11"],
    ],
)
def test_keys_create_refuses_nonsense(run: Run, known: Fake, arguments: list[str]) -> None:
    done = run("keys", "create", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mezzotint: --"), done.stderr


@pytest.mark.parametrize("command", [["-h"], ["generate", "-h"], ["endpoints", "list", "-h"]])
def test_help_is_short_too(run: Run, command: list[str]) -> None:
    assert "Usage:" in run(*command).stdout
