"""`mezzotint bench`: load that does not wait for answers, against our routes or any OpenAI Images server."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from mezzotint.cli.options import ConfigFlag, DataDirFlag, EndpointFlag, JsonFlag
from mezzotint.cli.reach import asking, find_server, passing_key, settings_of
from mezzotint.cli.tables import print_facts, print_table
from mezzotint.errors import ConnectionFailedError, InvalidRequestError, MezzotintError
from mezzotint.load.arrivals import BURSTY_CV, generated, read_trace

if TYPE_CHECKING:
    from mezzotint.load.generator import Measured, Shape, Target

STOPPED = 130
WARM_LONE_DRAWS = 1000
"""Requests drawn of a mix to know what its mean one takes alone."""

UrlFlag = Annotated[
    str | None,
    typer.Option(
        "--url",
        "--server",
        envvar=["MEZZOTINT_URL", "MEZZOTINT_BASE_URL"],
        metavar="URL",
        help="The server, with the key in `MEZZOTINT_API_KEY`. [the one that runs here]",
    ),
]


def bench(
    url: UrlFlag = None,
    api: Annotated[str, typer.Option(metavar="API", help="`mezzotint` or `openai`.")] = "mezzotint",
    endpoint: EndpointFlag = None,
    arrivals: ArrivalsFlag = "poisson",
    trace: TraceFlag = None,
    seconds: SecondsFlag = 60.0,
    load: Annotated[
        float,
        typer.Option(metavar="L", min=0.001, help="Lone seconds of requests that arrive each second."),
    ] = 0.7,
    rate: Annotated[
        float | None, typer.Option(metavar="R", min=0.0001, help="Requests a second, instead of --load.")
    ] = None,
    cv: CvFlag = BURSTY_CV,
    steps: MixStepsFlag = None,
    n: MixNFlag = DEFAULT_N,
    sizes: MixSizesFlag = None,
    adapters: Annotated[
        str, typer.Option(metavar="ROUTES", help="Routes with commas, or how many of the endpoint's. [none]")
    ] = "",
    zipf: Annotated[float, typer.Option(metavar="Z", min=0, help="The k-th route has k ** -Z parts.")] = 1.0,
    seed: LoadSeedFlag = 0,
    timeout: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="A request without an answer after this is over.")
    ] = 600.0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="NAME", help="Write NAME.json and NAME.svg. [mezzotint-bench-DATE-TIME]"),
    ] = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Measures a server under load: latencies, shares, rates, refusals.

    First it measures what each kind of request takes alone. Then it sends requests at their moments, whether
    or not earlier ones are answered, and never twice. With `--api openai` and without `--steps`, requests
    have only what OpenAI's API has. Ctrl-C prints what was measured so far.

    Example: `mezzotint bench --seconds 30 --load 0.7`
    """
    from mezzotint.load import generator, results

    if api not in ("mezzotint", "openai"):
        raise InvalidRequestError(f"--api must be mezzotint or openai (got {api})", param="api")
    process = read_process(arrivals)
    mix = read_mix(steps=steps, n=n, sizes=sizes, zipf=zipf)
    if api == "openai" and steps is None:
        mix = replace(mix, steps=((None, 1.0),))
    out = out or Path(f"mezzotint-bench-{time.strftime('%Y%m%d-%H%M%S')}")
    with _reached(url, config, data_dir) as (base, key):
        target = generator.Target(base, endpoint or first_endpoint(base, key), api, key, timeout)  # type: ignore[arg-type]
        mix = replace(mix, adapters=_routes(target, adapters))
        replayed = None if trace is None else read_trace(trace)
        samples = replayed or generated(
            process, rate=1.0, seconds=WARM_LONE_DRAWS, cv=1.0, mix=mix, seed=seed
        )
        try:
            with _told("lone requests") as told:
                lone = asyncio.run(generator.lone_times(target, samples, told))
        except KeyboardInterrupt:
            typer.echo("stopped before the load began: nothing was measured", err=True)
            raise typer.Exit(STOPPED) from None
        if trace is None and rate is None:
            rate = load / statistics.fmean(generator.lone_time(lone, each.shape) for each in samples)
        planned = replayed or generated(process, rate=rate or 1.0, seconds=seconds, cv=cv, mix=mix, seed=seed)
        if not planned:
            raise InvalidRequestError(
                f"no request arrives in {seconds:g} s at {rate:g} a second; raise --seconds or --rate",
                param="seconds",
            )
        before = _busy_s(target)
        with _told("requests") as told:
            measured = asyncio.run(generator.run(target, planned, told))
        busy_s = _busy_s(target)
    summary = results.summarize(measured, lone)
    summary["busy"] = None if before is None or busy_s is None else (busy_s - before) / measured.wall_s
    asked = {
        "url": base, "api": api, "model": target.model, "arrivals": "trace" if trace else arrivals,
        "rate": rate, "cv": cv if arrivals == "bursty" and not trace else None, "seed": seed,
        "planned": len(planned),
    }  # fmt: skip
    summary = {"asked": asked, **summary, "warnings": results.warnings(summary)}
    _write(out, summary, measured, lone)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print(summary, out)
    for warning in summary["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    if measured.stopped:
        raise typer.Exit(STOPPED)


@contextmanager
def _reached(url: str | None, config: Path | None, data_dir: Path | None) -> Iterator[tuple[str, str]]:
    """Address and key."""
    if url is not None:
        yield url, os.environ.get("MEZZOTINT_API_KEY", "")
        return
    running = find_server(config, data_dir)
    if running is None:
        raise ConnectionFailedError("no server runs here; start `mezzotint serve`, or give --url URL")
    with passing_key(settings_of(running)) as key:
        yield running.url, key


def _routes(target: Target, asked: str) -> tuple[str, ...]:
    """The routes that requests use."""
    if not asked.isdigit():
        return tuple(route.strip() for route in asked.split(",") if route.strip())
    with asking(target.url.rstrip("/").removesuffix("/v1"), target.key) as server:
        listed = [str(each["id"]) for each in server.ask("GET", "/v1/models")["data"]]
    routes = [id.partition(":")[2] for id in listed if id.startswith(f"{target.model}:")]
    if len(routes) < int(asked):
        raise InvalidRequestError(
            f"--adapters {asked}: {target.model} has {len(routes)} ({', '.join(routes[:10]) or 'none'})",
            param="adapters",
        )
    return tuple(routes[: int(asked)])


def _busy_s(target: Target) -> float | None:
    """Seconds that the endpoint's workers have computed, where the server is ours and says so."""
    from mezzotint.cli.top import read_metrics

    if target.api != "mezzotint":
        return None
    try:
        with asking(target.url, target.key) as server:
            samples = read_metrics(server.metrics())
    except MezzotintError:
        return None
    return samples.get(("mezzotint_worker_busy_seconds_total", target.model.partition(":")[0]))


@contextmanager
def _told(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _write(out: Path, summary: Mapping[str, Any], measured: Measured, lone: Mapping[Shape, float]) -> None:
    from mezzotint.load import results
    from mezzotint.load.generator import lone_time
    from mezzotint.load.plot import svg

    done = [sent for sent in measured.sent if results.is_done(sent)]
    points = [
        (sent.arrival.at_s, sent.seconds, f"{sent.arrival.steps} steps" if sent.arrival.steps else "done")
        for sent in done
    ]
    refused = [sent.arrival.at_s for sent in measured.sent if not results.is_done(sent)]
    slowdowns = [sent.seconds / lone_time(lone, sent.arrival.shape) for sent in done]
    asked = summary["asked"]
    title = f"{asked['model']}: {asked['planned']} requests, {asked['arrivals']}"
    shapes = [
        {"steps": steps, "n": n, "size": "{}x{}".format(*size) if size else None, "seconds": seconds}
        for (steps, n, size), seconds in lone.items()
    ]
    requests = [results.record(sent) for sent in sorted(measured.sent, key=lambda sent: sent.arrival.at_s)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**summary, "lone_s": shapes, "requests_sent": requests}, indent=1)
        Path(f"{out}.json").write_text(text, encoding="utf-8")
        Path(f"{out}.svg").write_text(svg(title, points, refused, slowdowns), encoding="utf-8")
    except OSError as error:
        typer.echo(f"--out {out}: cannot be written ({error.strerror})", err=True)


def _print(summary: Mapping[str, Any], out: Path) -> None:
    whole = {"all": {"requests": summary["done"]} | (summary["latency_s"] or {})}
    groups = whole | {f"{steps} steps": each for steps, each in summary["latency_by_steps_s"].items()}
    columns = ("p50", "p95", "p99", "mean", "max")
    rows = [
        [
            name,
            str(each["requests"]),
            *(f"{each[column]:.3f}" if column in each else "-" for column in columns),
        ]
        for name, each in groups.items()
    ]
    print_table(("seconds", "done", *columns), rows)
    typer.echo()
    share, busy, asked = summary["within_3x_lone"], summary["busy"], summary["asked"]
    refused = ", ".join(f"{count} x {status}" for status, count in summary["refused"].items())
    late = summary["generator"]["late_s"]
    facts = {
        "arrivals": f"{asked['arrivals']}, seed {asked['seed']}"
        + (f", {asked['rate']:.3g} requests/s" if asked["rate"] and asked["arrivals"] != "trace" else ""),
        "requests": f"{summary['requests']} ended in {summary['seconds']:.1f} s"
        + (f", {summary['unfinished']} unfinished" if summary["unfinished"] else ""),
        "refused or failed": refused.replace("x 0", "x no answer") or "none",
        "within 3 times alone": "-" if share is None else f"{share:.1%}",
        "images/s": f"{summary['images_per_s']:.2f}",
        "capacity used": f"{summary['lone_work_per_s']:.2f} lone seconds of requests a second"
        + ("" if busy is None else f", workers busy {busy:.0%}"),
        "generator": "-"
        if not late
        else f"p95 sent {late['p95'] * 1e3:.1f} ms late, {summary['generator']['processor']:.0%} of a core",
        "written": f"{out}.json, {out}.svg",
    }
    print_facts(facts)
