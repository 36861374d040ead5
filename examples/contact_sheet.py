"""One prompt, eight seeds, one sheet: pick a seed by eye and keep it.

python examples/contact_sheet.py "a red apple" sheet.png
"""

import sys

from PIL import Image

from mezzotint import Client

COLUMNS, SEEDS = 4, range(8)


def main(prompt: str, path: str) -> None:
    with Client() as client:  # MEZZOTINT_BASE_URL and MEZZOTINT_API_KEY say where and who
        results = client.images.generate_many(
            [
                {
                    "model": "emoji",
                    "prompt": prompt,
                    "num_inference_steps": 8,
                    "seed": seed,
                    "response_format": "png",
                }
                for seed in SEEDS
            ]
        )
    width, height = results[0].image.size
    sheet = Image.new("RGB", (COLUMNS * width, len(SEEDS) // COLUMNS * height))
    for place, result in enumerate(results):
        sheet.paste(result.image, (place % COLUMNS * width, place // COLUMNS * height))
    sheet.save(path)


if __name__ == "__main__":
    main(*sys.argv[1:3])
