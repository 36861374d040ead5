"""The flags of `bench` that describe a load, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import typer

from mezzotint.errors import InvalidRequestError
from mezzotint.load.arrivals import Mix, Process, read_size

Value = TypeVar("Value")

ArrivalsFlag = Annotated[str, typer.Option(metavar="KIND", help="`poisson` or `bursty`.")]
TraceFlag = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Replay this CSV or JSONL instead: columns seconds, steps, n, adapter, size, seed.",
    ),
]
SecondsFlag = Annotated[float, typer.Option(metavar="S", min=0.001, help="For how long requests arrive.")]
CvFlag = Annotated[
    float, typer.Option(metavar="C", min=0.01, help="Coefficient of variation of the gaps of `bursty`.")
]
MixStepsFlag = Annotated[
    str | None, typer.Option(metavar="MIX", help="Steps and their shares. [4:60,28:30,50:10]")
]
MixNFlag = Annotated[str, typer.Option("--n", metavar="MIX", help="Pictures of a request and their shares.")]
MixSizesFlag = Annotated[
    str | None, typer.Option("--sizes", metavar="MIX", help="Such as 512x512:3,1024x1024:1. [the endpoint's]")
]
LoadSeedFlag = Annotated[
    int, typer.Option("--seed", metavar="S", min=0, help="Same seed, same requests at the same moments.")
]
DEFAULT_N = "1:58,2:8,4:19,8:15"


def read_mix(*, steps: str | None, n: str, sizes: str | None, zipf: float) -> Mix:
    """The mix that these flags describe; InvalidRequestError names the flag that is wrong."""
    return Mix(
        _shares("steps", steps, _number("steps", 50)) if steps else Mix().steps,
        _shares("n", n, _number("n", 10)),
        _shares("sizes", sizes, _size) if sizes else Mix().sizes,
        zipf=zipf,
    )


def read_process(kind: str) -> Process:
    """What `--arrivals` names."""
    if kind not in get_args(Process):
        choices = " or ".join(get_args(Process))
        raise InvalidRequestError(
            f"--arrivals must be {choices}, or give --trace FILE (got {kind})", param="arrivals"
        )
    return cast(Process, kind)


def _shares(flag: str, text: str, read: Callable[[str], Value]) -> tuple[tuple[Value, float], ...]:
    found = []
    for part in text.split(","):
        value, _, share = part.strip().rpartition(":") if ":" in part else (part.strip(), "", "1")
        try:
            weight = float(share)
        except ValueError:
            weight = -1.0
        if not 0 < weight < float("inf"):
            raise InvalidRequestError(
                f"--{flag}: each part is VALUE:SHARE with a share above 0 (got {part})", param=flag
            )
        found.append((read(value), weight))
    return tuple(found)


def _number(flag: str, most: int) -> Callable[[str], Any]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
            raise InvalidRequestError(f"--{flag}: values must be 1 to {most} (got {text})", param=flag)
        return int(text)

    return read


def _size(text: str) -> Any:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise InvalidRequestError(f"--sizes: values must be like 512x512 (got {text})", param="sizes")
    return read_size(text)
