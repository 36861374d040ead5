"""Where an adapter comes from, and the copy that is kept: `data_dir/adapters/CHECKSUM/`.

A source is a safetensors file, a folder with one, or a Hub repository `owner/name[:file][@revision]`. Every
source is copied once and found again by the SHA-256 of its content, so that a source that vanishes or changes
loses nothing. Everything here blocks: call it from a thread. What the file means is the worker's business;
here only its frame is checked, so that a torn file is told before anything is stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

from mezzotint.errors import InvalidRequestError, echo

WEIGHTS = "adapter.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
"""PEFT keeps alpha in a file of this name beside PEFT_WEIGHTS."""
PREFERRED = ("pytorch_lora_weights.safetensors", PEFT_WEIGHTS)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER_BYTES = 100_000_000
HUB_TIMEOUT_S = 10.0
"""How long the Hub may take to say that it is there."""
UNUSED_S = 3600.0
"""A copy younger than this may be one that is just being registered."""
_REPOSITORY = re.compile(
    r"(?P<id>[\w.-]{1,96}/[\w.-]{1,96})(:(?P<file>[^@\s:]{1,200}))?(@(?P<revision>[\w./-]{1,200}))?"
)


@dataclass(frozen=True, slots=True)
class Kept:
    """A copy that is ours."""

    path: Path
    checksum: str
    """SHA-256 (hex) of the weights."""
    num_bytes: int
    rank: int | None
    """The largest rank that the file's header shows."""


def keep(source: str, folder: Path, max_bytes: int) -> Kept:
    """Fetches `source`, checks its frame and copies it below `folder`; InvalidRequestError says why not."""
    try:
        weights = _locate(source, max_bytes)
    except (OSError, RuntimeError) as error:  # a name too long, a folder that is not ours, nobody's home
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise _refusal(
            f"source {echo(source)} cannot be looked at: {why}", "adapter_source_not_found"
        ) from None
    if weights.suffix != ".safetensors":
        pickled = weights.suffix in PICKLES
        why = "a pickle file, which can run code when opened" if pickled else "no safetensors file"
        raise _refusal(f"{weights.name} is {why}; convert it to .safetensors", "adapter_unsupported")
    try:
        size = weights.stat().st_size
        if size > max_bytes:
            raise _too_large(weights.name, size, max_bytes)
        rank = _rank(_header(weights, size))
        config = weights.with_name(PEFT_CONFIG)
        config_text = config.read_bytes() if weights.name == PEFT_WEIGHTS and config.is_file() else b""
        return _copy(weights, config_text, folder, rank)
    except OSError as error:
        raise _refusal(f"{weights.name} cannot be read: {error.strerror}", "adapter_broken") from None


def remove_unused(folder: Path, used: set[Path]) -> None:
    """Deletes the copies that no adapter points to any more, and what broken-off copying left."""
    homes = {path.parent for path in used}
    with contextlib.suppress(FileNotFoundError):
        for entry in folder.iterdir():
            if entry not in homes and entry.stat().st_mtime < time.time() - UNUSED_S:
                shutil.rmtree(entry, ignore_errors=True)


def _refusal(message: str, code: str) -> InvalidRequestError:
    return InvalidRequestError(message, code=code, param="source")


def _too_large(name: str, size: int, max_bytes: int) -> InvalidRequestError:
    return _refusal(
        f"{name} has {size} bytes; an adapter of this endpoint may have {max_bytes}: raise adapter_bytes",
        "adapter_too_large",
    )


def _locate(source: str, max_bytes: int) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path / _choose([each.name for each in path.iterdir()], f"the folder {path.name}")
    if path.exists():
        return path
    match = _REPOSITORY.fullmatch(source)
    if match is None or (path.suffix in (".safetensors", *PICKLES) and match["file"] is None):
        raise _refusal(
            f"source {echo(source)} was not found: it is no file or folder on the server and no repository "
            "(owner/name[:file][@revision])",
            "adapter_source_not_found",
        )
    return _download(match["id"], match["file"], match["revision"], max_bytes)


def _choose(names: list[str], where: str) -> str:
    """The file to take when none was named."""
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    for name in PREFERRED:
        if name in found:
            return name
    if len(found) == 1:
        return found[0]
    if found:
        raise _refusal(
            f"{where} holds {len(found)} safetensors files ({', '.join(found[:5])}); name one of them",
            "adapter_source_not_found",
        )
    pickled = next((name for name in names if Path(name).suffix in PICKLES), None)
    if pickled:
        raise _refusal(
            f"{where} holds only {pickled}, a pickle file, which can run code when opened; convert it",
            "adapter_unsupported",
        )
    raise _refusal(f"{where} holds no safetensors file", "adapter_source_not_found")


def _download(repository: str, file: str | None, revision: str | None, max_bytes: int) -> Path:
    """The file in the Hub's cache; what is there already needs no network."""
    from huggingface_hub import errors as hub  # slow to import, and needed only here

    try:
        return _fetch(repository, file, revision, max_bytes)
    except hub.GatedRepoError:
        why = "is gated; accept its terms with the account whose HF_TOKEN the server has"
    except hub.RevisionNotFoundError:
        why = f"has no revision {echo(revision or 'main')}"
    except hub.RepositoryNotFoundError:
        why = "does not exist or is private; set HF_TOKEN for a private one"
    except hub.LocalEntryNotFoundError:
        why = (
            "cannot be reached, and the server's cache does not hold it; connect the server to the network, "
            "or copy the file to it and name its path"
        )
    except hub.EntryNotFoundError:
        why = f"has no file {echo(file or '')}"
    except (hub.HfHubHTTPError, hub.HFValidationError, httpx2.TransportError, OSError) as error:
        why = f"could not be fetched: {str(error).partition(chr(10))[0][:200]}; try again"
    raise _refusal(f"repository {repository} {why}", "adapter_source_not_found")


def _fetch(repository: str, file: str | None, revision: str | None, max_bytes: int) -> Path:
    """Asks for the commit first, once: huggingface_hub itself asks a Hub that is away for half a minute."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    api = huggingface_hub.HfApi()
    try:
        commit = api.model_info(repository, revision=revision or "main", timeout=HUB_TIMEOUT_S).sha
    except (httpx2.TransportError, hub.OfflineModeIsEnabled):
        return _cached(repository, file, revision)
    entries = api.list_repo_tree(repository, recursive=True, revision=commit)
    sizes = {entry.path: entry.size for entry in entries if isinstance(entry, huggingface_hub.RepoFile)}
    file = file or _choose(list(sizes), f"repository {repository}")
    if sizes.get(file, 0) > max_bytes:
        raise _too_large(file, sizes[file], max_bytes)
    path = Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    if path.name == PEFT_WEIGHTS:
        with contextlib.suppress(hub.EntryNotFoundError):
            beside = str(Path(file).with_name(PEFT_CONFIG))
            huggingface_hub.hf_hub_download(repository, beside, revision=revision)
    return path


def _cached(repository: str, file: str | None, revision: str | None) -> Path:
    """What an earlier download left; LocalEntryNotFoundError if that is not it."""
    import huggingface_hub

    if file is None:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
        file = _choose([each.name for each in folder.iterdir()], f"the cached repository {repository}")
    return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, local_files_only=True))


def _header(weights: Path, size: int) -> dict[str, dict[str, object]]:
    """The table at the head of a safetensors file, checked against the file's length."""
    broken = f"{weights.name} is not a whole safetensors file; copy or download it again"
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _refusal(broken, "adapter_broken")
        try:
            table = json.loads(file.read(length))
            tensors = {name: entry for name, entry in table.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise _refusal(broken, "adapter_broken") from None
    if 8 + length + end != size:
        raise _refusal(f"{broken} (it has {size} bytes, its table says {8 + length + end})", "adapter_broken")
    if not tensors:
        raise _refusal(f"{weights.name} holds no tensors", "adapter_broken")
    return tensors


def _rank(tensors: dict[str, dict[str, object]]) -> int | None:
    shapes = [entry.get("shape") for name, entry in tensors.items() if re.search(r"(lora_A|down)\.", name)]
    return max((shape[0] for shape in shapes if isinstance(shape, list) and len(shape) > 1), default=None)


def _copy(weights: Path, config: bytes, folder: Path, rank: int | None) -> Kept:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _scratch(folder) as scratch:
        copy = scratch / (PEFT_WEIGHTS if config else WEIGHTS)
        digest = hashlib.sha256()
        with weights.open("rb") as source, copy.open("wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
        checksum = digest.hexdigest()
        if config:
            (scratch / PEFT_CONFIG).write_bytes(config)
            digest.update(config)
        home = folder / digest.hexdigest()
        if not (home / copy.name).is_file():
            shutil.rmtree(home, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was first, with the same content
                scratch.rename(home)
        return Kept(home / copy.name, checksum, (home / copy.name).stat().st_size, rank)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    path = folder / f".{secrets.token_hex(8)}"
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
