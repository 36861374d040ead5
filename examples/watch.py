"""Progress and previews while a picture is made; leaving the loop early would cancel it.

python examples/watch.py "a red apple" apple.png
"""

import sys

from mezzotint import Client, Completed, Preview, Progress


def main(prompt: str, path: str) -> None:
    with Client() as client:
        for event in client.images.stream(model="emoji", prompt=prompt, num_inference_steps=20, previews=3):
            if isinstance(event, Progress) and event.step:
                print(f"step {event.step} of {event.num_steps}")
            elif isinstance(event, Preview):
                print(f"a preview of {event.image.size} pixels")
            elif isinstance(event, Completed):
                event.result.save(path)
                print(f"{path}, seed {event.result.seed}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
