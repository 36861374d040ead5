"""The forms of a denoiser: as it was loaded, or compiled for the shapes of its endpoint's requests.

What a build (compiling.py) has found lies in a folder of its own: a package of AOTInductor with code and
weights for each number of rows, and RECORD, which says what they take and why they are used. A start only
loads them: nothing is traced or compiled, so a form gives the same bytes at every start. The folder's name is
a digest of all that the code was made for: see `place`.

Rows with an adapter never go through a compiled form, and never share a forward with rows that do: which form
a row takes follows from its request alone (see `as_loaded` in `install`).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import platform
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from mezzotint import __version__
from mezzotint.engine.models import host
from mezzotint.spec import EngineSettings

RECORD = "record.json"
AS_LOADED = "auto"
"""The form of a denoiser that is not compiled."""
_SHAPED_BY = (
    *("width", "height", "batching", "max_rows", "min_batch_gain", "max_batch_stretch", "arguments"),
    *("scheduler", "scheduler_settings"),
)
"""Settings that decide with which shapes the denoiser runs."""
_SAMPLED = 4096
"""Values of each weight that tell a model from another."""

Graph = Callable[[Mapping[str, Any]], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Package:
    """The compiled forward for one number of rows."""

    rows: int
    file: str
    takes: Hashable
    """Its arguments, as `described`."""
    gain: float
    """How many times as fast as the denoiser as loaded, the median of interleaved rounds."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a build has decided, once and for all."""

    text: str
    """In words, for people."""
    packages: tuple[Package, ...] = ()
    """Empty: the denoiser stays as it was loaded."""

    @property
    def form(self) -> str:
        """The name of the form: `auto`, or one that no other code has."""
        if not self.packages:
            return AS_LOADED
        return f"compiled-{hashlib.sha256(repr(self.packages).encode()).hexdigest()[:8]}"

    @property
    def max_rows(self) -> int:
        """Most rows of a forward that is compiled."""
        return max(package.rows for package in self.packages)


class Forms:
    """The form in use of one loaded denoiser, and what its folder holds for the next start."""

    def __init__(self, folder: Path | None, text: str = "") -> None:
        """Without a folder nothing can be compiled, and `text` says why."""
        self.folder = folder
        self.used: Record | None = None
        """Set by `use`."""
        self.text = text
        """Why it runs in this form; whoever builds another one writes it."""

    @property
    def name(self) -> str:
        """The form in use; calibrations and pictures hold for it."""
        return AS_LOADED if self.used is None else self.used.form

    def use(self, denoiser: torch.nn.Module | None, wanted: str | None) -> None:
        """Puts the recorded form in place, if it is the `wanted` one; None takes what is recorded."""
        if self.folder is None or denoiser is None:
            return
        record = read(self.folder)
        if record is None:
            self.text = "as loaded: nothing has been compiled yet, for want of memory beside the worker"
        elif not record.packages:
            self.text = record.text
        elif wanted not in (None, record.form):
            self.text = next_start(record)
        else:
            try:
                graphs = {each.takes: load(self.folder / each.file) for each in record.packages}
            except (OSError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                self.text = f"as loaded: the compiled code in {self.folder} cannot be used ({reason})"
                return
            install(denoiser, graphs)
            self.used, self.text = record, record.text


def next_start(record: Record) -> str:
    """What to say of a record that was not there, or not wanted, when the worker started."""
    if not record.packages:
        return record.text
    return f"as loaded; the next start of the endpoint uses what is ready: {record.text}"


def prepare(denoiser: torch.nn.Module | None, settings: EngineSettings, device: torch.device) -> Forms:
    """The forms of a pipeline that was just loaded with `performance = "max"`; none is in use yet."""
    if denoiser is None:
        return Forms(None, "as loaded: the pipeline has no denoiser that is known")
    if device.type not in ("cpu", "cuda"):
        return Forms(None, f"as loaded: on {device.type} nothing is compiled")
    if settings.offload and device.type != "cpu":
        return Forms(None, "as loaded: an offloaded model is not compiled")
    if device.type == "cpu" and host.cpp_compiler() is None:
        return Forms(
            None, "as loaded: compiling needs a C++ compiler (g++, or the one that CXX names); install one"
        )
    return Forms(place(denoiser, settings, device))


def cache_folder() -> Path:
    """Where compiled code lies: in this user's cache, for it can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mezzotint" / "compiled"


def place(denoiser: torch.nn.Module, settings: EngineSettings, device: torch.device) -> Path:
    """The folder for this model, device and thread count, these shapes and this installation."""
    on = host.cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    made_for = {
        "versions": [__version__, torch.__version__, diffusers.__version__, platform.platform()],
        "processor": [on, sorted(name for name, there in host.cpu_features().items() if there)],
        "device": device.type,
        "threads": torch.get_num_threads(),
        "settings": {name: repr(getattr(settings, name)) for name in _SHAPED_BY},
        "model": _fingerprint(denoiser),
    }
    return cache_folder() / hashlib.sha256(json.dumps(made_for).encode()).hexdigest()[:32]


def _fingerprint(denoiser: torch.nn.Module) -> str:
    """Of the class, the configuration, and values from everywhere in every weight."""
    found = hashlib.sha256(f"{type(denoiser).__name__} {getattr(denoiser, 'config', '')}".encode())
    for name, tensor in denoiser.state_dict().items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        values = tensor.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // _SAMPLED)].cpu().contiguous()
        found.update(sample.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read(folder: Path) -> Record | None:
    """What a build left in this folder; None before one has ended there."""
    try:
        values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        packages = [Package(**each | {"takes": _tuples(each["takes"])}) for each in values["packages"]]
        return Record(values["text"], tuple(packages))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(folder: Path, record: Record) -> None:
    """Makes `record` what every later start finds: all of it or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{RECORD}.{os.getpid()}"
    draft.write_text(json.dumps(asdict(record)), encoding="utf-8")
    draft.replace(folder / RECORD)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# ---------------------------------------------------------------- forwards


def install(denoiser: torch.nn.Module, graphs: MutableMapping[Hashable, Graph]) -> None:
    """Lets `denoiser.forward` run a graph where there is one for its arguments, and else what it ran before.

    What it ran before is its attribute `as_loaded`: taps hand it the calls of jobs that change what the
    denoiser computes, by an adapter or with attention of their own.
    """
    before = denoiser.forward
    names = tuple(inspect.signature(before).parameters)

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        graph = graphs.get(described(arguments))
        return before(*args, **kwargs) if graph is None else graph(arguments)

    setattr(forward, "as_loaded", before)  # noqa: B010
    setattr(denoiser, "forward", forward)  # noqa: B010


def load(file: Path) -> Graph:
    """A compiled forward; OSError or RuntimeError where the file cannot be used."""
    package = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1)

    def graph(arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return tuple(package.run([tensor.contiguous() for tensor in tensors(arguments)]))

    return graph


def described(value: Any) -> Hashable:
    """All that a compiled forward takes for granted of its arguments: everything but the tensors' values."""
    if isinstance(value, Tensor):
        return (str(value.dtype), *value.shape)
    if isinstance(value, Mapping):
        return ("{}", *((str(name), described(value[name])) for name in sorted(value)))
    if isinstance(value, (list, tuple)):
        return ("[]", *map(described, value))
    return repr(value)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among arguments, in the order in which a compiled forward takes them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield from tensors(value[name])
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)


def filled(value: Any, given: Iterator[Tensor]) -> Any:
    """Arguments like `value` with these tensors in the places of its own."""
    if isinstance(value, Tensor):
        return next(given)
    if isinstance(value, Mapping):
        found = {name: filled(value[name], given) for name in sorted(value)}
        return {name: found[name] for name in value}
    if isinstance(value, (list, tuple)):
        return type(value)(filled(each, given) for each in value)
    return value


def packages_words(packages: Sequence[Package]) -> str:
    """`1 and 4 rows, 1.31 and 1.12 times as fast as loaded`."""
    rows, gains = (
        " and ".join(", ".join(words).rsplit(", ", 1)) if len(words) > 1 else words[0]
        for words in ([str(each.rows) for each in packages], [f"{each.gain:.2f}" for each in packages])
    )
    return f"{rows} row{'s' if rows != '1' else ''}, {gains} times as fast as loaded"
