"""The engine as a library, without a server: many pictures through one model, as they finish.

python examples/offline.py emoji FOLDER
"""

import sys
from pathlib import Path

from PIL import Image

from mezzotint.engine import Engine, Request

PROMPTS = ("a happy cat", "a rocket", "a red apple on a teal background")


def main(model: str, folder: str) -> None:
    engine = Engine.load(model)
    requests = [Request(prompt=prompt, num_inference_steps=8, seed=7) for prompt in PROMPTS]
    for prompt, result in zip(PROMPTS, engine.generate(requests), strict=True):
        if result.image is None:
            raise SystemExit(f"{prompt}: {result.error}")
        file = Path(folder) / f"{prompt.replace(' ', '-')}.png"
        Image.fromarray(result.image).save(file)
        print(file)


if __name__ == "__main__":
    main(*sys.argv[1:3])
