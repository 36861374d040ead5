"""`mezzotint generate`: words to pictures over HTTP, from a running server or one for this job."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.options import (
    ConfigFlag,
    DataDirFlag,
    EndpointFlag,
    FormatFlag,
    GuidanceFlag,
    JsonFlag,
    NegativeFlag,
    NumberFlag,
    OutFlag,
    SeedFlag,
    ServerFlag,
    ShowFlag,
    StepsFlag,
    read_settings,
    require_engine,
)
from mezzotint.cli.reach import asking, find_server, passing_key, settings_of
from mezzotint.errors import InternalError, InvalidRequestError

if TYPE_CHECKING:
    from mezzotint.client import Client, Generation, Progress
    from mezzotint.config import Settings

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "jpg": ".jpg", "raw": ".rgb"}
MAX_RETRIES = 2
"""Fewer than a program would make: somebody is waiting at the terminal."""
SLUG_LENGTH = 40
"""Most characters of a prompt in a file's name."""


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to show.")] = None,
    endpoint: EndpointFlag = None,
    steps: StepsFlag = 20,
    guidance: GuidanceFlag = None,
    seed: SeedFlag = None,
    format: FormatFlag = "png",
    out: OutFlag = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="One prompt, or JSON object, a line; `-` reads them from stdin. --out is then a folder.",
            allow_dash=True,
        ),
    ] = None,
    number: NumberFlag = 1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels. [the endpoint's]")] = None,
    negative: NegativeFlag = None,
    control: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A picture for the endpoint's next ControlNet; may be repeated."),
    ] = None,
    control_weight: Annotated[
        list[float] | None,
        typer.Option(metavar="W", help="How much that picture counts, 0 to 1; one for each. [1]"),
    ] = None,
    server: ServerFlag = None,
    show: ShowFlag = True,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Makes pictures and prints their paths.

    Asks the server that you have running, from whatever folder; without one, starts one for this job. A
    server elsewhere needs `--server` and a key in `MEZZOTINT_API_KEY`. A run with `--prompts` that was
    stopped goes on where it was: finished requests stand in the folder's `manifest.jsonl`.

    Example: `mezzotint generate "a red apple on a teal background" --steps 8 --seed 7 --out apple.png`
    """
    if (prompt is None) == (prompts is None):
        raise InvalidRequestError("give either a PROMPT or --prompts FILE", param="prompt")
    width, height = parse_size(size)
    fields: dict[str, Any] = {
        "prompt": prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        "response_format": format,
        "n": number,
        "width": width,
        "height": height,
        "negative_prompt": negative,
        "control_images": control or None,
        "controlnet_weights": control_weight or None,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    if prompts is not None:
        from mezzotint.cli import batch

        folder = batch.folder_for(prompts, out)
        entries = batch.read_prompts(prompts, fields)
        with client_for(server, config, data_dir, endpoint) as (client, model):
            failed = batch.run(client, model, entries, folder, SUFFIXES.get(format, ".png"), as_json=as_json)
        if failed:
            raise typer.Exit(1)
        return
    with client_for(server, config, data_dir, endpoint) as (client, model):
        make_and_print(client, {"model": model} | fields, out, show=show, as_json=as_json)


def make_and_print(
    client: Client, fields: dict[str, Any], out: Path | None, *, show: bool, as_json: bool
) -> None:
    """Makes the pictures of one request, writes them to files and prints where they are."""
    result, form = with_progress(client, fields), fields["response_format"]
    places = [picture.url or "" for picture in result.data]
    if form != "url":
        path = out or free_path(default_path(str(fields["prompt"]), result.seed, form), result)
        places = [str(path) for path in save(result, path)]
    if show:
        from mezzotint.cli import picture

        for made in result.data:
            picture.show(made.image)
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(as_text(result, places) if as_json else "\n".join(places))


def as_text(result: Generation, places: list[str]) -> str:
    """What `--json` prints: paths or URLs, seeds, sizes and warnings."""
    pictures = [
        {
            "url" if "://" in place else "path": place,
            "seed": made.seed,
            "width": made.width,
            "height": made.height,
        }
        for place, made in zip(places, result.data, strict=True)
    ]
    return json.dumps({"id": result.id, "pictures": pictures, "warnings": list(result.warnings)})


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Width and height of `WxH`; InvalidRequestError for anything else."""
    if size is None:
        return None, None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if found is None:
        raise InvalidRequestError(f"--size must be like 512x512 (got {size})", param="size")
    return int(found[1]), int(found[2])


def default_path(prompt: str, seed: int, format: str) -> Path:
    """`a-red-apple-7.png` in the working folder."""
    return Path(f"{slug(prompt)}-{seed}{SUFFIXES[format]}")


def slug(prompt: str, length: int = SLUG_LENGTH) -> str:
    """A prompt as the beginning of a file's name: `a-red-apple`."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:length].strip("-") or "picture"


def free_path(path: Path, result: Generation) -> Path:
    """`path`, or the first of `name-2`, `name-3` ... that would overwrite no other picture."""
    for number in itertools.count(1):
        place = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        first = place if len(result.data) == 1 else place.with_name(f"{place.stem}-0{place.suffix}")
        if not first.exists() or first.read_bytes() == result.data[0].data:
            break
    return place


def save(result: Generation, path: Path) -> list[Path]:
    """Writes the pictures, making the folder if need be; several get a number before the suffix."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return result.save(path)
    except OSError as error:
        raise InvalidRequestError(
            f"--out {path}: cannot be written ({error.strerror})", param="out"
        ) from None


def with_progress(client: Client, fields: dict[str, Any]) -> Generation:
    """The result, with a bar on stderr while it is made if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    from mezzotint import client as sdk

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None, left="")
        for event in client.images.stream(**fields):
            if isinstance(event, sdk.Completed):
                return event.result
            if isinstance(event, sdk.Progress):
                total, completed = extent(event)
                bar.update(
                    task, description=event.text, left=time_left(event), total=total, completed=completed
                )
    raise InternalError("the server ended the request without an answer", code="invalid_answer")


def extent(event: Progress) -> tuple[float | None, float]:
    """How long the bar is and how much of it is filled: steps, or while the model loads, its fraction."""
    if event.loading is not None:
        return (None if event.loading_fraction is None else 1), event.loading_fraction or 0
    return event.num_steps, event.step or 0


def time_left(event: Progress) -> str:
    """The server's estimate for the whole request; empty while nobody can know it."""
    if event.seconds_left is None or event.loading is not None:
        return ""
    minutes, seconds = divmod(math.ceil(event.seconds_left), 60)
    return f"{minutes} min {seconds} s left" if minutes else f"{seconds} s left"


@contextlib.contextmanager
def client_for(
    server: str | None, config: Path | None, data_dir: Path | None, endpoint: str | None
) -> Iterator[tuple[Client, str]]:
    """A client and what its requests name as `model`: `endpoint`, else the server's first endpoint.

    Of the server named, else of one that runs, else of one started for this job.
    """
    from mezzotint.client import Client

    with contextlib.ExitStack() as stack:
        if server is not None:
            url, key = server, os.environ.get("MEZZOTINT_API_KEY", "")
        elif (running := find_server(config, data_dir)) is not None:
            url, key = running.url, stack.enter_context(passing_key(settings_of(running)))
        else:
            require_engine()
            settings = read_settings(config, data_dir=data_dir)
            endpoint = endpoint or settings.endpoints[0].id
            url = stack.enter_context(server_for_one_job(settings, endpoint))
            key = stack.enter_context(passing_key(settings))
        model = endpoint or first_endpoint(url, key)
        yield (
            stack.enter_context(Client(base_url=url, api_key=key or None, max_retries=MAX_RETRIES)),
            model,
        )


def first_endpoint(url: str, key: str) -> str:
    """The first endpoint of a server that this key may use."""
    try:
        with asking(url, key) as named:
            return str(named.ask("GET", "/v1/models")["data"][0]["id"])
    except (LookupError, TypeError, ValueError):
        raise InvalidRequestError(
            f"{url} lists no endpoint that this key may use; name one with --endpoint", param="endpoint"
        ) from None


@contextlib.contextmanager
def server_for_one_job(settings: Settings, model: str) -> Iterator[str]:
    """The real server, on a free port, with the one endpoint that the job needs; yields its URL."""
    from mezzotint.cli.hosting import hosted, require_model

    id = model.partition(":")[0]
    for endpoint in settings.endpoints:
        if endpoint.id == id:
            require_model(id, endpoint.model)
    typer.echo(
        f"No server runs, so this starts one for this job (data folder {settings.data_dir}). "
        "`mezzotint serve` in another terminal keeps one running: pictures then come at once.",
        err=True,
    )
    own = settings.model_copy(update={"host": "127.0.0.1", "port": 0, "public_url": None, "auth": True})
    with hosted(own, id) as url:
        yield url
