"""Repositories of the Hugging Face Hub and safetensors files, as server and engine both meet them.

huggingface_hub is imported where it is needed: the import is slow, and most starts need none of it.
"""

from __future__ import annotations

import contextlib
import glob
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

PIPELINE_INDEX = "model_index.json"
"""The file that makes a folder a diffusers pipeline."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PICKLE_RISK = "a pickle file, which can run code when opened"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
"""PEFT keeps alpha in a file of this name beside PEFT_WEIGHTS."""
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives an adapter's weights."""
MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors format allows."""
AWAY = "cannot be reached, and the cache of this machine does not hold"
CONTACT_TIMEOUT_S = 10.0
"""How long the Hub may take to say that it is there."""
_REFERENCE = re.compile(
    r"(?P<repository>[\w.-]{1,96}/[\w.-]{1,96})"
    r"(:(?P<file>[^@\s:]{1,200}))?(@(?P<revision>[\w./-]{1,200}))?"
)


@dataclass(frozen=True, slots=True)
class Reference:
    """A repository, or one of its files, as `owner/name[:file][@revision]` names it."""

    repository: str
    file: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one revision of a repository."""

    sizes: dict[str, int]
    """Bytes by path."""
    cache: Path | None = None
    """The folder that holds these files, when the Hub is away and the cache answers instead."""


class HubError(Exception):
    """A repository cannot be had. `reason` goes on where `repository owner/name` begins."""

    def __init__(self, reason: str, *, code: str, permanent: bool = True) -> None:
        super().__init__(reason)
        self.code = code
        """One of ModelLoadError's."""
        self.reason = reason
        self.permanent = permanent


class HeaderError(Exception):
    """A safetensors file is not whole; the text says why."""


def parse_reference(source: str) -> Reference | None:
    """The repository that `source` names; None if it has not the form of one."""
    match = _REFERENCE.fullmatch(source)
    return Reference(**match.groupdict()) if match else None


def list_files(reference: Reference) -> Listing:
    """The files of a repository, from the Hub or else from the cache; HubError if neither has it.

    Asks for the commit first, once: huggingface_hub by itself asks a Hub that is away for half a minute.
    """
    with _refusals(reference.revision):
        import huggingface_hub
        from huggingface_hub import errors

        api, repository = huggingface_hub.HfApi(), reference.repository
        revision = reference.revision or "main"
        try:
            commit = api.model_info(repository, revision=revision, timeout=CONTACT_TIMEOUT_S).sha
        except (httpx2.TransportError, errors.OfflineModeIsEnabled):
            folder = Path(  # without a pattern it would insist on every file of the repository
                huggingface_hub.snapshot_download(
                    repository, revision=revision, allow_patterns=[], local_files_only=True
                )
            )
            return Listing(sizes_in(folder), folder)
        tree = api.list_repo_tree(repository, recursive=True, revision=commit)
        return Listing({each.path: each.size for each in tree if isinstance(each, huggingface_hub.RepoFile)})


def sizes_in(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by relative path."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def download(
    repository: str, revision: str | None, files: Iterable[str], progress_bar: type[Any] | None = None
) -> Path:
    """The folder in the Hub's cache, once it holds these files; HubError if they cannot be had.

    An interrupted download goes on where it stopped. `progress_bar` is a subclass of tqdm.
    """
    with _refusals(revision):
        import huggingface_hub

        patterns = [glob.escape(file) for file in files]
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=patterns, tqdm_class=progress_bar
            )
        )


def read_header(path: Path, max_bytes: int = MAX_HEADER_BYTES) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file by name, as its header lists them; HeaderError for a damaged file.

    A header of more than `max_bytes` counts as damage: reading one holds up everything else in the process.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(max_bytes, size - 8):
            raise HeaderError(f"its header is longer than the file or than {max_bytes} bytes")
        text = file.read(length)
    try:
        tensors = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        if not all(_is_tensor(entry) for entry in tensors.values()):
            raise ValueError
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise HeaderError(f"its header is no table of tensors: {type(error).__name__}") from None
    if end != size:
        raise HeaderError(f"it has {size} bytes, its table says {end}")
    return tensors


def _is_tensor(entry: dict[str, Any]) -> bool:
    counts = [*entry["shape"], *entry["data_offsets"]]
    return isinstance(entry["dtype"], str) and all(type(each) is int and 0 <= each < 2**63 for each in counts)


@contextlib.contextmanager
def _refusals(revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into a HubError."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HfHubHTTPError, errors.HFValidationError, httpx2.HTTPError, OSError) as error:
        raise _refusal(error, revision) from error


def _refusal(error: Exception, revision: str | None) -> HubError:
    from huggingface_hub import errors

    text = str(error).partition("\n")[0][:200]
    if isinstance(error, errors.GatedRepoError):
        reason = "is gated: accept its terms on its page, then set HF_TOKEN to a token of that account"
        return HubError(reason, code="gated_model")
    if isinstance(error, errors.RevisionNotFoundError):
        reason = f"has no revision {revision or 'main'}: there is no such branch, tag or commit"
        return HubError(reason, code="model_not_found")
    if isinstance(error, errors.RepositoryNotFoundError):
        reason = "does not exist or is private: check the spelling, or set HF_TOKEN to a token for it"
        return HubError(reason, code="model_not_found")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"has no valid name: {text}", code="model_not_found")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return HubError(f"{AWAY} it", code="no_network", permanent=False)
    way = "what has arrived is kept, try again"
    if not isinstance(error, errors.HfHubHTTPError | httpx2.HTTPError):
        way = "make sure there is room in the cache, then try again"
    return HubError(f"could not be fetched: {text}; {way}", code="download_failed", permanent=False)
