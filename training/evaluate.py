"""Prints what the built-in model can do: `python -m training.evaluate --data D --model M --sheets OUT`.

Pictures are compared as 32x32 RGB (L2) with every drawing that the training has shown of every subject: all
hands, several sizes, mirrored or not. *Top-1* means that the nearest of them all is of the named subject.
Colours are asked for on pairs of subject and colour that the training has never shown.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from training.captions import plural, short_names
from training.data import Pictures, Subject, load_pictures, read_subjects
from training.device import set_up
from training.palette import BACKGROUNDS
from training.scenes import OBJECT_COLOURS, Item, Scene, held_out, render
from training.sheets import sheet

STEPS, GUIDANCE, BATCH = 8, 3.5, 20
HANDS = ("3d", "flat", "noto", "twemoji")
SIZES_SHOWN = (0.92, 1.0)
STRANGERS = Path(__file__).with_name("strangers.txt")
SHOWN = (
    "a cat", "pizza", "rocket", "a red heart", "a blue dog", "sunflower", "robot", "three stars",
    "a strawberry", "two owls", "a cat and a pizza", "rainbow", "a purple ghost", "a crown on a dog",
    "birthday cake", "snowman", "a flat guitar", "gelber Stern", "un chien", "犬",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Painter:
    """Pictures from prompts, in batches, each from its own seed."""

    pipeline: FluxPipeline

    def __call__(
        self, prompts: list[str], steps: int = STEPS, guidance: float = GUIDANCE, first_seed: int = 0
    ) -> list[Image.Image]:
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            seeds = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
            answer = self.pipeline(
                part,
                height=128,
                width=128,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=seeds,
                max_sequence_length=self.pipeline.tokenizer_2.model_max_length,
            )
            pictures.extend(answer.images)
        return pictures


def load_pipeline(folder: Path, dtype: torch.dtype) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def small(pictures: list[Image.Image]) -> torch.Tensor:
    """32x32 RGB as one row of numbers each."""
    shrunk = [picture.convert("RGB").resize((32, 32), Image.Resampling.BOX) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture, dtype=np.float32) for picture in shrunk])).flatten(
        1
    )


@dataclass(frozen=True, slots=True)
class Known:
    """Drawings to compare with: `vectors` is (n, 3072), `owners` names the subject or colour of each."""

    vectors: torch.Tensor
    owners: list[str]

    def nearest(self, made: list[Image.Image], places: int = 1) -> list[list[str]]:
        """For each picture the owners of its nearest drawings, nearest first, each once."""
        order = torch.cdist(small(made), self.vectors).argsort(dim=1)
        return [
            list(dict.fromkeys(self.owners[index] for index in row[:60].tolist()))[:places] for row in order
        ]


def all_drawings(
    pictures: Pictures,
    subjects: list[Subject],
    sizes: tuple[float, ...] = SIZES_SHOWN,
    hands: tuple[str, ...] = HANDS,
) -> Known:
    """Every subject in every one of those hands on white."""
    vectors, owners = [], []
    for hand in hands:
        for subject in subjects:
            if subject.name not in pictures.rows[hand]:
                continue
            for size in sizes:
                drawn = render(Scene("single", (Item(subject.name, hand, None, size),)), pictures)
                for pixels in (drawn, drawn[:, ::-1]):
                    vectors.append(small([Image.fromarray(pixels)]))
                    owners.append(subject.name)
    return Known(torch.cat(vectors), owners)


def held_out_pairs(rng: random.Random, subjects: list[Subject], count: int) -> list[tuple[str, str]]:
    """Pairs of name and colour that were never drawn."""
    pairs = [
        (each.name, colour) for each in subjects for colour in OBJECT_COLOURS if held_out(each.name, colour)
    ]
    return rng.sample(pairs, min(count, len(pairs)))


def colour_hits(paint: Painter, pictures: Pictures, pairs: list[tuple[str, str]], guidance: float) -> float:
    """Percent of 'a COLOUR NAME' whose nearest drawing, of all colours of that subject, has the named one."""
    made = paint([f"a {colour} {name}" for name, colour in pairs], guidance=guidance, first_seed=7000)
    hits = 0
    for picture, (name, wanted) in zip(made, pairs, strict=True):
        vectors, owners = [], []
        for colour in OBJECT_COLOURS:
            for hand in HANDS:
                if name in pictures.rows[hand]:
                    drawn = render(Scene("coloured", (Item(name, hand, colour),)), pictures)
                    vectors += [small([Image.fromarray(pixels)]) for pixels in (drawn, drawn[:, ::-1])]
                    owners += [colour, colour]
        hits += Known(torch.cat(vectors), owners).nearest([picture])[0][0] == wanted
    return 100 * hits / len(pairs)


def pair_hits(paint: Painter, tiles: Known, pairs: list[tuple[str, str]], guidance: float) -> float:
    """Percent of 'a NAME and a NAME' in which both are among the five nearest subjects of a half."""
    made = paint([f"a {first} and a {second}" for first, second in pairs], guidance=guidance, first_seed=8000)
    hits = 0
    for picture, names in zip(made, pairs, strict=True):
        halves = [picture.crop(box) for box in ((0, 32, 64, 96), (64, 32, 128, 96))]
        found = {name for names_found in tiles.nearest(halves, 5) for name in names_found}
        hits += set(names) <= found
    return 100 * hits / len(pairs)


def num_blobs(picture: Image.Image) -> int:
    """How many separate things of at least 1.5 % of the area stand on the white ground."""
    pixels = np.asarray(picture.resize((64, 64), Image.Resampling.BOX), np.int16)
    left = np.abs(pixels - 255).max(-1) > 45
    count = 0
    while left.any():
        grown = np.zeros_like(left)
        grown[tuple(np.argwhere(left)[0])] = True
        area = 0
        while grown.sum() != area:
            area = int(grown.sum())
            wide = np.pad(grown, 1)
            grown = left & (
                wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
            )
        count += area > 0.015 * left.size
        left &= ~grown
    return count


def count_hits(paint: Painter, pictures: Pictures, subjects: list[Subject], number: int, words: str) -> float:
    """Percent of 'two NAMES' with two things in them, over subjects that are drawn in one piece."""
    whole = [
        each
        for each in subjects
        if num_blobs(Image.fromarray(render(Scene("single", (Item(each.name, "3d"),)), pictures))) == 1
    ]
    chosen = random.Random(9).sample(whole, 60)
    made = paint([f"{words} {plural(short_names(each)[-1])}" for each in chosen], first_seed=9000 * number)
    return 100 * sum(num_blobs(picture) == number for picture in made) / len(made)


def seed_difference(paint: Painter, names: list[str]) -> float:
    """Mean difference in levels of 255 between two seeds of one prompt."""
    first, second = (small(paint(names, first_seed=seed)) for seed in (100, 200_000))
    return float((first - second).abs().mean())


def border(picture: Image.Image, width: int = 4) -> torch.Tensor:
    """The mean colour of the outermost pixels."""
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32).copy())
    inner = torch.ones(pixels.shape[:2], dtype=torch.bool)
    inner[width:-width, width:-width] = False
    return pixels[inner].mean(dim=0)


def colour_share(paint: Painter, names: list[str]) -> tuple[float, list[Image.Image], list[str]]:
    """Percent of pictures whose border is nearest to the colour that the prompt named."""
    palette = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
    wanted = [(name, index) for index in range(len(palette)) for name in names]
    colours = list(BACKGROUNDS)
    made = paint([f"{name} on a {colours[index]} background" for name, index in wanted], first_seed=5000)
    nearest = [int((palette - border(picture)).square().sum(dim=1).argmin()) for picture in made]
    hits = sum(near == index for near, (_, index) in zip(nearest, wanted, strict=True))
    return 100 * hits / len(wanted), made, [f"{name}, {colours[index]}" for name, index in wanted]


def milliseconds(work: Callable[[], Any], repeats: int = 20) -> float:
    """The median time of a call, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times[2:])[repeats // 2]


@torch.inference_mode()
def speed(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds for one denoising step, one decode and one prompt, single picture, threads as set."""
    pipeline = load_pipeline(folder, dtype)
    length = pipeline.tokenizer_2.model_max_length
    states, pooled, text_ids = pipeline.encode_prompt("a cat", max_sequence_length=length)
    image_ids = pipeline._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), dtype)
    noisy = torch.randn(1, len(image_ids), pipeline.transformer.config.in_channels, dtype=dtype)
    latents = torch.randn(1, pipeline.vae.config.latent_channels, 8, 8, dtype=dtype)
    one = torch.ones(1, dtype=dtype)

    def step() -> None:
        pipeline.transformer(noisy, states, pooled, one, image_ids, text_ids, one, return_dict=False)

    return {
        "step_ms": milliseconds(step),
        "decode_ms": milliseconds(lambda: pipeline.vae.decode(latents)),
        "text_ms": milliseconds(lambda: pipeline.encode_prompt("a cat", max_sequence_length=length)),
    }


def sizes(folder: Path, pipeline: FluxPipeline) -> dict[str, float]:
    """Megabytes on disk and millions of parameters."""
    parts = {
        "transformer": pipeline.transformer,
        "text_encoder": pipeline.text_encoder,
        "text_encoder_2": pipeline.text_encoder_2,
        "vae": pipeline.vae,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    facts = {f"{name}_million": count / 1e6 for name, count in counts.items()}
    facts["disk_mb"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    return facts


def evaluate(data: Path, folder: Path, sheets: Path, num_names: int) -> dict[str, float]:
    """Measures everything and writes the sheets."""
    sheets.mkdir(parents=True, exist_ok=True)
    pictures = load_pictures(data)
    subjects = [subject for subject in read_subjects() if subject.name in pictures.rows["3d"]]
    pipeline = load_pipeline(folder, torch.bfloat16)
    paint = Painter(pipeline)
    rng = random.Random(3)
    names = [each.name for each in rng.sample(subjects, num_names)]
    known = all_drawings(pictures, subjects)
    facts: dict[str, float] = {"subjects": len(subjects), "names": len(names)}
    for steps in (4, 8, 20):
        found = known.nearest(paint(names, steps), 5)
        facts[f"top1_steps_{steps}"] = percent(
            [near[0] == name for near, name in zip(found, names, strict=True)]
        )
        facts[f"top5_steps_{steps}"] = percent(
            [name in near for near, name in zip(found, names, strict=True)]
        )
    pairs = held_out_pairs(rng, subjects, 120)
    tiles = all_drawings(pictures, subjects, (1.0,))
    both = [(a.name, b.name) for a, b in (rng.sample(subjects, 2) for _ in range(80))]
    for guidance in (1.0, 4.0, 8.0):
        facts[f"held_out_colour_guidance_{guidance:g}"] = colour_hits(paint, pictures, pairs, guidance)
        facts[f"pairs_guidance_{guidance:g}"] = pair_hits(paint, tiles, both, guidance)
    facts["two"] = count_hits(paint, pictures, subjects, 2, "two")
    facts["three"] = count_hits(paint, pictures, subjects, 3, "three")
    facts["seed_difference_levels"] = seed_difference(paint, names[:60])
    facts["background_obeyed"], made, labels = colour_share(paint, names[:20])
    sheet(made[::7], labels[::7], 10).save(sheets / "colours.png")
    show_sheets(paint, sheets)
    facts.update(sizes(folder, pipeline))
    for dtype in (torch.bfloat16, torch.float32):
        kind = "bf16" if dtype == torch.bfloat16 else "fp32"
        facts.update({f"{name}_{kind}": value for name, value in speed(folder, dtype).items()})
    return facts


def percent(hits: list[bool]) -> float:
    """The share of True."""
    return 100 * sum(hits) / len(hits)


def read_strangers() -> list[str]:
    """The prompts that nobody trained on."""
    lines = STRANGERS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def show_sheets(paint: Painter, sheets: Path) -> None:
    """The sheets that are looked at rather than counted."""
    shown = list(SHOWN)
    sheet(paint(shown), shown, 10).save(sheets / "shown.png")
    strangers = read_strangers()
    made = [paint(strangers, first_seed=10_000 * seed) for seed in range(1, 5)]
    four = [picture for row in zip(*made, strict=True) for picture in row]
    sheet(four, [prompt for prompt in strangers for _ in range(4)], 16).save(sheets / "strangers.png")
    few = shown[:10]
    for kind, settings in (
        ("guidance", [(STEPS, guidance) for guidance in (1.0, 2.0, 4.0, 8.0)]),
        ("steps", [(steps, GUIDANCE) for steps in (1, 2, 4, 8, 20)]),
    ):
        made_few = [picture for steps, guidance in settings for picture in paint(few, steps, guidance)]
        values = [steps if kind == "steps" else guidance for steps, guidance in settings]
        sheet(made_few, [f"{kind} {value:g}: {name}" for value in values for name in few], 10).save(
            sheets / f"{kind}.png"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sheets", type=Path, required=True)
    parser.add_argument("--names", type=int, default=200)
    parser.add_argument("--only-sheets", action="store_true", help="draw the sheets and measure nothing")
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    set_up(a.threads)
    if a.only_sheets:
        a.sheets.mkdir(parents=True, exist_ok=True)
        show_sheets(Painter(load_pipeline(a.model, torch.bfloat16)), a.sheets)
        return
    facts = evaluate(a.data, a.model, a.sheets, a.names)
    print(json.dumps({name: round(value, 2) for name, value in facts.items()}, indent=1))


if __name__ == "__main__":
    main()
