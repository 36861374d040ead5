"""`mezzotint endpoints`: the life cycle of a running server's endpoints."""

from __future__ import annotations

import json
import time
import tomllib
from datetime import datetime
from typing import Annotated, Any

import typer

from mezzotint.cli import completion
from mezzotint.cli.models import compile_model
from mezzotint.cli.options import ConfigFlag, DataDirFlag, JsonFlag, ServerFlag, read_settings
from mezzotint.cli.reach import ENDPOINTS, Server, managed
from mezzotint.cli.tables import print_facts, print_table
from mezzotint.errors import InvalidRequestError, UnavailableError
from mezzotint.messages import LoadModel

PASSING = ("INITIALIZING", "AWAKING", "UPDATING", "STOPPING")
LOOK_EVERY_S = 0.2
SURE = 0.1
"""Runs that agree within this, relative to the shortest, are taken for true, as the engine does."""

endpoints = typer.Typer(help="Manage a running server's endpoints.", no_args_is_help=True)

IdArgument = Annotated[
    str, typer.Argument(metavar="ID", help="The endpoint.", autocompletion=completion.endpoint_ids)
]
SetFlag = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting of `[[endpoints]]`; repeat for more."),
]
CommentFlag = Annotated[str, typer.Option(metavar="TEXT", help="Stands in the endpoint's history.")]


@endpoints.command("list")
def list_(
    server: ServerFlag = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Lists the endpoints and how they are.

    Example: `mezzotint endpoints list`
    """
    with managed(server, config, data_dir) as running:
        found = running.ask("GET", ENDPOINTS)["data"]
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [(id, status["status"], status["message"] or "") for id, status in found.items()]
    print_table(("id", "status", "message"), rows)


@endpoints.command()
def show(
    id: IdArgument,
    server: ServerFlag = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Shows one endpoint: state, model, queue, workers, settings, and its adapters as `ID:ROUTE`.

    Example: `mezzotint endpoints show emoji`
    """
    with managed(server, config, data_dir) as running:
        spec = running.ask("GET", f"{ENDPOINTS}/{id}")["mezzotint"]
    if as_json:
        typer.echo(json.dumps(spec))
        return
    replicas = {replica.pop("name"): replica for replica in spec.pop("replicas")}
    for replica in replicas.values():
        if not replica["stage"]:
            del replica["stage"]
    scaling = {_when(event["at"]): event["reason"] for event in spec.pop("scaling")}
    info = spec.pop("info") or {}
    calibration = calibration_facts(id, info)
    merging = info.pop("merging", {})
    info.pop("proof", None)
    adapters = [f"{id}:{route}" for route in spec.pop("adapters")]
    shown = {
        "state": spec.pop("state"),
        "adapters": adapters,
        "queue": spec.pop("queue"),
        "workers": replicas,
        "text_cache": spec.pop("text_cache"),
        "scaling": scaling,
    }
    settings = {name: value for name, value in spec.pop("settings").items() if name != "adapters"}
    print_facts(
        {**shown, "model": info, "merging": merging, "calibration": calibration, **spec, "settings": settings}
    )


@endpoints.command()
def create(
    id: IdArgument,
    model: Annotated[str, typer.Option(metavar="SOURCE", help="`emoji`, folder, repository or file.")],
    settings: SetFlag = None,
    comment: CommentFlag = "",
    server: ServerFlag = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Makes an endpoint on the running server and starts it; it is there after a restart too.

    Example: `mezzotint endpoints create flux --model black-forest-labs/FLUX.1-schnell --set device=cuda:1`
    """
    body = {
        "name": id,
        "settings": {**parse_settings(settings), "model": model},
        "initialVersionComment": comment,
    }
    with managed(server, config, data_dir) as running:
        _print_status(running.ask("POST", ENDPOINTS, body), as_json)


@endpoints.command()
def update(
    id: IdArgument,
    settings: SetFlag = None,
    comment: CommentFlag = "",
    server: ServerFlag = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Changes an endpoint: new workers start beside the old ones, and no request fails.

    Example: `mezzotint endpoints update emoji --set min_replicas=0 --set max_replicas=4`
    """
    body = {"settings": parse_settings(settings), "newVersionComment": comment}
    with managed(server, config, data_dir) as running:
        running.ask("PUT", f"{ENDPOINTS}/{id}", body)
        _print_status(running.ask("GET", f"{ENDPOINTS}/{id}/status"), as_json)


@endpoints.command()
def history(
    id: IdArgument,
    server: ServerFlag = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Lists the versions of an endpoint, the newest first, and how its workers were scaled and why.

    Example: `mezzotint endpoints history emoji`
    """
    with managed(server, config, data_dir) as running:
        found = running.ask("GET", f"{ENDPOINTS}/{id}/version")["data"]
        if as_json:
            typer.echo(json.dumps({number: spec["mezzotint"] for number, spec in found.items()}))
            return
        scaling = running.ask("GET", f"{ENDPOINTS}/{id}")["mezzotint"]["scaling"]
    rows = [(number, spec["creatorId"], spec["mezzotint"]["comment"]) for number, spec in found.items()]
    print_table(("version", "by", "comment"), rows)
    if scaling:
        print_table(
            ("scaled at", "workers", "why"),
            [(_when(event["at"]), str(event["after"]), event["reason"]) for event in reversed(scaling)],
        )


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "milliseconds")


@endpoints.command()
def calibrate(
    id: IdArgument,
    server: ServerFlag = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Measures an endpoint anew: how many rows a forward has (R), and how long a step takes.

    New workers start beside the old ones, and no request fails. Where R changes, the same seed gives other
    bytes from then on. Do it while the machine is quiet.

    Example: `mezzotint endpoints calibrate emoji`
    """
    with managed(server, config, data_dir) as running:
        before = _info(running, id)
        running.ask("PUT", f"{ENDPOINTS}/{id}/calibrate")
        typer.echo(f"measuring {id}; its old workers serve meanwhile", err=True)
        while (status := running.ask("GET", f"{ENDPOINTS}/{id}/status"))["status"] in PASSING:
            time.sleep(LOOK_EVERY_S)
        if status["status"] != "RUNNING":
            raise UnavailableError(f"endpoint {id} is {status['status']}: {status['message'] or 'stopped'}")
        after = _info(running, id)
    rows = {"rows_before": before.get("rows"), "rows": after.get("rows")}
    if as_json:
        typer.echo(json.dumps(rows | {"step_s": after["step_s"], "calibration": after["calibration"]}))
        return
    print_facts({id: {"rows before": rows["rows_before"], **calibration_facts(id, after)}})
    if rows["rows"] != rows["rows_before"]:
        typer.echo("R has changed: the same seed gives other bytes from now on", err=True)


def _info(running: Server, id: str) -> dict[str, Any]:
    """What the server knows of an endpoint's model; empty before it has ever been loaded."""
    info: dict[str, Any] = running.ask("GET", f"{ENDPOINTS}/{id}")["mezzotint"]["info"] or {}
    return info


def calibration_facts(id: str, info: dict[str, Any]) -> dict[str, str]:
    """What was measured and how sure it is; takes `calibration` and `best_rows` out of `info`."""
    rows, best, table = info.get("rows"), info.pop("best_rows", None), info.pop("calibration", [])
    if not table:
        return {}
    facts = {
        f"{row['rows']:.0f} rows": f"{1e3 * row['forward_s']:.3g} ms, {row['rows_per_s']:.1f} rows/s"
        for row in table
    }
    worst = max(row.get("uncertainty", 0.0) for row in table)
    sure = f"yes (runs agree within {worst:.0%})"
    if worst > SURE:
        sure = f"no (runs differ by {worst:.0%}): other programs were busy; an idle moment measures again"
    facts |= {"R": str(rows), "sure": sure}
    if best not in (None, rows):
        facts["R by the latest"] = f"{best}; `mezzotint endpoints calibrate {id}` takes it, and changes bytes"
    return facts


@endpoints.command()
def warm(
    id: IdArgument, config: ConfigFlag = None, data_dir: DataDirFlag = None, as_json: JsonFlag = False
) -> None:
    """Compiles a configured endpoint's model now, here, for `performance = "max"`; takes minutes.

    A server does this in the background, too. What is found is used from the endpoint's next start on, and
    its form stays the same until then.

    Example: `mezzotint endpoints warm emoji`
    """
    settings = read_settings(config, data_dir=data_dir)
    found = next((each for each in settings.endpoints if each.id == id), None)
    if found is None:
        known = ", ".join(each.id for each in settings.endpoints)
        raise InvalidRequestError(f"the configuration has no endpoint {id}; it has: {known}", param="id")
    if found.performance != "max":
        raise InvalidRequestError(f'endpoint {id} compiles nothing; set performance = "max"', param="id")
    code, found_text = compile_model(LoadModel(id, found.model, found.engine))
    if code:
        raise typer.Exit(code)
    typer.echo(json.dumps({"id": id, "form_text": found_text}) if as_json else found_text)


def _action(name: str, help: str) -> None:
    """Adds a command that asks for one change of state."""
    method, path = ("DELETE", "") if name == "delete" else ("PUT", f"/{name}")

    def act(
        id: IdArgument,
        server: ServerFlag = None,
        config: ConfigFlag = None,
        data_dir: DataDirFlag = None,
        as_json: JsonFlag = False,
    ) -> None:
        with managed(server, config, data_dir) as running:
            _print_status(running.ask(method, f"{ENDPOINTS}/{id}{path}"), as_json)

    endpoints.command(name, help=f"{help}\n\nExample: `mezzotint endpoints {name} emoji`")(act)


for _name, _help in {
    "sleep": "Lets running requests finish and gives the memory back; the next request wakes it.",
    "wake": "Starts the workers of a sleeping endpoint.",
    "restart": "Starts new workers; also the way out of FAILED and TERMINATED.",
    "terminate": "Takes no new request, gives running ones the server's drain_s, then ends the workers.",
    "delete": "Ends an endpoint's requests and workers and forgets it.",
}.items():
    _action(_name, _help)


def parse_settings(pairs: list[str] | None) -> dict[str, Any]:
    """`name=value` as in the configuration file; what is no TOML value is text."""
    values: dict[str, Any] = {}
    for pair in pairs or []:
        name, found, text = pair.partition("=")
        if not found or not name:
            raise InvalidRequestError(f"--set takes NAME=VALUE (got {pair})", param="set")
        try:
            values[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[name] = text
    return values


def _print_status(status: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(status))
    else:
        typer.echo(f"{status['id']} {status['status']}")
