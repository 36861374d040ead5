"""Prints what the built-in model's adapters do: `python -m training.styles --data D --model M`.

For each adapter in the model's folder, over names with one seed each: how often the nearest of all drawings
of that hand is of the named subject, how often the picture is nearer to a drawing of that hand than to any
of the others, with the adapter and without, and how far both pictures are from each other.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from training.data import Pictures, Subject, load_pictures, read_subjects
from training.device import set_up
from training.evaluate import HANDS, Painter, all_drawings, load_pipeline, percent, small


def style_facts(
    paint: Painter, file: Path, pictures: Pictures, subjects: list[Subject], num_names: int
) -> dict[str, float]:
    """The figures of one adapter; its file is named for its hand."""
    drawn = [each for each in subjects if each.name in pictures.rows[file.stem]]
    names = [each.name for each in random.Random(3).sample(drawn, num_names)]
    plain = small(paint(names))
    paint.pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=file.stem)
    styled = paint(names)
    paint.pipeline.unload_lora_weights()
    others = tuple(hand for hand in HANDS if hand != file.stem)
    own, other = (all_drawings(pictures, subjects, hands=hands) for hands in ((file.stem,), others))
    found = own.nearest(styled, 5)
    made = small(styled)

    def nearer(vectors: torch.Tensor) -> float:
        hits = torch.cdist(vectors, own.vectors).amin(1) < torch.cdist(vectors, other.vectors).amin(1)
        return percent(hits.tolist())

    return {
        "names": len(names),
        "top1": percent([near[0] == name for near, name in zip(found, names, strict=True)]),
        "top5": percent([name in near for near, name in zip(found, names, strict=True)]),
        "nearer_to_style": nearer(made),
        "nearer_to_style_without": nearer(plain),
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
