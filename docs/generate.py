"""Writes the pages and tables that the program itself knows: settings, command line, errors, attacks.

python docs/generate.py            writes docs/settings.md, docs/cli.md, the tables of docs/http.md, that of
                                   docs/security.md, and those of docs/models.md from docs/families.json
python docs/generate.py --check    changes nothing; exit status 1 when one of them is out of date
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import typer

from mezzotint import errors
from mezzotint.cli import app
from mezzotint.config import AdapterSettings, EndpointSettings, Settings, default_text
from mezzotint.spec import ControlNetSettings, Table

DOCS = Path(__file__).parent
TESTS = DOCS.parent / "tests"
_NOTE = "<!-- Written by docs/generate.py from the program; change that, not this. -->"
_COMPLETION = "`mezzotint --install-completion` lets your shell complete commands and flags."


def settings_page() -> str:
    """docs/settings.md"""
    parts = [
        "# Settings",
        _NOTE,
        "This page lists every setting. The server looks for a setting in three places and takes the first "
        "that has it: a flag of `mezzotint serve`, the environment, and the file `mezzotint.toml`. The file "
        "is in the working folder, or where `--config FILE` or `MEZZOTINT_CONFIG` says. A setting that is in "
        "none of them has its default. A bad value or an unknown name stops the start, and the error names "
        "the file and the setting. "
        "`mezzotint serve --print-config` prints the settings in force as a file to start from.",
        '```toml\n[server]\nport = 8000\n\n[[endpoints]]\nid = "emoji"\nmodel = "emoji"\n\n'
        '[[endpoints]]\nid = "flux"\nmodel = "black-forest-labs/FLUX.1-schnell"\n\n'
        '[[endpoints.adapters]]\nroute = "ink"\nsource = "loras/ink.safetensors"\n```',
        "## `[server]`",
        "In the environment, a setting is called `MEZZOTINT_` and its name in capitals (`MEZZOTINT_PORT`). "
        "Commas separate the entries of a list there.",
        _settings_table(Settings),
        "## `[[endpoints]]`",
        _settings_table(EndpointSettings),
        "## `[[endpoints.adapters]]`",
        _settings_table(AdapterSettings),
        "## `[[endpoints.controlnets]]`",
        _settings_table(ControlNetSettings),
    ]
    return "\n\n".join(parts) + "\n"


def _settings_table(table: type[Table]) -> str:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, field in table.model_fields.items():
        if name in ("endpoints", "adapters", "controlnets"):  # tables of their own
            continue
        kind = _type_name(field.annotation)
        lines.append(f"| `{name}` | {kind} | `{default_text(field)}` | {field.description} |")
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    choices: tuple[Any, ...] = getattr(annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return " \\| ".join(f"`{choice}`" for choice in choices)
    names = {
        "str": "text",
        "int": "integer",
        "float": "number",
        "bool": "`true` \\| `false`",
        "Path": "folder",
        "dict": "table",
    }
    if type(None) in choices:
        return _type_name(choices[0])
    plain = getattr(annotation, "__origin__", annotation)  # of Annotated, the type itself
    return names.get(plain.__name__, "list of texts")


def cli_page() -> str:
    """docs/cli.md"""
    root: Any = typer.main.get_command(app)
    parts = [
        "# Command line",
        _NOTE,
        str(root.help),
        str(root.epilog),
        _COMPLETION,
        *_command_parts(root, "mezzotint"),
    ]
    return "\n\n".join(parts) + "\n"


def _command_parts(group: Any, path: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _command_parts(command, f"{path} {name}")
            continue
        arguments = [_value_name(p) for p in command.params if p.param_type_name == "argument"]
        yield f"## `{' '.join([path, name, '[OPTIONS]', *arguments])}`"
        yield re.sub(r"[ \t]+", " ", command.help)
        yield "\n".join(_parameter_lines(command))


def _parameter_lines(command: Any) -> Iterator[str]:
    yield "| flag | meaning |"
    yield "|---|---|"
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            yield f"| `{_value_name(parameter)}` | {parameter.help} |"
            continue
        flag = " / ".join([*parameter.opts, *parameter.secondary_opts])
        value = "" if parameter.is_flag else f" {_value_name(parameter)}"
        default = "" if parameter.is_flag or parameter.default is None else f" [{parameter.default}]"
        named = [parameter.envvar] if isinstance(parameter.envvar, str) else (parameter.envvar or [])
        variable = f" (`{named[0]}`)" if named else ""
        yield f"| `{flag}{value}` | {parameter.help}{default}{variable} |"


def _value_name(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def error_table() -> str:
    """The errors that are HTTP answers, by status."""
    lines = ["| status | `code` | class in the SDK | worth sending again |", "|---|---|---|---|"]
    for cls in errors.ANSWERS:
        again = "yes" if cls.retryable else "no"
        lines.append(f"| {cls.status} | {_codes(cls)} | `{cls.__name__}` | {again} |")
    return "\n".join(lines)


def local_error_table() -> str:
    """The errors that the SDK, the library and the commands raise without an HTTP answer."""
    lines = ["| class | `code` | meaning |", "|---|---|---|"]
    for cls in (errors.ModelLoadError, errors.ConfigError, errors.ConnectionFailedError):
        lines.append(f"| `{cls.__name__}` | {_codes(cls)} | {inspect.getdoc(cls)} |")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Attack:
    """One mark of `tests/attacks.py`, as it stands before a test."""

    what: str
    outcome: str
    test: str
    """`FILE::NAME` below tests/."""


def attacks() -> list[Attack]:
    """The marks of all tests, in the order of files and lines; read from the source, so nothing runs."""
    found = []
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                test = f"{file.relative_to(TESTS).as_posix()}::{node.name}"
                found += [_attack(mark, test) for mark in node.decorator_list if _is_attack(mark)]
    return found


def _is_attack(mark: ast.expr) -> TypeGuard[ast.Call]:
    return isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "attack"


def _attack(mark: ast.Call, test: str) -> Attack:
    values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in mark.keywords}
    return Attack(ast.literal_eval(mark.args[0]), values["outcome"], test)


def attack_table() -> str:
    """What was tried against the server, what comes of it, and which test tries it."""
    found = attacks()
    lines = [f"{len(found)} attacks.", "", "| attack | outcome | test |", "|---|---|---|"]
    lines += [f"| {each.what} | {each.outcome} | `{each.test}` |" for each in found]
    return "\n".join(lines)


def _codes(cls: type[errors.MezzotintError]) -> str:
    return ", ".join(f"`{code}`" for code in cls.codes)


KINDS = {
    "text": "| class | equal | exact | merges | forwards saved | default steps | guidance feeds | note |",
    "pictures": "| class | takes | equal | exact | merges | forwards saved | note |",
}
"""The head of each table of what benchmarks/families found."""


def families_table(kind: str) -> str:
    """What was found of the classes that draw from words (`text`), or also from `pictures`."""
    rows = json.loads((DOCS / "families.json").read_text(encoding="utf-8"))
    bf16 = {(row["kind"], row["pipeline"]): row for row in rows if row["dtype"] == "bf16"}
    head = KINDS[kind]
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for row in rows:
        if row["dtype"] == "fp32" and (row["kind"] == "text") == (kind == "text"):
            lines.append(_family_line(row, bf16.get((row["kind"], row["pipeline"]))))
    return "\n".join(lines)


_TAKES = {"text": [], "picture": ["a picture"], "mask": ["and a mask"], "control": ["for a ControlNet"]}


def _family_line(row: dict[str, Any], in_bf16: dict[str, Any] | None) -> str:
    measured = [each for each in (row, in_bf16) if each is not None and each["fast_levels"] is not None]

    def mark(name: str) -> str:
        return ", ".join("yes" if each[name] else "no" for each in measured)

    cells = [f"`{row['pipeline']}`", *_TAKES[row["kind"]]]
    if measured:
        saved = ", ".join(f"{each['saved']:.0%}" for each in measured)
        cells += [mark("alone"), mark("exact"), mark("merges"), saved]
    else:
        cells += ["not compared", "", "", ""]
    if row["kind"] == "text":
        guided = f"`{row['guided_by']}`" if row["guided_by"] else "nothing"
        cells += [str(row["default_steps"]), guided] if measured else ["", ""]
    note = row["reason"].replace("|", "\\|")
    return f"| {' | '.join([*cells, note])} |"


def with_table(page: str, name: str, table: str) -> str:
    """`page` with the text between `<!-- name -->` and `<!-- /name -->` replaced."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"a page has no {start} ... {end} to write its table into")
    return f"{before}{start}\n{table}\n{end}{after}"


def pages() -> dict[Path, str]:
    """Every file this program writes, with what belongs in it."""
    http, security = DOCS / "http.md", DOCS / "security.md"
    text = with_table(http.read_text(encoding="utf-8"), "errors", error_table())
    models = DOCS / "models.md"
    classes = with_table(models.read_text(encoding="utf-8"), "families", families_table("text"))
    return {
        DOCS / "settings.md": settings_page(),
        DOCS / "cli.md": cli_page(),
        http: with_table(text, "local errors", local_error_table()),
        security: with_table(security.read_text(encoding="utf-8"), "attacks", attack_table()),
        models: with_table(classes, "picture families", families_table("pictures")),
    }


def main() -> int:
    stale = [
        file
        for file, text in pages().items()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        for file in stale:
            print(f"docs/{file.name} is out of date; run python docs/generate.py")
        return 1 if stale else 0
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
