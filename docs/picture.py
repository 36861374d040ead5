"""Draws the README's picture with the built-in model, through the HTTP interface like everybody.

mezzotint serve --no-auth &
python docs/picture.py            writes docs/images/emoji.png; the same model gives the same file
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mezzotint import Client, ImageFields

FILE = Path(__file__).parent / "images" / "emoji.png"
PROMPTS = (
    "a red apple", "a rocket on a light blue background", "an octopus", "a pizza",
    "a smiling face with sunglasses",
    "a ghost on a purple background", "a cactus", "a robot on a yellow background",
    "a fox on a green background", "an ice cream", "a crown", "a happy cat on a teal background",
    "a red heart on a pink background", "a mushroom", "a rainbow", "a penguin on a blue background",
    "a hamburger", "an alien on a black background", "a snowman on a light blue background", "a watermelon",
    "a bee on a yellow background", "a balloon", "a strawberry", "a whale on a teal background",
)  # fmt: skip
COLUMNS = 8
STEPS, GUIDANCE, SEED = 20, 3.5, 7


def main() -> None:
    requests: list[ImageFields] = [
        {
            "model": "emoji",
            "prompt": prompt,
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "seed": SEED,
            "response_format": "png",
        }
        for prompt in PROMPTS
    ]
    with Client() as client:
        pictures = [result.image for result in client.images.generate_many(requests)]
    width, height = pictures[0].size
    sheet = Image.new("RGB", (COLUMNS * width, len(pictures) // COLUMNS * height))
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % COLUMNS * width, place // COLUMNS * height))
    FILE.parent.mkdir(exist_ok=True)
    sheet.save(FILE, optimize=True)


if __name__ == "__main__":
    main()
