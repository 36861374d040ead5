"""Repositories and safetensors headers, for server and engine alike."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mezzotint import hub

TENSOR: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", hub.Reference("owner/name")),
        ("owner/name:a/b.safetensors", hub.Reference("owner/name", "a/b.safetensors")),
        ("owner/name@refs/pr/1", hub.Reference("owner/name", revision="refs/pr/1")),
        ("owner/name:b.safetensors@v1", hub.Reference("owner/name", "b.safetensors", "v1")),
        ("name", None),
        ("a/b/c", None),
        ("owner/name:", None),
        ("owner/name@", None),
        ("owner/na me", None),
        ("../../etc/passwd", None),
    ],
)
def test_a_reference_names_repository_file_and_revision(source: str, expected: hub.Reference | None) -> None:
    assert hub.parse_reference(source) == expected


def written(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_a_header_lists_the_tensors_of_a_whole_file(tmp_path: Path) -> None:
    file = written(tmp_path / "a", {"__metadata__": {"format": "pt"}, "weight": TENSOR}, bytes(8))
    assert hub.read_header(file) == {"weight": TENSOR}


@pytest.mark.parametrize(
    ("header", "data", "length", "reason"),
    [
        ({"a": TENSOR}, bytes(7), None, "its table says"),
        ({"a": TENSOR}, bytes(9), None, "its table says"),
        ({"a": TENSOR | {"shape": ["x"]}}, bytes(8), None, "no table of tensors"),
        ({"a": TENSOR | {"dtype": 1}}, bytes(8), None, "no table of tensors"),
        ({}, b"", 2**62, "longer than the file"),
        (b"no json", b"", None, "no table of tensors"),
        ([1, 2], b"", None, "no table of tensors"),
        ({"a": 1}, b"", None, "no table of tensors"),
        ({"a": {}}, b"", None, "no table of tensors"),
        ({"a": {"data_offsets": [0]}}, b"", None, "no table of tensors"),
        ({"a": {"data_offsets": [0, "x"]}}, b"", None, "no table of tensors"),
        (b"[" * 100_000, b"", None, "no table of tensors"),
    ],
)
def test_a_damaged_header_says_what_is_wrong(
    tmp_path: Path, header: Any, data: bytes, length: int | None, reason: str
) -> None:
    file = written(tmp_path / "a", header, data, length)
    with pytest.raises(hub.HeaderError, match=reason):
        hub.read_header(file)


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_without_room_for_a_header_is_damaged(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(bytes(size))
    with pytest.raises(hub.HeaderError):
        hub.read_header(tmp_path / "a")


def test_importing_it_loads_no_heavy_package() -> None:
    program = (
        "import sys, mezzotint.hub; print({'torch', 'huggingface_hub', 'diffusers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
