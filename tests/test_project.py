"""The project's own files agree with each other: versions are pinned, and every interpreter is tested."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mezzotint

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    lines = [line for group in (PROJECT["dependencies"], *extras) for line in group]
    return [found for found in map(Requirement, lines) if found.name != PROJECT["name"]]


def test_every_dependency_is_pinned_to_a_version_that_is_allowed() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    wanted = requirements()
    assert [found.name for found in wanted if canonicalize_name(found.name) not in pins] == []
    assert [
        found.name for found in wanted if not found.specifier.contains(pins[canonicalize_name(found.name)])
    ] == []


def test_every_python_that_is_allowed_is_tested() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (versions,) = re.findall(r"python: \[(.*)\]", workflow)
    assert PROJECT["requires-python"] == ">=" + versions.split(",")[0].strip('"')
    assert re.findall(r"^ +- run: (.*)", workflow, re.MULTILINE) == [".ci/run"]


def test_the_hooks_need_nothing_but_the_developers_extra() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (.*)", hooks) == ["local"]
    programs = set(re.findall(r"entry: .venv/bin/([\w-]+)", hooks)) - {"python"}
    assert len(programs) == 3
    assert programs <= {found.name for found in requirements()} | {"lint-imports"}  # of import-linter


def test_the_changelog_has_a_section_for_this_version_and_one_for_the_next() -> None:
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[:2] == ["Unreleased", mezzotint.__version__]
