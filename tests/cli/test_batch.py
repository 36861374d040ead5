from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from mezzotint.cli.batch import read_prompts
from mezzotint.errors import InvalidRequestError
from tests.cli.conftest import Run
from tests.conftest import Fake


@pytest.fixture(autouse=True)
def _on_its_data_folder(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_DATA_DIR", str(fake.settings.data_dir))


def manifest() -> list[dict[str, object]]:
    return [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]


def test_a_file_of_prompts_becomes_a_folder_of_pictures(run: Run) -> None:
    Path("prompts.txt").write_text('a cat\n\n{"prompt": "a dog", "num_inference_steps": 2, "seed": 99}\n')
    done = run("generate", "--prompts", "prompts.txt", "--seed", "5", "--steps", "4", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["out/00001-a-cat.png", "out/00003-a-dog.png"]
    assert {(line["line"], line["seed"]) for line in manifest()} == {(0, 5), (2, 99)}


def test_a_stopped_run_makes_only_what_is_missing(run: Run) -> None:
    Path("prompts.txt").write_text("a cat\na dog\na cow\n")
    arguments = ("generate", "--prompts", "prompts.txt", "--steps", "2", "--out", "out")
    assert run(*arguments).returncode == 0
    first = Path("out/00001-a-cat.png").read_bytes()
    Path("out/00002-a-dog.png").unlink()
    lines = Path("out/manifest.jsonl").read_text().splitlines()
    kept = [text for text in lines if "a cow" not in text]
    Path("out/manifest.jsonl").write_text("\n".join([*kept, '{"line": 2, "re']))
    again = run(*arguments)
    assert sorted(again.stdout.split()) == ["out/00002-a-dog.png", "out/00003-a-cow-2.png"]
    assert "3 requests, 1 done before" in again.stderr
    assert Path("out/00001-a-cat.png").read_bytes() == first
    assert run(*arguments).stdout == ""


def test_a_file_that_has_changed_is_taken_up_by_its_content(run: Run) -> None:
    Path("prompts.txt").write_text("a cat\na dog\n")
    arguments = ("generate", "--prompts", "prompts.txt", "--steps", "2", "--seed", "7", "--out", "out")
    assert run(*arguments).returncode == 0
    kept = {path.name: path.read_bytes() for path in Path("out").glob("*.png")}
    Path("prompts.txt").write_text("a cow\n\na dog\na cat\na dog\n")
    again = run(*arguments)
    assert sorted(again.stdout.split()) == ["out/00001-a-cow.png", "out/00005-a-dog.png"]
    assert "4 requests, 2 done before" in again.stderr
    assert all(Path("out", name).read_bytes() == data for name, data in kept.items())
    assert [line["seed"] for line in manifest()][-2:] in ([7, 8], [8, 7]), "a line that repeats another"


def test_prompts_are_read_from_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\n"))
    done = run("generate", "--prompts", "-", "--steps", "2", "--out", "out")
    assert (done.returncode, done.stdout) == (0, "out/00001-a-cat.png\n")
    nowhere = run("generate", "--prompts", "-")
    assert (nowhere.returncode, "--out FOLDER" in nowhere.stderr) == (2, True)


def test_a_picture_named_after_its_prompt_overwrites_no_other(run: Run) -> None:
    command = ("generate", "a cat", "--seed", "3", "--no-show", "--steps")
    assert run(*command, "2").stdout == run(*command, "2").stdout == "a-cat-3.png\n"
    first = Path("a-cat-3.png").read_bytes()
    assert run(*command, "3").stdout == "a-cat-3-2.png\n"
    assert Path("a-cat-3.png").read_bytes() == first


def test_other_settings_are_other_requests(run: Run) -> None:
    Path("prompts.txt").write_text("a cat\n")
    assert run("generate", "--prompts", "prompts.txt", "--steps", "2", "--out", "out").returncode == 0
    again = run("generate", "--prompts", "prompts.txt", "--steps", "3", "--out", "out")
    assert again.stdout == "out/00001-a-cat-2.png\n", "nothing is overwritten"


def test_every_line_is_checked_before_the_first_is_sent(run: Run) -> None:
    Path("prompts.txt").write_text('a cat\n{"prompt": "a dog", "num_inference_steps": 99}\n')
    done = run("generate", "--prompts", "prompts.txt", "--out", "out")
    assert done.returncode == 2
    assert "line 2: num_inference_steps" in done.stderr
    assert not Path("out").exists()


def test_a_request_that_fails_is_told_with_its_line_and_the_others_are_made(run: Run) -> None:
    Path("prompts.txt").write_text("a cat\na dog !fail@1\n")
    done = run("generate", "--prompts", "prompts.txt", "--steps", "3", "--out", "out")
    assert done.returncode == 1
    assert "line 2: " in done.stderr
    assert done.stdout == "out/00001-a-cat.png\n"


def test_either_a_prompt_or_a_file(run: Run) -> None:
    assert run("generate").returncode == 2
    assert run("generate", "a cat", "--prompts", "prompts.txt").returncode == 2


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="nowhere"):
        read_prompts(tmp_path / "nowhere", {})
    (tmp_path / "broken").write_text('a cat\n{"prompt": }\n')
    with pytest.raises(InvalidRequestError, match="line 2: is no JSON object"):
        read_prompts(tmp_path / "broken", {})
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(InvalidRequestError, match="no prompt in it"):
        read_prompts(tmp_path / "empty", {})
