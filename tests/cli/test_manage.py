from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mezzotint.cli.endpoints import calibration_facts, parse_settings
from mezzotint.cli.running import running_on
from mezzotint.cli.top import read_metrics
from mezzotint.client.adapters import split_name
from mezzotint.errors import InvalidRequestError
from mezzotint.server.store.keys import list_keys
from tests.cli.conftest import Run
from tests.conftest import Fake
from tests.serving import serving

DEADLINE_S = 30.0


@pytest.fixture(autouse=True)
def _on_its_data_folder(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_DATA_DIR", str(fake.settings.data_dir))


def wait_for_status(run: Run, id: str, status: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while json.loads(run("endpoints", "list", "--json").stdout)[id]["status"] != status:
        assert time.monotonic() < until, f"{id} did not become {status}"


def test_generate_asks_the_server_on_the_data_folder(run: Run) -> None:
    done = run("generate", "a cat", "--steps", "4", "--seed", "7", "--out", "deep/cat.png", "--no-show")
    assert (done.returncode, done.stdout) == (0, "deep/cat.png\n")
    assert Path("deep/cat.png").read_bytes().startswith(b"\x89PNG")
    again = run("generate", "a cat", "--steps", "4", "--seed", "7", "--out", "again.png", "--no-show")
    assert again.returncode == 0
    assert Path("again.png").read_bytes() == Path("deep/cat.png").read_bytes()


def test_generate_makes_several_and_tells_as_json(run: Run) -> None:
    done = run("generate", "A dog!", "-n", "2", "--seed", "3", "--format", "jpeg", "--json")
    found = json.loads(done.stdout)
    assert [picture["seed"] for picture in found["pictures"]] == [3, 4]
    assert [picture["path"] for picture in found["pictures"]] == ["a-dog-3-0.jpg", "a-dog-3-1.jpg"]
    assert all(Path(picture["path"]).read_bytes().startswith(b"\xff\xd8") for picture in found["pictures"])


def test_generate_can_leave_the_picture_on_the_server(run: Run, fake: Fake) -> None:
    done = run("generate", "a cat", "--format", "url", "--no-show")
    assert done.stdout.startswith(f"{fake.url}/images/")
    assert [file.name for file in Path().iterdir()] == []


def test_the_server_says_what_is_wrong_and_the_status_follows(run: Run) -> None:
    assert run("generate", "a cat", "--steps", "99").returncode == 2
    unknown = run("generate", "a cat", "--endpoint", "emojo")
    assert unknown.returncode == 1
    assert "did you mean emoji?" in unknown.stderr


def test_a_command_leaves_no_key_behind(run: Run, fake: Fake) -> None:
    from mezzotint.cli.reach import key_database

    with key_database(fake.settings) as database:
        before = list_keys(database)
        assert run("generate", "a cat", "--no-show").returncode == 0
        assert run("endpoints", "list").returncode == 0
        assert list_keys(database) == before


def test_a_server_named_without_a_key_is_asked_without_one(run: Run, fake: Fake) -> None:
    refused = run("endpoints", "list", "--server", fake.url)
    assert refused.returncode == 1
    assert "key" in refused.stderr
    assert "does not answer" not in refused.stderr


def test_an_endpoint_is_made_shown_changed_put_to_sleep_and_deleted(run: Run) -> None:
    create = ("endpoints", "create", "second", "--model", "fake:size=8")
    made = run(*create, "--set", "max_rows=2", "--comment", "try")
    assert made.returncode == 0, made.stderr
    wait_for_status(run, "second", "RUNNING")
    assert "second" in run("endpoints", "list").stdout

    shown = json.loads(run("endpoints", "show", "second", "--json").stdout)
    assert shown["settings"]["max_rows"] == 2
    for_people = run("endpoints", "show", "second").stdout
    assert "max_rows" in for_people
    assert f"{datetime.fromtimestamp(shown['created']):%Y-%m-%d %H:%M:%S}" in for_people

    assert run("endpoints", "update", "second", "--set", "max_rows=3").returncode == 0
    wait_for_status(run, "second", "RUNNING")
    assert json.loads(run("endpoints", "show", "second", "--json").stdout)["settings"]["max_rows"] == 3
    assert "try" in run("endpoints", "history", "second").stdout

    for command, status in (("sleep", "SLEEPING"), ("wake", "RUNNING"), ("terminate", "TERMINATED")):
        assert run("endpoints", command, "second").returncode == 0
        wait_for_status(run, "second", status)
    assert run("endpoints", "delete", "second").returncode == 0
    assert "second" not in run("endpoints", "list").stdout


def test_an_endpoint_is_measured_anew_and_says_how_sure_that_is(run: Run) -> None:
    done = run("endpoints", "calibrate", "emoji")
    assert done.returncode == 0, done.stderr
    assert "rows before" in done.stdout
    assert "R has changed" not in done.stderr
    shown = run("endpoints", "show", "emoji").stdout
    assert "sure" in shown
    assert "runs agree within" in shown


def test_what_was_measured_says_how_sure_it_is() -> None:
    row = {"rows": 1.0, "forward_s": 0.0123, "rows_per_s": 81.3, "uncertainty": 0.7}
    facts = calibration_facts("emoji", {"rows": 1, "best_rows": 4, "calibration": [row]})
    assert facts["1 rows"] == "12.3 ms, 81.3 rows/s"
    assert facts["sure"].startswith("no (runs differ by 70%): other programs were busy")
    assert "mezzotint endpoints calibrate emoji" in facts["R by the latest"]
    sure = calibration_facts(
        "emoji", {"rows": 1, "best_rows": 1, "calibration": [row | {"uncertainty": 0.03}]}
    )
    assert sure["sure"] == "yes (runs agree within 3%)"
    assert "R by the latest" not in sure
    assert calibration_facts("emoji", {}) == {}


def test_a_setting_that_does_not_fit_is_refused_by_name(run: Run) -> None:
    done = run("endpoints", "update", "emoji", "--set", "dtype=int8")
    assert done.returncode == 2
    assert "dtype" in done.stderr


def test_settings_are_written_as_in_the_file() -> None:
    assert parse_settings(["replicas=2", "offload=true", "device=cuda:1", 'model="a=b"', "width="]) == {
        "replicas": 2,
        "offload": True,
        "device": "cuda:1",
        "model": "a=b",
        "width": "",
    }
    with pytest.raises(InvalidRequestError, match="NAME=VALUE"):
        parse_settings(["replicas"])


def test_an_unknown_adapter_is_named_with_those_there_are(run: Run) -> None:
    assert run("adapters", "list", "emoji").returncode == 0
    assert run("adapters", "list").stdout.startswith("name")
    unknown = run("adapters", "show", "emoji:nowhere")
    assert unknown.returncode == 1
    assert "no adapter nowhere" in unknown.stderr
    assert run("adapters", "remove", "emoji:nowhere").returncode == 1
    missing = run("adapters", "add", "emoji:ink", "nowhere.safetensors")
    assert missing.returncode in (1, 2)
    assert "nowhere.safetensors" in missing.stderr


def test_an_adapter_is_named_with_its_endpoint() -> None:
    assert split_name("emoji:flat") == ("emoji", "flat")
    for wrong in ("emoji", ":flat", "emoji:", "a:b:c", "a/../b:c"):
        with pytest.raises(InvalidRequestError):
            split_name(wrong)


def test_top_shows_each_endpoint_and_its_rates(run: Run) -> None:
    assert run("generate", "a cat", "--no-show").returncode == 0
    (row,) = json.loads(run("top", "--once", "--json", "--every", "0.2").stdout)
    assert row["endpoint"] == "emoji"
    assert row["state"] == "ready"
    assert row["workers"] == "1/1"
    assert row["queued"] == 0
    assert "emoji" in run("top", "--once", "--every", "0.2").stdout


def test_top_and_show_name_the_machines_of_workers(run: Run) -> None:
    away = ("--model", "fake:size=8,node=10.0.0.7", "--set", "replicas=2")
    assert run("endpoints", "create", "away", *away).returncode == 0
    try:
        wait_for_status(run, "away", "RUNNING")
        until = time.monotonic() + DEADLINE_S
        while "away: 2 on 10.0.0.7" not in (
            lines := run("top", "--once", "--every", "0.2").stdout.splitlines()
        ):
            assert time.monotonic() < until, lines
        assert not any(line.startswith("emoji: ") for line in lines), "its worker is here"
        assert run("endpoints", "show", "away").stdout.count("10.0.0.7") >= 2
    finally:
        run("endpoints", "terminate", "away")
        wait_for_status(run, "away", "TERMINATED")
        run("endpoints", "delete", "away")


def test_top_and_history_say_how_workers_were_scaled_and_why(run: Run) -> None:
    asleep = ("--set", "min_replicas=0", "--set", "scale_down_delay_s=0.5")
    assert run("endpoints", "create", "third", "--model", "fake:size=8", *asleep).returncode == 0
    try:
        assert run("endpoints", "history", "emoji").stdout.count("scaled at") == 0
        wait_for_status(run, "third", "SLEEPING")
        seen = run("top", "--once", "--every", "0.2").stdout.splitlines()
        assert "third: no request for 0.5 s" in seen
        assert not any(line.startswith("emoji: ") for line in seen), "it was never scaled"
        rows = {
            row["endpoint"]: row
            for row in json.loads(run("top", "--once", "--json", "--every", "0.2").stdout)
        }
        assert (rows["third"]["workers"], rows["third"]["scaling"]) == ("0/0", ["no request for 0.5 s"])
        assert rows["emoji"]["scaling"] == []

        assert run("generate", "a cat", "--endpoint", "third", "--no-show").returncode == 0
        wait_for_status(run, "third", "SLEEPING")
        lines = run("endpoints", "history", "third").stdout.splitlines()
        heads = [number for number, line in enumerate(lines) if line.split()[0] in ("version", "scaled")]
        events = [line.split(maxsplit=3)[2:] for line in lines[heads[1] + 1 :]]
        slept, woke = ["0", "no request for 0.5 s"], ["1", "a request came"]
        assert events == [slept, woke, slept], "the newest first"
    finally:
        run("endpoints", "terminate", "third")
        wait_for_status(run, "third", "TERMINATED")
        run("endpoints", "delete", "third")


def test_metrics_are_summed_over_their_other_labels() -> None:
    text = (
        '# HELP x\nmezzotint_requests_total{endpoint="a",outcome="done"} 3.0\n'
        'mezzotint_requests_total{endpoint="a",outcome="failed"} 1.0\n'
        'mezzotint_http_requests_total{route="/",status="200"} 9.0\n'
        'mezzotint_steps_total{endpoint="b"} 1e3\n'
    )
    assert read_metrics(text) == {
        ("mezzotint_requests_total", "a"): 4.0,
        ("mezzotint_steps_total", "b"): 1000.0,
    }


def test_without_a_server_the_managing_commands_say_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEZZOTINT_DATA_DIR", str(tmp_path / "empty"))
    done = run("endpoints", "list")
    assert done.returncode == 3
    assert "mezzotint serve" in done.stderr
    assert not (tmp_path / "empty").exists()


def test_an_address_that_a_dead_server_left_is_no_server(fake: Fake, tmp_path: Path) -> None:
    dead = fake.settings.model_copy(update={"data_dir": tmp_path})
    (tmp_path / "server.json").write_text('{"url": "http://127.0.0.1:1", "pid": 1}')
    assert running_on(dead.data_dir) is None
    found = running_on(fake.settings.data_dir)
    assert found is not None
    assert found.url == fake.url


@pytest.mark.parametrize(
    "answer", [b'{"status": "ok"}', b'{"status": "ok", "proof": "00"}', b"[]", b"<html>"]
)
def test_another_program_on_the_port_of_a_dead_server_is_no_server_and_gets_no_key(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    asked = []

    async def stranger(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            asked.append((scope["path"], dict(scope["headers"]).get(b"authorization")))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": answer})

    with serving(stranger) as url:
        (tmp_path / "server.json").write_text(json.dumps({"url": url, "pid": 1}))
        monkeypatch.setenv("MEZZOTINT_DATA_DIR", str(tmp_path))
        done = run("endpoints", "list")
    assert done.returncode == 3, done.stdout
    assert "no server runs" in done.stderr
    assert asked == [("/healthz", None)]
