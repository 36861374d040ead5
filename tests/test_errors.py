"""Every code that the sources name belongs to a class, and every class's codes are in use."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mezzotint import errors
from mezzotint.errors import ANSWERS, MezzotintError, error_class

PACKAGE = Path(errors.__file__).parent
CODE = re.compile(r"[a-z]+(_[a-z]+)+")
TREE: list[type[MezzotintError]] = [MezzotintError, *MezzotintError.__subclasses__()]
CLASSES = {cls.__name__: cls for cls in TREE}
DECLARED = {code for cls in CLASSES.values() for code in cls.codes}


def trees() -> Iterator[ast.Module]:
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.name != "errors.py":
            yield ast.parse(file.read_text(encoding="utf-8"))


def code_positions() -> dict[str, int]:
    """Where functions and message classes take a code: the index of the parameter called `code`."""
    positions = {"PydanticCustomError": 0}
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
        elif isinstance(node, ast.ClassDef):
            fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            names = [target.id for target in fields if isinstance(target, ast.Name)]
        else:
            continue
        if "code" in names:
            positions[node.name] = names.index("code")
    return positions


def texts(node: ast.AST) -> Iterator[str]:
    """The strings that an expression may give."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.Tuple) and node.elts:
        yield from texts(node.elts[0])


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def named_codes() -> Iterator[tuple[str, str]]:
    """What the code is handed to, and the code, for each code in the sources."""
    positions = code_positions()
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.Call):
            name = called(node)
            values = [item.value for item in node.keywords if item.arg == "code"]
            place = positions.get(name)
            values += node.args[place : place + 1] if place is not None else []
            yield from ((name, text) for value in values for text in texts(value))
        elif isinstance(node, ast.Assign) and "code" in ast.unparse(node.targets[0]).strip("()").split(", "):
            yield from (("", text) for text in texts(node.value))
        elif isinstance(node, ast.FunctionDef) and ast.unparse(node.returns or node) == "tuple[str, str]":
            answers = (part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value)
            found = (text for value in answers for text in texts(value))
            yield from (("", text) for text in found if "_" in text)
        elif isinstance(node, ast.Tuple) and any(
            " " in text for part in node.elts[1:] for text in texts(part)
        ):
            yield from (("", text) for text in texts(node) if CODE.fullmatch(text))


def test_every_code_in_the_sources_belongs_to_the_class_that_is_raised_with_it() -> None:
    found = list(named_codes())
    assert len(found) > 100
    strays = [
        (name, code)
        for name, code in found
        if code not in (CLASSES[name].codes if name in CLASSES else DECLARED)
    ]
    assert strays == []


def test_every_declared_code_is_in_use() -> None:
    defaults = {cls.codes[0] for cls in CLASSES.values()}
    assert DECLARED - defaults - {code for _, code in named_codes()} == set()


def test_an_http_code_leads_back_to_its_class() -> None:
    for cls in ANSWERS:
        assert [error_class(cls.status, code) for code in cls.codes] == [cls] * len(cls.codes)


@pytest.mark.parametrize(
    ("status", "code", "cls"),
    [
        (400, "out_of_range", errors.InvalidRequestError),
        (400, "of another server", errors.InvalidRequestError),
        (404, None, errors.NotFoundError),
        (429, None, errors.RateLimitError),
        (500, None, errors.InternalError),
        (500, "deadline_exceeded", errors.DeadlineError),
        (500, "adapter_broken", errors.InternalError),
        (502, None, errors.InternalError),
    ],
)
def test_an_answer_of_another_server_becomes_the_error_nearest_to_it(
    status: int, code: str | None, cls: type[MezzotintError]
) -> None:
    assert error_class(status, code) is cls


def test_only_what_never_is_an_http_answer_has_no_place_among_the_answers() -> None:
    others = {errors.ModelLoadError, errors.ConfigError, errors.ConnectionFailedError}
    assert set(MezzotintError.__subclasses__()) - set(ANSWERS) == others
    assert all(cls.codes is not MezzotintError.codes for cls in MezzotintError.__subclasses__())
