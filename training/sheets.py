"""Pictures side by side with their labels."""

from __future__ import annotations

from PIL import Image, ImageDraw

CELL, LABEL = 128, 16


def sheet(pictures: list[Image.Image], labels: list[str], columns: int) -> Image.Image:
    """A grid of 128x128 pictures, each with its label underneath."""
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (CELL + 4), rows * (CELL + LABEL + 4)), (255, 255, 255))
    draw = ImageDraw.Draw(page)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = index % columns * (CELL + 4), index // columns * (CELL + LABEL + 4)
        page.paste(picture.resize((CELL, CELL)) if picture.size != (CELL, CELL) else picture, (x, y))
        draw.text((x + 2, y + CELL + 1), label[:24], fill=(40, 40, 40))
    return page
