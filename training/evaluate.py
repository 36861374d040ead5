"""Prints what the built-in model can do: `python -m training.evaluate --data D --model M --sheets OUT`."""

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

from training.data import Pictures, Subject, composite, load_pictures, read_subjects
from training.device import set_up
from training.palette import BACKGROUNDS, WHITE
from training.sheets import sheet

STEPS, GUIDANCE, BATCH = 8, 3.5, 20
SETTINGS = {
    "": (STEPS, GUIDANCE),
    "_guidance_1": (STEPS, 1.0),
    "_guidance_4": (STEPS, 4.0),
    "_guidance_8": (STEPS, 8.0),
    "_steps_4": (4, GUIDANCE),
    "_steps_20": (20, GUIDANCE),
}
SHOWN = (
    "cat face", "pizza", "rocket", "red heart", "dog face", "sunflower", "robot", "penguin", "strawberry",
    "automobile", "grinning face", "rainbow", "ghost", "owl", "birthday cake", "snowman", "octopus", "crown",
    "guitar", "fire",
)  # fmt: skip
BEYOND = (
    "a happy cat on a teal background", "green apple", "blue apple", "sad dog",
    "a dog on a pink background", "purple heart on a yellow background", "love", "halloween", "summer",
    "music", "winter", "birthday party", "wizard", "angry cat", "red car on a light blue background",
    "kitten", "dinosaur", "coffee", "a smiling sun", "pirate", "ice cream on a purple background",
    "two cats", "cat and dog", "a robot eating pizza", "spaceship", "green frog on a red background",
    "blue bird", "scary face", "sleepy panda", "rainbow unicorn",
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


def originals(
    pictures: Pictures, subjects: list[Subject], background: tuple[int, int, int], style: str = "3d"
) -> list[Image.Image]:
    """The subjects' own pictures on that background."""
    rows = [pictures.rows[style][subject.name] for subject in subjects]
    colours = torch.tensor([background] * len(rows), dtype=torch.float32)
    pixels = ((composite(pictures.pixels[rows], colours) + 1) * 127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]


def ranks(made: list[Image.Image], wanted: list[int], known: torch.Tensor) -> list[int]:
    """How many originals are nearer to each picture than the one it should show."""
    distances = torch.cdist(small(made), known)
    own = distances.gather(1, torch.tensor(wanted)[:, None])
    return [int(nearer) for nearer in (distances < own).sum(dim=1)]


def shares(places: list[int]) -> tuple[float, float]:
    """Top-1 and top-5 in percent."""
    count = len(places)
    return 100 * sum(p < 1 for p in places) / count, 100 * sum(p < 5 for p in places) / count


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


def evaluate(data: Path, folder: Path, sheets: Path, num_names: int, shift: float | None) -> dict[str, float]:
    """Measures everything and writes the sheets."""
    sheets.mkdir(parents=True, exist_ok=True)
    pictures = load_pictures(data)
    subjects = [subject for subject in read_subjects() if subject.name in pictures.rows["3d"]]
    pipeline = load_pipeline(folder, torch.bfloat16)
    if shift is not None:
        pipeline.scheduler.register_to_config(shift=shift)
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    paint = Painter(pipeline)
    known = small(originals(pictures, subjects, WHITE))
    rng = random.Random(3)
    chosen = sorted(rng.sample(range(len(subjects)), min(num_names, len(subjects))))
    names = [subjects[index].name for index in chosen]
    facts: dict[str, float] = {"subjects": len(subjects), "names": len(names)}

    shrunk = {}
    for label, (steps, guidance) in SETTINGS.items():
        made = paint(names, steps, guidance)
        shrunk[label] = small(made)
        facts[f"top1{label}"], facts[f"top5{label}"] = shares(ranks(made, chosen, known))
        if label == "":
            sheet(made[::3], names[::3], 10).save(sheets / "names.png")
    facts["guidance_1_to_8_difference"] = float((shrunk["_guidance_8"] - shrunk["_guidance_1"]).abs().mean())

    twenty = [subjects[index].name for index in chosen[:: max(1, len(chosen) // 20)][:20]]
    facts["colour_obeyed"], made, labels = colour_share(paint, twenty)
    sheet(made[::7], labels[::7], 10).save(sheets / "colours.png")
    show_sheets(paint, sheets)
    facts.update(sizes(folder, pipeline))
    for dtype in (torch.bfloat16, torch.float32):
        kind = "bf16" if dtype == torch.bfloat16 else "fp32"
        facts.update({f"{name}_{kind}": value for name, value in speed(folder, dtype).items()})
    return facts


def show_sheets(paint: Painter, sheets: Path) -> None:
    """The sheets that are looked at rather than counted."""
    shown = list(SHOWN)
    sheet(paint(shown), shown, 10).save(sheets / "shown.png")
    few = shown[:10]
    for kind, settings in (
        ("guidance", [(STEPS, guidance) for guidance in (1.0, 2.0, 4.0, 8.0)]),
        ("steps", [(steps, GUIDANCE) for steps in (1, 2, 4, 8, 20)]),
    ):
        made = [picture for steps, guidance in settings for picture in paint(few, steps, guidance)]
        values = [steps if kind == "steps" else guidance for steps, guidance in settings]
        labels = [f"{kind} {value:g}: {name}" for value in values for name in few]
        sheet(made, labels, 10).save(sheets / f"{kind}.png")
    sheet(paint(list(BEYOND)), list(BEYOND), 10).save(sheets / "beyond.png")
    repeated = [prompt for prompt in ("cat face", "love", "a flower") for _ in range(10)]
    sheet(paint(repeated), repeated, 10).save(sheets / "seeds.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sheets", type=Path, required=True)
    parser.add_argument("--names", type=int, default=300)
    parser.add_argument("--shift", type=float, help="try another scheduler shift than the folder's")
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    set_up(a.threads)
    facts = evaluate(a.data, a.model, a.sheets, a.names, a.shift)
    print(json.dumps({name: round(value, 2) for name, value in facts.items()}, indent=1))


if __name__ == "__main__":
    main()
