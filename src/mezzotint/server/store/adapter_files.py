"""The server's own copies of adapters' files, in `data_dir/adapters/SHA256/`.

A source is a safetensors file, a folder with one, or a Hub repository `owner/name[:file][@revision]`. Each
content is copied once and named by its SHA-256, so that an adapter outlives its source. Only the header is
checked here, so that a damaged file is refused before anything is stored; the worker checks the tensors.
Everything here blocks: call it from a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mezzotint import hub
from mezzotint.adapter_sources import choose_weights
from mezzotint.errors import InvalidRequestError, echo
from mezzotint.server.store.durable import sync

WEIGHTS = "adapter.safetensors"
MAX_HEADER_BYTES = 8 * 2**20
"""Longest header of an adapter's file; that of the largest LoRA has under 1 MiB."""
MAX_CONFIG_BYTES = 2**20
"""Largest PEFT_CONFIG."""
UNUSED_S = 3600.0
"""A younger copy may belong to an adapter that is being registered at this moment."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """The copy of an adapter's weights that this server keeps."""

    path: Path
    checksum: str
    """SHA-256 (hex) of the weights."""
    num_bytes: int
    rank: int | None
    """The largest rank that the file's header shows."""


def copy_source(source: str, folder: Path, max_bytes: int) -> AdapterFile:
    """Copies the file that `source` names below `folder`; InvalidRequestError says what is wrong with it."""
    try:
        weights = _locate(source, max_bytes)
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no permission, ~ of nobody, NUL
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise _refusal(
            f"source {echo(source)} cannot be looked at: {why}", "adapter_source_not_found"
        ) from None
    if weights.suffix != ".safetensors":
        why = hub.PICKLE_RISK if weights.suffix in hub.PICKLES else "no safetensors file"
        raise _refusal(f"{weights.name} is {why}; convert it to .safetensors", "adapter_unsupported")
    try:
        if not weights.is_file():  # a pipe would hold us up for as long as nobody writes into it
            raise _refusal(f"{weights.name} is no file", "adapter_source_not_found")
        size = weights.stat().st_size
        if size > max_bytes:
            raise _too_large(weights.name, size, max_bytes)
        tensors = hub.read_header(weights, MAX_HEADER_BYTES)
        if not tensors:
            raise _refusal(f"{weights.name} holds no tensors", "adapter_broken")
        config = weights.with_name(hub.PEFT_CONFIG)
        beside = weights.name == hub.PEFT_WEIGHTS and config.is_file()
        if beside and config.stat().st_size > MAX_CONFIG_BYTES:
            raise _too_large(config.name, config.stat().st_size, MAX_CONFIG_BYTES)
        return _copy(weights, config.read_bytes() if beside else b"", folder, _rank(tensors))
    except hub.HeaderError as error:
        why = f"is not a whole safetensors file ({error}); copy or download it again"
        raise _refusal(f"{weights.name} {why}", "adapter_broken") from None
    except OSError as error:
        raise _refusal(f"{weights.name} cannot be read: {error.strerror}", "adapter_broken") from None


def remove_unused(folder: Path, used: set[Path]) -> None:
    """Deletes copies that no adapter uses, and the remains of copying that was interrupted."""
    folders = {path.parent for path in used}
    with contextlib.suppress(FileNotFoundError):
        for entry in folder.iterdir():
            if entry not in folders and entry.stat().st_mtime < time.time() - UNUSED_S:
                shutil.rmtree(entry, ignore_errors=True)


def _refusal(message: str, code: str) -> InvalidRequestError:
    return InvalidRequestError(message, code=code, param="source")


def _too_large(name: str, size: int, max_bytes: int) -> InvalidRequestError:
    return _refusal(
        f"{name} has {size} bytes; it may have {max_bytes}"
        + (": raise adapter_bytes of the endpoint" if name.endswith(".safetensors") else ""),
        "adapter_too_large",
    )


def _locate(source: str, max_bytes: int) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path / choose_weights([each.name for each in path.iterdir()], f"the folder {path.name}")
    if path.exists():
        return path
    reference = hub.parse_reference(source)
    if reference is None or (path.suffix in (".safetensors", *hub.PICKLES) and reference.file is None):
        raise _refusal(
            f"source {echo(source)} was not found: it is no file or folder on the server and no repository "
            "(owner/name[:file][@revision])",
            "adapter_source_not_found",
        )
    try:
        return _download(reference, max_bytes)
    except hub.HubError as error:
        why = error.reason
        if error.code == "no_network":
            why += "; connect the server to the network, or copy the file to it and name its path"
        raise _refusal(f"repository {reference.repository} {why}", "adapter_source_not_found") from None


def _download(reference: hub.Reference, max_bytes: int) -> Path:
    """The file in the Hub's cache; a file that is there already needs no network."""
    repository, listing = reference.repository, hub.list_files(reference)
    file = reference.file or choose_weights(list(listing.sizes), f"repository {repository}")
    if file not in listing.sizes:
        if listing.cache:
            raise hub.HubError(f"{hub.AWAY} {echo(file)}", code="no_network", permanent=False)
        raise _refusal(f"repository {repository} has no file {echo(file)}", "adapter_source_not_found")
    if listing.sizes[file] > max_bytes:
        raise _too_large(file, listing.sizes[file], max_bytes)
    beside = str(Path(file).with_name(hub.PEFT_CONFIG))
    files = [file, beside] if Path(file).name == hub.PEFT_WEIGHTS and beside in listing.sizes else [file]
    return (listing.cache or hub.download(repository, reference.revision, files)) / file


def _rank(tensors: dict[str, dict[str, object]]) -> int | None:
    shapes = [entry.get("shape") for name, entry in tensors.items() if re.search(r"(lora_A|down)\.", name)]
    return max((shape[0] for shape in shapes if isinstance(shape, list) and len(shape) > 1), default=None)


def _copy(weights: Path, config: bytes, folder: Path, rank: int | None) -> AdapterFile:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _scratch(folder) as scratch:
        copy = scratch / (hub.PEFT_WEIGHTS if config else WEIGHTS)
        digest = hashlib.sha256()
        with weights.open("rb") as source, copy.open("wb") as written:
            while block := source.read(1 << 20):
                digest.update(block)
                written.write(block)
        sync(copy)
        checksum = digest.hexdigest()
        if config:
            (scratch / hub.PEFT_CONFIG).write_bytes(config)
            sync(scratch / hub.PEFT_CONFIG)
            digest.update(config)
        target_folder = folder / digest.hexdigest()
        kept = target_folder / copy.name
        if not kept.is_file():
            try:
                scratch.rename(target_folder)
            except OSError:
                if not kept.is_file():  # else another thread was first, with the same content
                    shutil.rmtree(target_folder, ignore_errors=True)
                    scratch.rename(target_folder)
        sync(target_folder)
        sync(folder)
        return AdapterFile(kept, checksum, kept.stat().st_size, rank)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    path = new_scratch(folder)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def new_scratch(folder: Path) -> Path:
    """A new folder below `folder`; `remove_unused` deletes it if nobody else does."""
    path = folder / f".{secrets.token_hex(8)}"
    path.mkdir(mode=0o700, parents=True)
    return path
