"""Prints what the built-in model's adapters do: `python -m training.styles --data D --model M`.

For each adapter in the model's folder, over names with one seed each: how often the nearest of all originals
in that style is the named one, how often the picture is nearer to its original in that style than to the one
the model itself was taught, and how far it is from the picture without the adapter.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from training.data import Pictures, Subject, load_pictures, read_subjects
from training.device import set_up
from training.evaluate import Painter, load_pipeline, originals, ranks, shares, small
from training.palette import WHITE


def style_facts(
    paint: Painter, file: Path, pictures: Pictures, subjects: list[Subject], num_names: int
) -> dict[str, float]:
    """The figures of one adapter; its file is named for its style."""
    style = file.stem
    known_names = pictures.rows[style].keys() & pictures.rows["3d"].keys()
    present = [each for each in subjects if each.name in known_names]
    chosen = sorted(random.Random(3).sample(range(len(present)), min(num_names, len(present))))
    names = [present[index].name for index in chosen]
    plain = small(paint(names))
    paint.pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=style)
    styled = paint(names)
    paint.pipeline.unload_lora_weights()
    known = small(originals(pictures, present, WHITE, style))
    taught = small(originals(pictures, present, WHITE))
    top1, top5 = shares(ranks(styled, chosen, known))
    made = small(styled)
    nearer = (made - known[chosen]).norm(dim=1) < (made - taught[chosen]).norm(dim=1)
    return {
        "names": len(names),
        "top1": top1,
        "top5": top5,
        "nearer_to_style": 100 * nearer.float().mean().item(),
        "from_plain_levels": (made - plain).abs().mean().item(),
        "megabytes": file.stat().st_size / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--names", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    set_up(a.threads)
    pictures, subjects = load_pictures(a.data), read_subjects()
    paint = Painter(load_pipeline(a.model, torch.bfloat16))
    for file in sorted((a.model / "adapters").glob("*.safetensors")):
        facts = style_facts(paint, file, pictures, subjects, a.names)
        print(file.stem, json.dumps({name: round(value, 2) for name, value in facts.items()}))


if __name__ == "__main__":
    main()
