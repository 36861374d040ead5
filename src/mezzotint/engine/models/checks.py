"""What can be known of a model before anything of it is loaded: class, files, memory.

Every refusal is a ModelLoadError that says why and what to do.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from mezzotint import hub
from mezzotint.engine.models import remote_code, sources
from mezzotint.errors import ModelLoadError, echo
from mezzotint.families import family

LIBRARIES = ("diffusers", "transformers")
OVERHEAD = 1.1
"""Memory needed over the bytes of the weights: buffers, and what one forward holds."""

_FROM_PICTURES = (
    *("2Img", "ImageToImage", "Inpaint", "Fill", "Edit", "Layered", "Upscale", "SuperResolution", "Refiner"),
    *("Pix2Pix", "Variation"),
)
_OTHER_KINDS = ("Video", "Audio", "Music", "Control", "Prior", "Animate", "Adapter")
_OTHER_OUTPUT = {
    *("num_frames", "video_length", "num_videos_per_prompt", "audio_duration", "frame_size", "gen_length")
}
"""Pipeline arguments that only makers of video, sound, shapes or text have."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What will be read of a checked model."""

    class_name: str
    """Of the pipeline, or of a part that stands alone."""
    variant: str | None
    weights: dict[str, list[Path]]
    """Safetensors files by component."""


def check_folder(folder: Path, *, source: str = "", allow_remote_code: bool = False) -> ModelFiles:
    """Whether `folder` is a whole text-to-image pipeline with safetensors weights.

    `source` is what the model was called, where that is not the folder.
    """
    source = source or str(folder)
    if not (folder / sources.INDEX).is_file():
        raise ModelLoadError(_not_a_pipeline(folder), code="not_a_pipeline")
    index = sources.read_index(folder)
    name = _class_name(folder, source, index, allow_remote_code)
    parts = sources.components(index)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    variant = sources.choose_variant(file for file in files if file.partition("/")[0] in parts)
    weights = {}
    for component, (library, class_name) in parts.items():
        place = folder / component
        if not place.is_dir():
            raise ModelLoadError(
                f"{folder}: the folder {component} ({class_name}) is missing; fetch the whole model again",
                code="missing_file",
            )
        if library not in LIBRARIES and not _is_diffusers_module(library) and not allow_remote_code:
            raise _remote(folder, source, f"its {component} comes from {echo(library)}")
        if found := _weights(place, variant):
            weights[component] = found
    return ModelFiles(name, variant, weights)


def check_part(folder: Path) -> ModelFiles:
    """Whether `folder` is one whole part of a pipeline, such as a ControlNet, with safetensors weights."""
    config = folder / sources.PART
    if not config.is_file():
        raise ModelLoadError(
            f"{folder} has no {sources.PART}; give a folder as `save_pretrained` of diffusers writes it",
            code="missing_file",
        )
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelLoadError(
            f"{config} names no class: {error}; fetch it again", code="corrupt_file"
        ) from error
    variant = sources.choose_variant(path.name for path in folder.iterdir())
    return ModelFiles(str(name), variant, {folder.name: _weights(folder, variant)})


def check_class(name: str) -> Any:
    """The diffusers class `name`; ModelLoadError unless there is one and it makes pictures from text."""
    pipeline = getattr(diffusers, name, None)
    if not (inspect.isclass(pipeline) and issubclass(pipeline, diffusers.DiffusionPipeline)):
        raise ModelLoadError(
            f"diffusers {diffusers.__version__} has no pipeline class {echo(name)}; a newer one may",
            code="unsupported_class",
        )
    check_text_to_image(pipeline)
    return pipeline


def check_text_to_image(pipeline: Any) -> None:
    """ModelLoadError unless the pipeline class makes pictures from text, alone or with pictures to edit."""
    name = pipeline.__name__
    if family(name).edits_only:
        return
    if any(word in name for word in _FROM_PICTURES):
        raise ModelLoadError(
            f"pipeline class {name} makes pictures from pictures; Mezzotint runs it beside the text-to-image "
            "class of the same family: name that in model_index.json",
            code="unsupported_class",
        )
    parameters = inspect.signature(pipeline.__call__).parameters
    needs_picture = any(each.default is each.empty and "image" in each.name for each in parameters.values())
    makes_other = _OTHER_OUTPUT & set(parameters) or any(word in name for word in _OTHER_KINDS)
    if "prompt" not in parameters or needs_picture or makes_other:
        raise ModelLoadError(
            f"pipeline class {name} does not make a picture from text alone, which Mezzotint needs",
            code="unsupported_class",
        )


def check_memory(
    files: ModelFiles,
    dtype: torch.dtype,
    free: int,
    total: int,
    *,
    offload: bool = False,
    what: str = "the model",
) -> int:
    """Estimated bytes of `what` once loaded; ModelLoadError if they are more than `free`."""
    sizes = [sum(loaded_bytes(path, dtype) for path in paths) for paths in files.weights.values()]
    needed = int((max(sizes, default=0) if offload else sum(sizes)) * OVERHEAD)
    if needed > free:
        raise ModelLoadError(
            f"{what} needs about {_gigabytes(needed)} in {str(dtype).removeprefix('torch.')} and "
            f"{_gigabytes(free)} of {_gigabytes(total)} are free; choose a smaller dtype, turn on offload, "
            "stop what else uses the memory, or host it on a larger machine",
            code="not_enough_memory",
            permanent=needed > total,
        )
    return needed


def loaded_bytes(path: Path, dtype: torch.dtype) -> int:
    """Bytes that the tensors of a safetensors file take in memory once their floats are `dtype`."""
    total = 0
    for tensor in read_header(path).values():
        count = 1
        for size in tensor["shape"]:
            count *= size
        total += count * (dtype.itemsize if tensor["dtype"] in _FLOATS else _BYTES.get(tensor["dtype"], 1))
    return total


def read_header(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name; ModelLoadError unless the file is whole."""
    try:
        return hub.read_header(path)
    except (OSError, hub.HeaderError) as error:
        raise ModelLoadError(
            f"{path} is damaged or cut short: {error}; delete it and fetch the model again",
            code="corrupt_file",
        ) from error


def _class_name(folder: Path, source: str, index: dict[str, Any], allow_remote_code: bool) -> str:
    name = index.get("_class_name")
    if isinstance(name, list) and len(name) == 2:
        if not allow_remote_code:
            raise _remote(folder, source, f"its pipeline is defined in {echo(name[0])}")
        return str(name[1])
    if not isinstance(name, str):
        raise ModelLoadError(f"{folder / sources.INDEX} names no pipeline class", code="not_a_pipeline")
    check_class(name)
    return name


def _weights(place: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one component; empty for a component without weights."""
    for suffix in (f".{variant}", "") if variant else ("",):
        found = list(_named_weights(place, suffix))
        if found:
            for path in found:
                read_header(path)
            return found
    pickles = sorted(path.name for path in place.iterdir() if path.suffix in hub.PICKLES)
    if pickles:
        raise ModelLoadError(
            f"{place} has its weights only as {pickles[0]}, and loading such a file can run any program; use "
            "a version of the model with safetensors weights (`save_pretrained` of diffusers writes them)",
            code="pickle_only",
        )
    if (place / "config.json").is_file():
        raise ModelLoadError(
            f"{place} has a configuration and no safetensors weights; fetch the model again, all of it",
            code="missing_file",
        )
    return []


def _named_weights(place: Path, variant: str) -> Iterator[Path]:
    for stem in ("diffusion_pytorch_model", "model"):
        single = place / f"{stem}{variant}.safetensors"
        if single.is_file():
            yield single
            return
        index = place / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            yield from _shards(index)
            return


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            f"{index} cannot be read: {error}; fetch the model again", code="corrupt_file"
        ) from error
    paths = [index.parent / name for name in sorted(names)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ModelLoadError(
            f"{missing[0]} is missing, as are {len(missing) - 1} more weight files; fetch the model again",
            code="missing_file",
        )
    return paths


def _is_diffusers_module(library: str) -> bool:
    return hasattr(diffusers.pipelines, library)


def _not_a_pipeline(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not folder.is_dir():
        return f"{folder} is neither a folder nor a safetensors file"
    if names & {hub.PEFT_CONFIG, hub.DIFFUSERS_WEIGHTS}:
        return f"{folder} holds an adapter, not a model; register it as an adapter of an endpoint"
    if "config.json" in names:
        return (
            f"{folder} holds one component of a pipeline; give the folder above it, that with {sources.INDEX}"
        )
    single = sorted(name for name in names if name.endswith(".safetensors"))
    if single:
        return f"{folder} has no {sources.INDEX}; for a single-file checkpoint give the file, {single[0]}"
    return f"{folder} is not a diffusers pipeline: it has no {sources.INDEX}"


def _remote(folder: Path, source: str, reason: str) -> ModelLoadError:
    permission = remote_code.permission_for(source, folder)
    return ModelLoadError(
        f"{folder} needs Python code of its own: {reason}; if you have read it and trust its author, write "
        f"allow_remote_code = {json.dumps(permission)} in the configuration file",
        code="remote_code",
    )


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
