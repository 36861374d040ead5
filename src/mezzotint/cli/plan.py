"""`mezzotint plan`: how many workers a load needs, by simulating the server with measured step times."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.generate import first_endpoint
from mezzotint.cli.load_options import (
    DEFAULT_N,
    ArrivalsFlag,
    CvFlag,
    LoadSeedFlag,
    MixNFlag,
    MixSizesFlag,
    MixStepsFlag,
    SecondsFlag,
    TraceFlag,
    read_mix,
    read_process,
)
from mezzotint.cli.options import ConfigFlag, DataDirFlag, EndpointFlag, JsonFlag, ServerFlag
from mezzotint.cli.reach import ENDPOINTS, managed
from mezzotint.cli.tables import print_facts, print_table
from mezzotint.errors import InvalidRequestError
from mezzotint.load.arrivals import BURSTY_CV, generated, read_trace

if TYPE_CHECKING:
    from mezzotint.config import EndpointSettings
    from mezzotint.sizing.objective import Objective
    from mezzotint.sizing.speed import Speed

NOT_MET = 1
WITHIN_UNLESS_ASKED = 0.9
MEAN_DRAWS = 1000
"""Requests drawn of a mix to know what its mean one takes alone."""


def plan(
    times: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Step times of a file of `mezzotint bench` against one worker."),
    ] = None,
    step_s: Annotated[
        str | None,
        typer.Option(
            metavar="S", help="Step times by hand: 0.05, or by jobs that share a step 1:0.05,4:0.12."
        ),
    ] = None,
    picture_s: Annotated[
        float | None,
        typer.Option(
            metavar="S", min=0, help="Seconds of a worker for a picture beside its steps. [one step]"
        ),
    ] = None,
    load_s: Annotated[
        float | None,
        typer.Option(
            metavar="S", min=0, help="Seconds from a worker's start until it is ready. [as measured]"
        ),
    ] = None,
    endpoint: EndpointFlag = None,
    arrivals: ArrivalsFlag = "poisson",
    trace: TraceFlag = None,
    seconds: SecondsFlag = 600.0,
    load: Annotated[
        float | None,
        typer.Option(metavar="L", min=0.001, help="Lone seconds of requests that arrive each second."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(metavar="R", min=0.0001, help="Requests a second, instead of --load.")
    ] = None,
    cv: CvFlag = BURSTY_CV,
    steps: MixStepsFlag = None,
    n: MixNFlag = DEFAULT_N,
    sizes: MixSizesFlag = None,
    seed: LoadSeedFlag = 0,
    p95: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="95 % of the requests are done within this.")
    ] = None,
    within_3x: Annotated[
        float | None,
        typer.Option(
            "--within-3x",
            metavar="SHARE",
            min=0,
            max=1,
            help="This share is done within 3 times its lone time. [0.9, where no objective is given]",
        ),
    ] = None,
    done: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", min=0, max=1, help="This share is done by its deadline, and not refused."
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(metavar="S", min=0.1, help="A request's deadline. [the endpoint's, or 600]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=64, help="Look at this number only. [search the fewest]"),
    ] = None,
    max_workers: Annotated[
        int, typer.Option(metavar="N", min=1, max=64, help="Most workers that the search tries.")
    ] = 64,
    min_replicas: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, max=64, help="Let the load decide, from so many workers."),
    ] = None,
    max_replicas: Annotated[int | None, typer.Option(metavar="N", min=1, max=64, help="To so many.")] = None,
    target_backlog: Annotated[
        float | None, typer.Option(metavar="S", min=0.001, help="`target_backlog_s`. [the endpoint's, or 5]")
    ] = None,
    scale_up_delay: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="`scale_up_delay_s`. [the endpoint's, or 10]")
    ] = None,
    scale_down_delay: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="`scale_down_delay_s`. [the endpoint's, or 300]")
    ] = None,
    server: ServerFlag = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Says how many workers a load needs, and what that costs in worker-hours.

    It simulates the server under a clock that does not wait. Admission, queue, scheduling and scaling are
    the server's own code; only forwards are replaced by their measured times. The times are those of the
    running endpoint, unless --times or --step-s gives others. A worker is one GPU of the kind that was
    measured. Exit status 1 where the objective is not met.

    Example: `mezzotint plan --rate 2 --p95 5`
    """
    import structlog

    from mezzotint.config import EndpointSettings
    from mezzotint.sizing import objective as sizing
    from mezzotint.sizing.simulation import fixed, lone_times

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    if sum(given is not None for given in (trace, load, rate)) != 1:
        raise InvalidRequestError("say what arrives: one of --rate, --load and --trace", param="rate")
    scales = min_replicas is not None or max_replicas is not None
    if scales and workers is not None:
        raise InvalidRequestError(
            "--workers is fixed: leave --min-replicas and --max-replicas out", param="workers"
        )
    process, mix = read_process(arrivals), read_mix(steps=steps, n=n, sizes=sizes, zipf=1.0)
    if times is not None or step_s is not None:
        speed, spec = _given(times, step_s), EndpointSettings(id="plan")
    else:
        speed, spec = _measured(endpoint, server, config, data_dir)
    if picture_s is not None:
        speed = replace(speed, picture_s=picture_s)
    if load_s is not None:
        speed = replace(speed, load_s=load_s)
    changes: dict[str, Any] = {
        "deadline_s": deadline, "target_backlog_s": target_backlog, "scale_up_delay_s": scale_up_delay,
        "scale_down_delay_s": scale_down_delay, "min_replicas": min_replicas, "max_replicas": max_replicas,
    }  # fmt: skip
    spec = _changed(spec, changes)
    if scales and not speed.load_s and load_s is None:
        raise InvalidRequestError(
            "workers that come and go need the time that one takes to load: give --load-s S", param="load_s"
        )
    replayed = None if trace is None else read_trace(trace)
    samples = replayed or generated("poisson", rate=1.0, seconds=MEAN_DRAWS, mix=mix, seed=seed)
    lone = lone_times(samples, speed, spec)
    if load is not None:
        rate = load / statistics.fmean(lone[each.shape] for each in samples)
    planned = replayed or generated(process, rate=rate or 1.0, seconds=seconds, cv=cv, mix=mix, seed=seed)
    if not planned:
        raise InvalidRequestError(
            f"no request arrives in {seconds:g} s at {rate:g} a second; raise --seconds or --rate",
            param="seconds",
        )
    lone |= lone_times([each for each in planned if each.shape not in lone], speed, spec)
    within = WITHIN_UNLESS_ASKED if p95 is within_3x is done is None else within_3x
    asked = sizing.Objective(p95, within, done)
    if workers is not None or scales:
        one = spec if workers is None else fixed(spec, workers)
        tried = [sizing.outcome(one, planned, speed, lone, asked)]
    else:
        tried = list(sizing.search(spec, planned, speed, lone, asked, max_workers))
    found = {
        "requests": len(planned),
        "rate": rate,
        "lone_s": statistics.fmean(lone[each.shape] for each in planned),
        "busy_workers": sizing.offered(planned, speed),
        "speed": _speed_facts(speed),
        "objective": {"p95_s": p95, "within_3x_lone": within, "done": done, "deadline_s": spec.deadline_s},
        "tried": tried,
    }
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _print(found, asked)
    if not tried[-1]["met"]:
        raise typer.Exit(NOT_MET)


def _given(times: Path | None, step_s: str | None) -> Speed:
    from mezzotint.sizing.speed import Speed, of_bench

    if times is not None:
        if step_s is not None:
            raise InvalidRequestError("--times and --step-s both say how fast it is: give one", param="times")
        return of_bench(times)
    forward_s: dict[int, float] = {}
    for part in (step_s or "").split(","):
        jobs, _, seconds = part.strip().rpartition(":")
        try:
            forward_s[int(jobs or 1)] = float(seconds)
        except ValueError:
            forward_s[0] = 0.0
    if (
        1 not in forward_s
        or min(forward_s) < 1
        or not all(0 < each < math.inf for each in forward_s.values())
    ):
        raise InvalidRequestError(
            f"--step-s must be seconds above 0, or JOBS:SECONDS with commas and one for 1 job (got {step_s})",
            param="step_s",
        )
    return Speed(forward_s, picture_s=forward_s[1])


def _measured(
    endpoint: str | None, server: str | None, config: Path | None, data_dir: Path | None
) -> tuple[Speed, EndpointSettings]:
    """What a running endpoint has measured, and its settings."""
    from mezzotint.config import EndpointSettings
    from mezzotint.sizing.speed import of_endpoint

    with managed(server, config, data_dir) as running:
        id = (endpoint or first_endpoint(running.url, running.key)).partition(":")[0]
        shown = running.ask("GET", f"{ENDPOINTS}/{id}")["mezzotint"]
    return of_endpoint(shown, id), EndpointSettings.model_validate(shown["settings"] | {"adapters": ()})


def _changed(spec: EndpointSettings, changes: Mapping[str, Any]) -> EndpointSettings:
    from pydantic import ValidationError

    from mezzotint.config import EndpointSettings

    try:
        return EndpointSettings.model_validate(
            spec.model_dump() | {name: value for name, value in changes.items() if value is not None}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidRequestError(f"{name}: {first['msg']} (got {first['input']})", param=name) from None


def _speed_facts(speed: Speed) -> dict[str, Any]:
    return {
        "step_s": {str(jobs): seconds for jobs, seconds in sorted(speed.forward_s.items())},
        "picture_s": speed.picture_s,
        "request_s": speed.request_s,
        "load_s": speed.load_s,
    }


def _print(found: Mapping[str, Any], asked: Objective) -> None:
    def number(value: float | None, form: str = ".3g") -> str:
        return "-" if value is None else f"{value:{form}}"

    rows = []
    for each in found["tried"]:
        least, most, latency = each["min_workers"], each["max_workers"], each["latency_s"] or {}
        rows.append(
            [
                str(most) if least == most else f"{least} to {most}",
                *(number(latency.get(name)) for name in ("p50", "p95", "p99")),
                number(each["within_3x_lone"], ".1%"),
                str(each["requests"] - each["done"]),
                f"{each['mean_workers']:.2f}",
                f"{each['worker_hours']:.3g}",
                "yes" if each["met"] else "no",
            ]
        )
    columns = (
        "workers",
        "p50 s",
        "p95 s",
        "p99 s",
        "within 3x",
        "refused",
        "mean workers",
        "worker-hours",
        "met",
    )
    print_table(columns, rows)
    typer.echo()
    last, speed = found["tried"][-1], found["speed"]
    steps = ", ".join(
        f"{seconds:.3g} s" if jobs == "1" else f"{seconds:.3g} s for {jobs} jobs"
        for jobs, seconds in speed["step_s"].items()
    )
    wanted = {
        "p95 within {:g} s": asked.p95_s,
        "{:.0%} within 3 times alone": asked.within_3x,
        "{:.0%} done by the deadline": asked.done,
    }
    refused = ", ".join(f"{count} x {status}" for status, count in last["refused"].items())
    print_facts(
        {
            "objective": "; ".join(text.format(value) for text, value in wanted.items() if value is not None),
            "requests": f"{found['requests']} in {last['seconds']:.4g} s, {found['lone_s']:.3g} s each alone",
            "work": f"keeps {found['busy_workers']:.2f} workers busy",
            "refused or late": refused or "none",
            "starts of workers": f"{last['starts']} under load, at most {last['most_workers']} at once",
            "a step": steps,
            "a picture": f"{speed['picture_s']:.3g} s more in the worker",
            "a request": f"{speed['request_s']:.3g} s more outside the worker",
            "a start": f"{speed['load_s']:.3g} s",
        }
    )
