"""From what a pipeline returned or raised to the message that ends a job, and to a library user's Result."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mezzotint.engine.steps.runner import is_out_of_memory
from mezzotint.errors import (
    GenerationError,
    InvalidRequestError,
    MezzotintError,
    NotFoundError,
    RequestCancelledError,
)
from mezzotint.input_pictures import to_image
from mezzotint.messages import Cancelled, Done, Failed
from mezzotint.spec import ImageSpec

Image = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]
"""Height x width x 3, or x 4 with alpha."""

MAX_TEXT = 300
"""Most characters of a library's own error text that an answer repeats."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one request: an image, or the error that ended it."""

    request: ImageSpec
    seed: int
    """The seed used; drawn where the request had none."""
    image: Image | None
    """uint8, height x width x 3, or x 4 with alpha; None if the request failed."""
    layers: tuple[Image, ...] = ()
    """Where the model draws its picture in layers: all of them, `image` the first; else empty."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds: `generate_s` from admission to the picture, `adapter_load_s` of it for a cold adapter."""
    warnings: tuple[str, ...] = ()
    error: MezzotintError | None = None


def pixels(result: Any) -> list[Image]:
    """uint8 pixels of a pipeline's first image, by the rule by which diffusers makes its PIL images.

    One, or one for each layer. GenerationError where that is no colour picture.
    """
    try:
        images = result[0] if isinstance(result, tuple) else getattr(result, "images", None)
        images = result.image if images is None else images  # Kandinsky 5's word
        found = np.asarray(images[0])
        if not np.isfinite(found).all():
            raise GenerationError(
                "the model's picture holds values that are no numbers; its weights may be damaged, or fp16 "
                "too narrow for it: choose another dtype"
            )
        layers = (found * 255).round().astype(np.uint8)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise GenerationError(f"the pipeline returned no picture ({type(error).__name__}: {error})") from None
    pictures: list[Image] = list(layers) if layers.ndim == 4 else [layers]
    if not pictures or pictures[0].ndim != 3 or pictures[0].shape[2] not in (3, 4):
        raise GenerationError(
            f"the pipeline returned an array of shape {layers.shape}; height x width x 3 or 4 can be shown"
        )
    return pictures


def repainted(picture: Image, spec: ImageSpec) -> Image:
    """`picture` where the mask of `spec` is white, else the pixels that came with the request.

    The autoencoder changes what it only passes through, so a pipeline alone keeps no pixel as it was.
    """
    if spec.mask is None:
        return picture
    size = picture.shape[1], picture.shape[0]
    kept = np.asarray(to_image(spec.images[0], size), np.uint16)
    share = np.asarray(to_image(spec.mask, size), np.uint16)[:, :, None]
    mixed = ((picture[:, :, :3] * share + kept * (255 - share) + 127) // 255).astype(np.uint8)
    if picture.shape[2] == 4:
        opaque = (picture[:, :, 3:] * share + 255 * (255 - share) + 127) // 255
        mixed = np.concatenate([mixed, opaque.astype(np.uint8)], axis=2)
    return mixed


def failed_event(job_id: str, error: Exception, *, size: str, refused: bool) -> Failed:
    """The message for a job that `error` ended; `refused`: before its first denoiser forward."""
    if isinstance(error, MezzotintError):
        return Failed(job_id, error.code, error.message, error.param)
    if is_out_of_memory(error):
        advice = (
            f"not enough memory for a {size} picture; ask for a smaller one, or lower max_rows or max_jobs"
        )
        return Failed(job_id, "out_of_memory", advice)
    text = f"{type(error).__name__}: {error}"[:MAX_TEXT]
    if refused and isinstance(error, (ValueError, TypeError)):
        return Failed(job_id, InvalidRequestError.codes[0], f"the pipeline refused the request: {text}")
    _log.error("job %s failed", job_id, exc_info=error)
    return Failed(job_id, GenerationError.codes[0], f"generation failed: {text}")


def result_of(request: ImageSpec, seed: int, event: Done | Failed | Cancelled) -> Result:
    """What a library user gets for the event that ended a job."""
    if isinstance(event, Done):
        layers = tuple(
            np.frombuffer(pixels, np.uint8).reshape(event.height, event.width, -1)
            for pixels in event.pictures
        )
        timings = {"generate_s": event.generate_s, "adapter_load_s": event.adapter_load_s}
        warnings = tuple(event.warnings)
        return Result(request, seed, layers[0], layers if len(layers) > 1 else (), timings, warnings)
    if isinstance(event, Cancelled):
        return Result(request, seed, None, error=RequestCancelledError("the request was cancelled"))
    error = _CLASSES.get(event.code, InvalidRequestError)
    return Result(request, seed, None, error=error(event.message, code=event.code, param=event.param))


_CLASSES: Mapping[str, type[MezzotintError]] = {
    "generation_failed": GenerationError,
    "out_of_memory": GenerationError,
    "adapter_not_found": NotFoundError,
}
