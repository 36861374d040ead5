"""`mezzotint edit`: a picture and words to a picture, as `generate` does it from words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli.generate import client_for, make_and_print, parse_size
from mezzotint.cli.options import ConfigFlag, DataDirFlag, JsonFlag, ServerFlag


def edit(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A PNG, JPEG or WebP file.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What it is to show.")],
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="White is repainted, the rest stays as it is.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(metavar="S", help="How much is made anew, 0 to 1. [0.8; with a mask 1]"),
    ] = None,
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
    number: Annotated[int, typer.Option("-n", metavar="N", help="Number of pictures, 1 to 8.")] = 1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels. [the picture's]")] = None,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What not to show.")] = None,
    server: ServerFlag = None,
    show: Annotated[bool, typer.Option(help="Draw the picture if stderr is a terminal.")] = True,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Makes pictures from a picture and words, and prints their paths.

    Asks the same server as `mezzotint generate`.

    Example: `mezzotint edit apple.png "a green apple" --strength 0.6 --seed 7 --out green.png`
    """
    width, height = parse_size(size)
    fields: dict[str, Any] = {
        "image": picture,
        "mask": mask,
        "strength": strength,
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
    fields = {name: value for name, value in fields.items() if value is not None}
    with client_for(server, config, data_dir, endpoint) as (client, model):
        make_and_print(client, {"model": model} | fields, out, show=show, as_json=as_json)
