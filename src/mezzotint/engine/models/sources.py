"""Where a model comes from: a built-in name, a folder, a file or a Hub repository becomes a path here.

Only configurations, tokenizers and safetensors are fetched; what is in the Hub's cache needs no network.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from tqdm.auto import tqdm

from mezzotint import hub
from mezzotint.engine import manifest
from mezzotint.errors import ModelLoadError, echo
from mezzotint.messages import DOWNLOADING

OnProgress = Callable[[str, float | None], None]
"""Called with the stage of a Loading message and the fraction done, where known."""

INDEX = hub.PIPELINE_INDEX
PART = "config.json"
"""The file that makes a folder a part of a pipeline."""
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model)(\.(?P<variant>\w+))?(-\d{5}-of-\d{5})?\.safetensors"
    r"|(diffusion_pytorch_model|model)\.safetensors\.index(\.(?P<index_variant>\w+))?\.json"
)
"""Names by which diffusers and transformers look for weights; a variant is a second set (`fp16`)."""
TEXTS = (".json", ".txt", ".model", ".jinja")


def ignore_progress(stage: str, fraction: float | None) -> None:
    """The default progress callback."""


def locate(
    source: str, revision: str | None = None, *, progress: OnProgress = ignore_progress, code: bool = False
) -> Path:
    """The folder (or single safetensors file) of `source`, fetched first if it is a repository.

    `source` is a built-in name, a path, or a repository `owner/name[@revision]`; ModelLoadError else. `code`
    fetches Python files too.
    """
    if source in built_in_names():
        return Path(str(resources.files("mezzotint") / "models" / source))
    path = Path(source).expanduser()
    if path.exists():
        return path
    found = hub.parse_reference(source)
    if found is None or found.file or path.suffix == ".safetensors":
        raise ModelLoadError(
            f"model {echo(source)} was not found: it is no built-in name ({', '.join(built_in_names())}), "
            "no folder or safetensors file that exists here, and no repository id (owner/name)",
            code="model_not_found",
        )
    return fetch(found.repository, revision or found.revision, progress=progress, code=code)


def built_in_names() -> list[str]:
    """The models that come with the package."""
    models = resources.files("mezzotint") / "models"
    entries = models.iterdir() if models.is_dir() else ()
    return sorted(entry.name for entry in entries if (entry / INDEX).is_file())


def fetch(
    repository: str,
    revision: str | None = None,
    *,
    progress: OnProgress = ignore_progress,
    code: bool = False,
    weights: bool = True,
) -> Path:
    """The folder of a repository in the Hub's cache; an interrupted download goes on where it stopped."""
    progress(DOWNLOADING, None)
    folder = _snapshot(repository, revision, [INDEX])
    if not (folder / INDEX).is_file():
        raise ModelLoadError(
            f"repository {repository} is not a diffusers pipeline: it has no {INDEX}; if it holds a "
            "single-file checkpoint, download that file and give its path",
            code="not_a_pipeline",
        )
    index = read_index(folder)
    sizes = _files(repository, folder)
    files = choose_files(sizes, index, code=code, weights=weights)
    bar = _bar(progress, sum(sizes.get(file, 0) for file in files if not (folder / file).is_file()))
    return _snapshot(repository, folder.name, files, bar)


def locate_part(source: str, *, progress: OnProgress = ignore_progress) -> Path:
    """The folder of one part of a pipeline: one that is here, or a repository `owner/name[@revision]`."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    found = hub.parse_reference(source)
    if found is None or found.file or path.exists():
        raise ModelLoadError(
            f"{echo(source)} was not found: it is no folder here and no repository id (owner/name)",
            code="model_not_found",
        )
    progress(DOWNLOADING, None)
    folder = _snapshot(found.repository, found.revision, [PART])
    sizes = {file: size for file, size in _files(found.repository, folder).items() if "/" not in file}
    wanted = choose_variant(sizes)
    files = [PART]
    for file in sizes:
        match = WEIGHTS.fullmatch(file)
        if match is not None and (match["variant"] or match["index_variant"]) in (wanted, None):
            files.append(file)
    bar = _bar(progress, sum(sizes[file] for file in files if not (folder / file).is_file()))
    return _snapshot(found.repository, folder.name, files, bar)


def read_index(folder: Path) -> dict[str, Any]:
    """The pipeline's model_index.json."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{folder / INDEX} cannot be read: {error}; fetch the model again", code="corrupt_file"
        ) from error
    if not isinstance(index, dict):
        raise ModelLoadError(
            f"{folder / INDEX} is not a JSON object; fetch the model again", code="corrupt_file"
        )
    return index


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The pipeline's parts that have files: name -> (library, class)."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if not name.startswith("_")  # `_class_name` has this form where the pipeline has a class of its own
        and isinstance(value, list)
        and len(value) == 2
        and all(isinstance(entry, str) for entry in value)
    }


def choose_files(
    files: Iterable[str], index: dict[str, Any], *, code: bool = False, weights: bool = True
) -> list[str]:
    """What of a repository's files the pipeline needs: no pickles, no second copy of the same weights."""
    files = list(files)
    parts = components(index)
    wanted = choose_variant([file for file in files if file.partition("/")[0] in parts])
    chosen = [INDEX]
    for file in files:
        folder, _, name = file.rpartition("/")
        match = WEIGHTS.fullmatch(name)
        if folder.partition("/")[0] not in parts:
            if file == manifest.FILE or (code and name.endswith(".py")):
                chosen.append(file)
        elif match is not None:
            if weights and (match["variant"] or match["index_variant"]) in (wanted, None):
                chosen.append(file)
        elif name.endswith(TEXTS) or (code and name.endswith(".py")):
            chosen.append(file)
    return chosen


def choose_variant(files: Iterable[str]) -> str | None:
    """None where the weights exist without a variant; else the variant there is, fp16 and bf16 first."""
    found: dict[str, set[str | None]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        match = WEIGHTS.fullmatch(name)
        if match is not None and name.endswith(".safetensors"):
            found.setdefault(folder, set()).add(match["variant"])
    lacking = [variants for variants in found.values() if None not in variants]
    if not lacking:
        return None
    common = set.intersection(*lacking)
    return min(common, key=lambda name: (name not in ("bf16", "fp16"), str(name))) if common else None


def _files(repository: str, folder: Path) -> dict[str, int]:
    """The repository's files and their sizes."""
    try:
        tree = huggingface_hub.get_cached_repo_tree(repository, revision=folder.name)
        return {file.path: file.size for file in tree}
    except CachedRepoTreeNotFoundError:  # fetched by an older huggingface_hub: take what is there
        return hub.sizes_in(folder)


def _snapshot(repository: str, revision: str | None, files: list[str], bar: type[Any] | None = None) -> Path:
    try:
        return hub.download(repository, revision, files, bar or _bar(ignore_progress, 0))
    except hub.HubError as error:
        at = f" at {revision}" if revision else ""
        text = f"there is no folder {repository} here, and repository {repository}{at} {error.reason}"
        if error.code == "no_network":
            text += (
                f"; connect this machine to the network, or run `mezzotint pull {repository}` where there is "
                "one and copy the cache"
            )
        raise ModelLoadError(text, code=error.code, permanent=error.permanent) from error


def _bar(progress: OnProgress, num_bytes: int) -> type[Any]:
    """A progress bar for huggingface_hub that draws nothing and tells `progress` the fraction on disk."""
    lock = threading.Lock()

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = str(kwargs.get("desc")).startswith(
                "Reconstructing"
            )  # of its three bars, that of bytes
            self._done = 0
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and num_bytes:
                with lock:  # files arrive in several threads
                    self._done += int(n or 0)
                    progress(DOWNLOADING, min(1.0, self._done / num_bytes))
            return None

    return Bar
