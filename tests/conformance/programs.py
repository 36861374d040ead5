"""The programs that the run drives, and an environment for each, made outside this checkout.

The folder is `CONFORMANCE_CACHE`, or `mezzotint-conformance` in the user's cache.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = Path(
    os.environ.get("CONFORMANCE_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mezzotint-conformance"
)
EVERYWHERE = ("pillow",)
"""What every Python script needs besides its program."""


class NotInstalledError(Exception):
    """A program cannot be installed here; the message is the installer's."""


@dataclass(frozen=True)
class Program:
    """One program: its packages with their versions, and where they are installed."""

    name: str
    language: str
    """`python` or `node`."""
    packages: tuple[str, ...]
    title: str
    """As people write its name."""
    replayed: bool
    """Whether only its requests are sent, in the way in which it sends them."""

    @property
    def folder(self) -> Path:
        return CACHE / self.name

    @property
    def package(self) -> str:
        """The package that the program is named after, without its version and extras."""
        return re.split(r"==|\[|(?<=.)@", self.packages[0])[0]

    @property
    def version(self) -> str:
        if self.replayed:
            return "requests replayed"
        return re.split(r"==|(?<=.)@", self.packages[0])[-1]

    def command(self, script: Path | str) -> list[str]:
        """Runs a script, or as `-m` a module, in this program's environment."""
        if self.language == "node":
            return ["node", str(script)]
        return [
            str(self.folder / "bin" / "python"),
            *(["-m"] if isinstance(script, str) else []),
            str(script),
        ]

    @property
    def installed(self) -> bool:
        return self._stamp.exists() and self._stamp.read_text() == self._wanted

    @property
    def _stamp(self) -> Path:
        return self.folder / "installed.json"

    @property
    def _wanted(self) -> str:
        return json.dumps([self.language, *self.packages])

    def install(self) -> None:
        """Makes the environment unless it is there already; NotInstalledError says why it cannot be had."""
        if self.installed:
            return
        print(f"installing {', '.join(self.packages)} ...", file=sys.stderr, flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.language == "node":
            npm = ["npm", "install", "--no-audit", "--no-fund", "--save-exact", "--silent"]
            _call([*npm, "--prefix", str(self.folder), *self.packages])
        else:
            _call([sys.executable, "-m", "venv", str(self.folder)])
            pip = [str(self.folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
            _call([*pip, *self.packages, *EVERYWHERE])
        self._stamp.write_text(self._wanted)


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise NotInstalledError(f"there is no {command[0]} here") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower()]
        raise NotInstalledError((errors or said or [f"{command[0]} failed"])[-1].strip())


def programs() -> Iterator[Program]:
    """Those of programs.toml, in its order."""
    for name, entry in tomllib.loads((HERE / "programs.toml").read_text()).items():
        language = "node" if "node" in entry else "python"
        yield Program(
            name, language, tuple(entry[language]), entry["title"], replayed=entry.get("replayed", False)
        )
