"""`mezzotint generate`: words to pictures over HTTP, from a running server or one for this job."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.options import (
    ConfigFlag,
    DataDirFlag,
    JsonFlag,
    ServerFlag,
    read_settings,
    require_engine,
)
from mezzotint.cli.reach import passing_key, running_server
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
    endpoint: Annotated[
        str | None, typer.Option(metavar="ID[:ROUTE]", help="Endpoint and adapter. [the first endpoint]")
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Denoising steps, 1 to 50.")] = 20,
    guidance: Annotated[
        float | None, typer.Option(metavar="G", help="How closely to follow the prompt. [the endpoint's]")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="Same seed, same picture. [random]")] = None,
    format: Annotated[
        str,
        typer.Option(metavar="F", help="`png`, `jpeg`, `jpg`, `raw`, or `url` to leave it on the server."),
    ] = "png",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write. [from the prompt, in this folder]")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One prompt, or JSON object, a line; --out is then a folder."),
    ] = None,
    number: Annotated[int, typer.Option("-n", metavar="N", help="Number of pictures, 1 to 8.")] = 1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels. [the endpoint's]")] = None,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What not to show.")] = None,
    server: ServerFlag = None,
    show: Annotated[bool, typer.Option(help="Draw the picture if stderr is a terminal.")] = True,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Makes pictures and prints their paths.

    Asks the server that runs on this data folder; without one, starts it for this job. A server elsewhere
    needs `--server` and a key in `MEZZOTINT_API_KEY`. A run with `--prompts` that was stopped goes on where
    it was: finished requests stand in the folder's `manifest.jsonl`.

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
    }
    settings = read_settings(config, data_dir=data_dir)
    model = endpoint or settings.endpoints[0].id
    fields = {"model": model} | {name: value for name, value in fields.items() if value is not None}
    with client_for(settings, model, server) as client:
        if prompts is not None:
            from mezzotint.cli import batch

            entries = batch.read_prompts(prompts, fields)
            suffix = SUFFIXES.get(format, ".png")
            if batch.run(client, entries, out or prompts.with_suffix(""), suffix, as_json=as_json):
                raise typer.Exit(1)
            return
        make_and_print(client, fields, out, show=show, as_json=as_json)


def make_and_print(
    client: Client, fields: dict[str, Any], out: Path | None, *, show: bool, as_json: bool
) -> None:
    """Makes the pictures of one request, writes them to files and prints where they are."""
    result, form = with_progress(client, fields), fields["response_format"]
    places = [picture.url or "" for picture in result.data]
    if form != "url":
        path = out or default_path(str(fields["prompt"]), result.seed, form)
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
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:SLUG_LENGTH].strip("-")
    return Path(f"{slug or 'picture'}-{seed}{SUFFIXES[format]}")


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
def client_for(settings: Settings, model: str, server: str | None) -> Iterator[Client]:
    """A client of the server named, else of the one on this data folder, else of one started for this job."""
    from mezzotint.client import Client

    if server is not None:
        with Client(base_url=server, max_retries=MAX_RETRIES) as client:
            yield client
        return
    with contextlib.ExitStack() as stack:
        url = running_server(settings)
        if url is None:
            require_engine()
        key = stack.enter_context(passing_key(settings))
        url = url or stack.enter_context(server_for_one_job(settings, model))
        yield stack.enter_context(Client(base_url=url, api_key=key))


@contextlib.contextmanager
def server_for_one_job(settings: Settings, model: str) -> Iterator[str]:
    """The real server, on a free port, with the one endpoint that the job needs; yields its URL."""
    from mezzotint.cli.hosting import hosted

    typer.echo(f"No server runs on {settings.data_dir}; starting one for this job.", err=True)
    own = settings.model_copy(update={"host": "127.0.0.1", "port": 0, "public_url": None, "auth": True})
    with hosted(own, model.partition(":")[0]) as url:
        yield url
