"""ControlNets beside a pipeline: found, checked and read as its own parts are, from safetensors only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError

from mezzotint.engine.models import checks, hardware, sources
from mezzotint.errors import ModelLoadError, echo
from mezzotint.messages import LOADING
from mezzotint.spec import ControlNetSettings

_MANY = "Multi"
"""What a class has in its name that holds several ControlNets."""


def pipeline_class(pipe: Any) -> Any:
    """The class of the same family that follows ControlNets, or None."""
    return getattr(diffusers, type(pipe).__name__.replace("Pipeline", "ControlNetPipeline"), None)


def read(
    pipe: Any,
    settings: Sequence[ControlNetSettings],
    dtype: torch.dtype,
    device: torch.device,
    *,
    offload: bool = False,
    progress: sources.OnProgress = sources.ignore_progress,
) -> dict[str, Any]:
    """The ControlNets of an endpoint by route, on the device; ModelLoadError says what is wrong with one."""
    return {
        each.route: _read(pipe, each, dtype, device, offload=offload, progress=progress) for each in settings
    }


def _read(
    pipe: Any,
    settings: ControlNetSettings,
    dtype: torch.dtype,
    device: torch.device,
    *,
    offload: bool,
    progress: sources.OnProgress,
) -> Any:
    name = f"ControlNet {settings.route}"
    wanted = accepted(pipe)
    if not wanted:
        raise ModelLoadError(
            f"{name}: diffusers has no ControlNet for {type(pipe).__name__}; take it out of the endpoint",
            code="unsupported_class",
        )
    folder = sources.locate_part(settings.source, progress=progress)
    files = checks.check_part(folder)
    cls: Any = next((each for each in wanted if each.__name__ == files.class_name), None)
    if cls is None:
        names = " or ".join(each.__name__ for each in wanted)
        raise ModelLoadError(
            f"{name} is a {echo(files.class_name)}, and {type(pipe).__name__} follows a {names}; use one "
            "that was made for this model",
            code="unsupported_class",
        )
    free, total = hardware.memory(device)
    checks.check_memory(files, dtype, free, total, offload=offload, what=name)
    progress(LOADING, None)
    try:
        made = cls.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, variant=files.variant, local_files_only=True
        )
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ModelLoadError(
            f"{name} could not be loaded: {type(error).__name__}: {reason}", code="model_load_failed"
        ) from error
    _require_one_kind(name, made.config)
    return made.to(device).requires_grad_(False).eval()


def accepted(pipe: Any) -> list[type[ModelMixin]]:
    """The classes of ControlNets that pipelines of this family follow."""
    return [each for each in _types(pipe) if _MANY not in each.__name__]


def together(pipe: Any, nets: Sequence[Any]) -> Any:
    """The one component that these ControlNets are for a pipeline; LookupError where it follows one only."""
    if len(nets) == 1:
        return nets[0]
    many: Any = [each for each in _types(pipe) if _MANY in each.__name__]
    if not many:
        raise LookupError(f"{type(pipe).__name__} follows one ControlNet, not several")
    return many[0](list(nets))


def _types(pipe: Any) -> list[type[ModelMixin]]:
    cls = pipeline_class(pipe)
    types = cls._get_signature_types().get("controlnet", ()) if cls is not None else ()
    return [each for each in types if inspect.isclass(each)]


def _require_one_kind(name: str, config: Mapping[str, Any]) -> None:
    """A union of several kinds wants to be told which; no request can say that."""
    if config.get("num_mode") or config.get("union"):
        raise ModelLoadError(
            f"{name} is a union of several kinds of control, and requests cannot name one; use a ControlNet "
            "of one kind",
            code="unsupported_class",
        )
