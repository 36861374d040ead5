"""Whether the operator has permitted the Python code of a model: this source, in this version, and no other.

A permission is `owner/name@COMMIT` for a repository and `FOLDER@sha256:HASH` for a folder. The hash covers
every file that decides what runs: Python and JSON. So a permission ends when the source changes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mezzotint import hub
from mezzotint.errors import ModelLoadError

_DECIDING = (".py", ".json")
_ELSEWHERE = "--"
"""In `auto_map`, what is before it names another repository, whose code nobody permitted."""


def may_need_code(permission: str | None, source: str) -> bool:
    """Whether the permission is one for this source, in whatever version: then its code is fetched too."""
    return permission is not None and _name(permission.rpartition("@")[0]) == _name(source)


def is_permitted(permission: str | None, source: str, path: Path) -> bool:
    """Whether the code of `source`, which lies in the folder `path`, is the code that was permitted.

    ModelLoadError if permitted code would bring in code of another repository.
    """
    if permission is None or not path.is_dir():
        return False
    permitted = may_need_code(permission, source) and permission.rpartition("@")[2] == version(source, path)
    if permitted:
        _require_own_code(path)
    return permitted


def permission_for(source: str, path: Path) -> str:
    """What the operator writes to permit the code in the folder `path`."""
    return f"{_name(source)}@{version(source, path)}"


def version(source: str, path: Path) -> str:
    """The commit of a repository, or the hash of what decides in a folder."""
    if path.resolve() != Path(source).expanduser().resolve():
        return path.name  # a snapshot in the Hub's cache has the name of its commit
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.suffix in _DECIDING and file.is_file():
            content = file.read_bytes()
            name = file.relative_to(path).as_posix().encode()
            digest.update(b"%d %d " % (len(name), len(content)) + name + content)
    return f"sha256:{digest.hexdigest()}"


def _name(source: str) -> str:
    if Path(source).expanduser().exists():
        return str(Path(source).expanduser().resolve())
    found = hub.parse_reference(source)
    return found.repository if found else source


def _require_own_code(path: Path) -> None:
    for file in path.rglob("*.json"):
        try:
            values = json.loads(file.read_bytes())
        except ValueError:
            continue  # whoever reads it says so
        named = values.get("auto_map") if isinstance(values, dict) else None
        if named is not None and _ELSEWHERE in json.dumps(named):
            raise ModelLoadError(
                f"{file} brings in code of another repository, which allow_remote_code cannot permit; copy "
                "that code into the model's folder",
                code="remote_code",
            )
