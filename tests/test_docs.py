"""The pages are true: code runs, examples parse, modules and dependencies are named, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer

from mezzotint.cli import app, main
from mezzotint.cli.hosting import welcome
from mezzotint.config import Settings, load_settings
from mezzotint.errors import MezzotintError
from mezzotint.schemas import ErrorBody, ImageGenerationAnswer, parse_body
from tests.conftest import Fake

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PNG = b"\x89PNG"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_table_of_attacks_is_long_and_says_each_once() -> None:
    rows = re.findall(
        r"^\| (.+) \| (.+) \| `(.+)::(test_.+)` \|$", (ROOT / "docs" / "security.md").read_text(), re.M
    )
    assert len(rows) >= 80
    assert len({what for what, *_ in rows}) == len(rows)
    assert all((ROOT / "tests" / file).is_file() for *_, file, _ in rows)


@pytest.fixture(autouse=True)
def _empty_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def test_the_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_curl_line_of_the_readme_ends_in_a_picture_file(fake: Fake) -> None:
    (block,) = (text for text in blocks("README.md", "sh") if "curl" in text)
    run_curl(block.replace("http://127.0.0.1:8000", fake.url), fake)


def test_the_curl_line_that_serve_prints_ends_in_a_picture_file(fake: Fake) -> None:
    printed = welcome(fake.settings, fake.url, None)
    run_curl(printed.partition("A first request:")[2], fake)


def run_curl(command: str, fake: Fake) -> None:
    """Runs a printed command as it stands, in the working folder."""
    environment = os.environ | {"MEZZOTINT_API_KEY": fake.key}
    done = subprocess.run(
        ["sh", "-c", command], env=environment, text=True, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ImageGenerationAnswer.model_validate_json(done.stderr).data[0].url
    assert Path("picture.png").read_bytes().startswith(PNG)


def test_the_python_of_the_readme_saves_a_picture(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_API_KEY", fake.key)
    (block,) = (text for text in blocks("README.md", "python") if "Client" in text)
    scope: dict[str, object] = {}
    exec(block.replace("http://127.0.0.1:8000", fake.url), scope)
    assert Path("apple.png").read_bytes().startswith(PNG)
    scope["client"].close()  # type: ignore[attr-defined]


def test_the_library_example_of_the_readme_runs(tmp_path: Path) -> None:
    from tests.engine.tiny import save

    save("flux", tmp_path / "model", sizes=[(32, 32)])
    (block,) = (text for text in blocks("README.md", "python") if "Engine" in text)
    scope: dict[str, object] = {}
    exec(block.replace('"emoji"', repr(str(tmp_path / "model"))), scope)
    results = scope["results"]
    assert isinstance(results, list)
    assert [result.error for result in results] == [None, None]
    assert all(result.image.shape[2] == 3 for result in results)


def test_the_generate_line_of_the_readme_makes_its_file(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_API_KEY", fake.key)
    (block,) = (text for text in blocks("README.md", "sh") if "mezzotint generate" in text)
    run_command(monkeypatch, *shlex.split(block), "--server", fake.url)
    assert Path("apple.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("line", [text for text in blocks("README.md", "sh") if "mezzotint serve" in text])
def test_the_serve_lines_of_the_readme_are_accepted(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_command(monkeypatch, *shlex.split(line), "--print-config")


@pytest.mark.parametrize("page", ["README.md", "docs/settings.md"])
def test_configuration_examples_load(page: str) -> None:
    texts = blocks(page, "toml")
    assert texts
    for text in texts:
        Path("example.toml").write_text(text)
        assert load_settings(Path("example.toml"), environment={}).endpoints[1].id == "flux"


def test_the_json_of_the_http_page_follows_the_contract() -> None:
    request, answer, error = blocks("docs/http.md", "json")
    assert parse_body(request.encode()).num_inference_steps == 8
    assert ImageGenerationAnswer.model_validate_json(answer).data[0].seed == 7
    assert ErrorBody.model_validate_json(error).error.code == "out_of_range"


def test_the_architecture_page_names_every_folder_and_no_other() -> None:
    package = ROOT / "src" / "mezzotint"
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"^\| `([a-z0-9_/.]+)` \|", text, re.MULTILINE)
    folders = {file.parent.relative_to(package).as_posix() for file in package.rglob("*.py")}
    assert sorted(named) == sorted("." if folder == "." else f"{folder}/" for folder in folders)


def test_the_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = {name for name in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if "NAME" not in name}
    package = ROOT / "src" / "mezzotint"
    assert len(files) > 20
    assert [name for name in sorted(files) if not ((ROOT / name).exists() or (package / name).exists())] == []


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = {re.split(r"[\[<>=]", line)[0] for lines in (project["dependencies"], *extras) for line in lines}
    text = (ROOT / "docs" / "decisions.md").read_text().lower()
    assert [name for name in sorted(wanted - {"mezzotint"}) if name not in text] == []


def test_troubleshooting_knows_every_error_code() -> None:
    classes: list[type[MezzotintError]] = [MezzotintError, *MezzotintError.__subclasses__()]
    codes = {code for cls in classes for code in cls.codes}
    assert len(codes) > 50
    named = set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs" / "troubleshooting.md").read_text()))
    assert codes - named == set()


def test_the_deployment_files_name_settings_that_exist() -> None:
    texts = "".join(file.read_text() for file in (ROOT / "deploy").rglob("*") if file.is_file())
    names = {name.lower() for name in re.findall(r"MEZZOTINT_([A-Z_]+)", texts)}
    assert names
    assert names <= set(Settings.model_fields)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_openapi_page_and_the_http_page_name_the_same_addresses(
    fake: Fake,
) -> None:
    paths = json.loads(httpx2.get(f"{fake.url}/openapi.json").content)["paths"]
    text = (ROOT / "docs" / "http.md").read_text()
    for path in paths:
        first = path.split("{")[0].rstrip("/")
        if path.startswith("/sdapi/"):  # what each of these does is the web UI's to say
            first = "/sdapi/v1/"
        assert first in text, f"{path} is not on the page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_the_pages_have_the_flags_that_they_use(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    texts = "".join(blocks(str(page.relative_to(ROOT)), "(?:sh|bash)"))
    for line in re.findall(r"^(?:\S*/)?mezzotint (.*)", texts.replace("\\\n", " "), re.MULTILINE):
        words = shlex.split(line.partition(" | ")[0].partition(" && ")[0], comments=True)
        command = root
        while hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        flags = {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)}
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert used <= flags, line


def test_every_test_that_the_pages_name_is_there() -> None:
    there = set(
        re.findall(r"def (test_\w+)", "".join(file.read_text() for file in ROOT.glob("tests/**/test_*.py")))
    )
    for page in PAGES:
        missing = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))) - there
        assert not missing, f"{page.name} names tests that are not there: {sorted(missing)}"
