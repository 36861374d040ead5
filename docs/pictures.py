"""Draws the pages' pictures with the built-in model, through the HTTP interface like everybody.

mezzotint serve --no-auth &
python docs/pictures.py    writes docs/images/{emoji,styles,edits}.png; the same model gives the same files
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mezzotint import Client, ImageFields

FOLDER = Path(__file__).parent / "images"
PROMPTS = (
    "a red apple on a teal background", "a blue apple", "a rocket", "a panda", "a butterfly", "a hamburger",
    "an alien on a black background", "a red heart on a pink background",
    "a green car on a yellow background", "a purple octopus", "two red hearts", "three strawberries",
    "four balloons", "a small star at the top left", "a rocket and a star", "une grenouille verte",
    "a ghost on a purple background", "a robot on a yellow background", "a flat fox", "a happy face",
    "a lion", "a watermelon", "an owl on a yellow background", "a penguin on a blue background",
)  # fmt: skip
COLUMNS = 8
STYLES = ("emoji", "emoji:flat", "emoji:mono", "emoji:noto")
STYLED = (
    "a red apple", "a panda", "a rocket on a light blue background", "a fox on a green background",
    "an ice cream", "a robot on a yellow background", "a mushroom", "a hamburger", "a snowman",
    "a lion on a yellow background", "a smiling face with sunglasses", "a strawberry on a pink background",
)  # fmt: skip
EDIT_STRENGTHS = (0.4, 0.6, 0.8)
EDIT_HOLES = ("a red apple with a worm", "a red apple with a face", "a red apple with a star")
GAP, LABEL = 16, 18
"""Pixels between the two halves of the style sheet, and above each of its columns."""
STEPS, GUIDANCE, SEED = 20, 3.5, 7


def draw(client: Client, wanted: list[tuple[str, str]]) -> list[Image.Image]:
    """The pictures of (model, prompt), all with one seed."""
    requests: list[ImageFields] = [
        {
            "model": model,
            "prompt": prompt,
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "seed": SEED,
            "response_format": "png",
        }
        for model, prompt in wanted
    ]
    return [result.image for result in client.images.generate_many(requests)]


def show(client: Client) -> Image.Image:
    """What the model draws."""
    pictures = draw(client, [("emoji", prompt) for prompt in PROMPTS])
    width, height = pictures[0].size
    sheet = Image.new("RGB", (COLUMNS * width, len(pictures) // COLUMNS * height))
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % COLUMNS * width, place // COLUMNS * height))
    return sheet


def show_styles(client: Client) -> Image.Image:
    """The same prompts and seed in every style: a column each, in two halves."""
    half = len(STYLED) // 2
    pictures = draw(client, [(style, prompt) for prompt in STYLED for style in STYLES])
    width, height = pictures[0].size
    sheet = Image.new("RGB", (2 * len(STYLES) * width + GAP, half * height + LABEL), "white")
    pen = ImageDraw.Draw(sheet)
    for place, picture in enumerate(pictures):
        row, column = divmod(place, len(STYLES))
        left = row // half * (len(STYLES) * width + GAP) + column * width
        sheet.paste(picture, (left, row % half * height + LABEL))
        if row % half == 0:
            pen.text((left + 4, 3), STYLES[column], fill="black")
    return sheet


def show_edits(client: Client) -> Image.Image:
    """A row each: what went in, then what came out at three strengths; the last row with a mask."""
    (apple,) = draw(client, [("emoji", "a red apple on a white background")])
    sketch = Image.new("RGB", apple.size, "white")
    pen = ImageDraw.Draw(sketch)
    pen.ellipse((24, 40, 104, 120), fill="orange")
    pen.polygon([(30, 60), (36, 16), (60, 44)], fill="orange")
    pen.polygon([(98, 60), (92, 16), (68, 44)], fill="orange")
    hole = Image.new("L", apple.size)
    ImageDraw.Draw(hole).rectangle((40, 44, 92, 96), fill=255)
    shown = apple.copy()
    shown.paste("white", (40, 44, 92, 96))
    rows = [
        (apple, [_edit(client, apple, "a green apple", strength=share) for share in EDIT_STRENGTHS]),
        (sketch, [_edit(client, sketch, "a cat face", strength=share) for share in EDIT_STRENGTHS]),
        (shown, [_edit(client, apple, prompt, mask=hole) for prompt in EDIT_HOLES]),
    ]
    width, height = apple.size
    sheet = Image.new("RGB", (4 * width + GAP, 3 * height), "white")
    for row, (before, after) in enumerate(rows):
        sheet.paste(before, (0, row * height))
        for column, picture in enumerate(after):
            sheet.paste(picture, ((column + 1) * width + GAP, row * height))
    return sheet


def _edit(client: Client, image: Image.Image, prompt: str, **fields: Any) -> Image.Image:
    made = client.images.edit(
        model="emoji", image=image, prompt=prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        seed=SEED, response_format="png", **fields,
    )  # fmt: skip
    return made.image


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with Client() as client:
        show(client).save(FOLDER / "emoji.png", optimize=True)
        show_styles(client).save(FOLDER / "styles.png", optimize=True)
        show_edits(client).save(FOLDER / "edits.png", optimize=True)


if __name__ == "__main__":
    main()
