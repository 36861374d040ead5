"""Prints what the built-in model's adapters do: `python -m training.styles --data D --model M`.

For each adapter in the model's folder, over names with one seed each: how often the nearest of all drawings
with that finish is of the named subject, how often the picture is nearer to a drawing with the finish than to
any without, and how far it is from the picture without the adapter.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from training.data import Pictures, Subject, load_pictures, read_subjects
from training.device import set_up
from training.evaluate import Painter, all_drawings, load_pipeline, percent, small


def style_facts(
    paint: Painter, file: Path, pictures: Pictures, subjects: list[Subject], num_names: int
) -> dict[str, float]:
    """The figures of one adapter; its file is named for its finish."""
    names = [each.name for each in random.Random(3).sample(subjects, num_names)]
    plain = small(paint(names))
    paint.pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=file.stem)
    styled = paint(names)
    paint.pipeline.unload_lora_weights()
    finished, unfinished = (all_drawings(pictures, subjects, finish=finish) for finish in (file.stem, None))
    found = finished.nearest(styled, 5)
    made = small(styled)
    nearer = torch.cdist(made, finished.vectors).amin(1) < torch.cdist(made, unfinished.vectors).amin(1)
    return {
        "names": len(names),
        "top1": percent([near[0] == name for near, name in zip(found, names, strict=True)]),
        "top5": percent([name in near for near, name in zip(found, names, strict=True)]),
        "nearer_to_style": percent(nearer.tolist()),
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
    pictures = load_pictures(a.data)
    subjects = [each for each in read_subjects() if each.name in pictures.rows["3d"]]
    paint = Painter(load_pipeline(a.model, torch.bfloat16))
    for file in sorted((a.model / "adapters").glob("*.safetensors")):
        facts = style_facts(paint, file, pictures, subjects, a.names)
        print(file.stem, json.dumps({name: round(value, 2) for name, value in facts.items()}))


if __name__ == "__main__":
    main()
