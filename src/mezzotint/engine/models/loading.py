"""Builds a pipeline: from a source, in a dtype, on a device, with memory laid out for speed or left as it is.

Its `main` is the program behind `mezzotint pull`: it fetches a model and prints where it lies.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils
from safetensors import SafetensorError

from mezzotint.engine import manifest
from mezzotint.engine.models import checks, controlnets, forms, hardware, remote_code, sources
from mezzotint.engine.models.schedulers import set_scheduler
from mezzotint.engine.models.watch import LoadWatch
from mezzotint.errors import ModelLoadError
from mezzotint.families import family
from mezzotint.spec import EngineSettings

Performance = Literal["auto", "reference", "max"]

DECODERS = ("vae", "movq", "vqgan")
"""Components that turn latents into pixels: convolutions, for which channels_last is faster."""
ALIGNMENT = 64
DEFAULTS = EngineSettings()
TOLERANCE = {torch.float32: 0.004, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of a channel value (0 to 1) between performance settings; the mean is a tenth of it."""
MAX_PACKED_BYTES = 512 * 1024 * 1024
"""Largest linear layers in all that get a second, packed copy: larger models gain nothing from it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline that is ready to run, and what was decided for it."""

    pipe: Any
    dtype: str
    """bf16, fp16 or fp32."""
    device: str
    num_threads: int
    performance: Performance
    num_parameters: int
    load_s: float
    manifest: manifest.Manifest = manifest.EMPTY
    controlnets: Mapping[str, Any] = field(default_factory=dict)
    """By route, in the endpoint's order."""
    forms: forms.Forms = field(default_factory=lambda: forms.Forms(None))
    """Of the denoiser: which one is in use, and what is ready for the next start."""

    @property
    def form(self) -> str:
        """What the denoiser runs as: `reference`, `auto`, or the name of a compiled form."""
        return self.performance if self.performance == "reference" else self.forms.name


def load(
    source: str | Path | Any,
    settings: EngineSettings = DEFAULTS,
    *,
    form: str | None = None,
    progress: sources.OnProgress = sources.ignore_progress,
) -> Loaded:
    """Builds the pipeline of `source`: built-in name, folder, safetensors file, repository or pipeline.

    `form` is the compiled form that `performance = "max"` must use, or `auto`; None takes what is ready.
    A ready pipeline keeps its own dtype where `settings.dtype` is auto. ModelLoadError says why a model
    cannot load, and what to do about it.
    """
    start = time.perf_counter()
    threads = hardware.set_threads(settings.num_threads)
    device = hardware.choose_device(settings.device)
    said, path = manifest.EMPTY, None
    if isinstance(source, diffusers.DiffusionPipeline):
        checks.check_text_to_image(type(source))
        pipe = source
        if settings.dtype == "auto":
            chosen = _own_dtype(pipe)
        else:
            chosen, _ = hardware.choose_dtype(settings.dtype, device)
            pipe.to(chosen)
    else:
        chosen, _ = hardware.choose_dtype(settings.dtype, device)
        name = str(source)
        code = remote_code.may_need_code(settings.allow_remote_code, name)
        path = sources.locate(name, settings.revision, progress=progress, code=code)
        said = manifest.read(path)
    with LoadWatch(progress) as watch:
        if path is not None:
            permitted = remote_code.is_permitted(settings.allow_remote_code, name, path)
            pipe = _read(
                path, name, chosen, device, watch, offload=settings.offload, allow_remote_code=permitted
            )
        set_scheduler(pipe, settings.scheduler, settings.scheduler_settings)
        _move(pipe, device, offload=settings.offload)
        tune(pipe, settings.performance)
        denoiser = getattr(pipe, family(type(pipe).__name__).denoiser, None)
        known = forms.Forms(None)
        if settings.performance == "max":
            known = forms.prepare(denoiser, settings, device)
            known.use(denoiser, form)
    beside = controlnets.read(
        pipe, settings.controlnets, chosen, device, offload=settings.offload, progress=progress
    )
    if settings.performance != "reference":
        for each in beside.values():
            _align(each)
    return Loaded(
        pipe=pipe,
        dtype=next(name for name, value in hardware.DTYPES.items() if value == chosen),
        device=str(device),
        num_threads=threads,
        performance=settings.performance,
        num_parameters=sum(
            parameter.numel()
            for module in (*_modules(pipe), *beside.values())
            for parameter in module.parameters()
        ),
        load_s=time.perf_counter() - start,
        manifest=said,
        controlnets=beside,
        forms=known,
    )


def pull(
    source: str, revision: str | None = None, *, progress: sources.OnProgress = sources.ignore_progress
) -> Path:
    """Fetches a model if need be, checks that it is whole, and says where it lies."""
    path = sources.locate(source, revision, progress=progress)
    if path.is_dir():
        checks.check_folder(path)
    else:
        checks.read_header(path)
    return path


def tune(pipe: Any, performance: Performance) -> None:
    """Lays the weights out as `performance` says.

    `reference` changes nothing: the same bytes as plain diffusers. `auto` and `max` give the VAE the
    channels_last layout, copy weights to aligned memory (results no longer depend on where a tensor lies in
    its file) and pack the linear layers of a small bf16 denoiser on the CPU, which moves last bits in a few
    shapes. Each keeps the promise of `exact` to itself; TOLERANCE says how far they are from `reference`.
    """
    if performance == "reference":
        return
    for name, module in _named_modules(pipe):
        for parameter in module.parameters():
            if parameter.ndim == 4 and name in DECODERS:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        _align(module)
    denoiser = getattr(pipe, family(type(pipe).__name__).denoiser, None)
    if denoiser is not None:
        _pack(denoiser)


def _align(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def _pack(denoiser: torch.nn.Module) -> None:
    """Gives each linear layer a second copy of its weight in the order that oneDNN works in."""
    layers = [
        layer
        for layer in denoiser.modules()
        if type(layer) is torch.nn.Linear
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.bfloat16
    ]
    mkldnn: Any = torch.backends.mkldnn
    supported = mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not supported or sum(layer.weight.nbytes for layer in layers) > MAX_PACKED_BYTES:
        return
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        layer.forward = functools.partial(_packed_forward, packed, layer.bias)  # type: ignore[method-assign]


def _packed_forward(packed: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result


def _read(
    path: Path,
    source: str,
    dtype: torch.dtype,
    device: torch.device,
    watch: LoadWatch,
    *,
    offload: bool,
    allow_remote_code: bool,
) -> Any:
    free, total = hardware.memory(device)
    try:
        if path.is_file():
            return _read_file(path, dtype, free, total, offload=offload)
        files = checks.check_folder(path, source=source, allow_remote_code=allow_remote_code)
        watch.expected_bytes = checks.check_memory(files, dtype, free, total, offload=offload)
        with _no_progress_bars():
            return diffusers.DiffusionPipeline.from_pretrained(
                str(path),
                dtype=dtype,
                use_safetensors=True,
                variant=files.variant,
                local_files_only=True,
                trust_remote_code=allow_remote_code,
            )
    except (
        *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError),
        NameError,  # diffusers' own, where a class needs a package that is missing
    ) as error:
        raise _load_error(path, error) from error
    except SafetensorError as error:
        raise ModelLoadError(
            f"{path}: a weight file is damaged: {error}; fetch the model again", code="corrupt_file"
        ) from error


def _read_file(path: Path, dtype: torch.dtype, free: int, total: int, *, offload: bool) -> Any:
    """A checkpoint in its author's own format; diffusers knows the repository with its configuration."""
    if path.suffix != ".safetensors":
        raise ModelLoadError(
            f"{path} is not a safetensors file; other formats can run any program when loaded: use the "
            "safetensors version of the checkpoint",
            code="pickle_only",
        )
    checks.read_header(path)
    checks.check_memory(checks.ModelFiles("", None, {"file": [path]}), dtype, free, total, offload=offload)
    state = single_file_utils.load_single_file_checkpoint(str(path), local_files_only=True)
    known = single_file_utils.fetch_diffusers_config(state)
    del state
    config = sources.fetch(known["pretrained_model_name_or_path"], weights=False)
    pipeline = checks.check_class(str(sources.read_index(config).get("_class_name")))
    if not hasattr(pipeline, "from_single_file"):
        raise ModelLoadError(
            f"{path} belongs to {pipeline.__name__}, which diffusers reads only from a folder; use that",
            code="unsupported_class",
        )
    with _no_progress_bars():
        return pipeline.from_single_file(str(path), config=str(config), dtype=dtype, local_files_only=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """No progress bars of the libraries: loading is told through `progress`, and logs stay logs."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _load_error(path: Path, error: Exception) -> ModelLoadError:
    if isinstance(error, torch.OutOfMemoryError):
        return ModelLoadError(
            f"{path}: the device ran out of memory while loading; choose a smaller dtype or turn on offload",
            code="not_enough_memory",
            permanent=False,
        )
    if (missing := _missing_package(error)) is not None:
        return ModelLoadError(
            f"{path} needs the package {missing}, which is not installed; install it with "
            "`pip install 'mezzotint[vision]'` and start the endpoint again",
            code="missing_package",
        )
    _log.debug("loading %s failed", path, exc_info=error)
    reason = " ".join(str(error).split())[:500]
    return ModelLoadError(
        f"{path} could not be loaded by diffusers {diffusers.__version__}: {type(error).__name__}: {reason}; "
        "check that it is complete and made for this version",
        code="model_load_failed",
    )


def _missing_package(error: Exception) -> str | None:
    """torchvision, where its absence is what `error` comes from; the libraries say so in three ways."""
    if importlib.util.find_spec("torchvision") is not None:
        return None
    text = str(error)
    absent = isinstance(error, NameError) or "Torchvision" in text or ".Placeholder" in text
    return "torchvision" if absent else None


def _own_dtype(pipe: Any) -> torch.dtype:
    if pipe.dtype not in hardware.DTYPES.values():
        raise ModelLoadError(
            f"the pipeline is in {pipe.dtype}; name one of {', '.join(hardware.DTYPES)} as dtype",
            code="invalid_setting",
        )
    dtype: torch.dtype = pipe.dtype
    return dtype


def _move(pipe: Any, device: torch.device, *, offload: bool) -> None:
    if offload and device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    for module in _modules(pipe):
        module.requires_grad_(False).eval()


def _modules(pipe: Any) -> list[torch.nn.Module]:
    return [module for _, module in _named_modules(pipe)]


def _named_modules(pipe: Any) -> list[tuple[str, torch.nn.Module]]:
    return [(name, part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]


def main(arguments: Sequence[str] | None = None) -> int:
    """`pull SOURCE [--revision R] [--json]`: the path to standard output, progress and errors to stderr."""
    parser = argparse.ArgumentParser(prog="mezzotint")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pull")
    command.add_argument("source")
    command.add_argument("--revision")
    command.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        path = pull(options.source, options.revision, progress=_show)
    except ModelLoadError as error:
        sys.stderr.write(("\n" if sys.stderr.isatty() else "") + f"mezzotint: {error.message}\n")
        return 1
    sys.stdout.write(
        (json.dumps({"source": options.source, "path": str(path)}) if options.json else str(path)) + "\n"
    )
    return 0


def _show(stage: str, fraction: float | None) -> None:
    if fraction is not None and sys.stderr.isatty():
        sys.stderr.write(f"\r{stage} {fraction:4.0%}" + ("\n" if fraction >= 1 else ""))


if __name__ == "__main__":
    sys.exit(main())
