"""`mezzotint edit`: a picture and words to a picture, as `generate` does it from words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli.generate import client_for, make_and_print, parse_size
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
)


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
    endpoint: EndpointFlag = None,
    steps: StepsFlag = 20,
    guidance: GuidanceFlag = None,
    seed: SeedFlag = None,
    format: FormatFlag = "png",
    out: OutFlag = None,
    number: NumberFlag = 1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels. [the picture's]")] = None,
    negative: NegativeFlag = None,
    server: ServerFlag = None,
    show: ShowFlag = True,
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
