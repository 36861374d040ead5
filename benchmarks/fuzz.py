"""Do twenty thousand odd bodies find a fault?

    python -m benchmarks.fuzz [--examples N] [--seed S] [--model SOURCE] [--edits]

Bodies made by hypothesis, from right to nonsense, are sent to a running server: the whole server process with
a worker that paints without a model, or on --model SOURCE. None may be answered with 5xx or take longer than
HANG_S, each refusal must have the one error body, and the server may not grow. With --edits the bodies have
pictures, whole and damaged, and go to the dedicated route and to OpenAI's in turn.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections import Counter
from typing import Any

import httpx2
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.serving import Running, fake_server, mezzotint_server, report
from mezzotint.schemas import ErrorBody, ImageGenerationAnswer

HANG_S = 30.0
WARM_EXAMPLES = 1_000
"""Bodies after which memory is first measured; what grows later grows for ever."""
MAX_GROWTH_MIB = 32.0

JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just("emoji"),
    "num_inference_steps": st.integers(1, 50),
    "prompt": st.text(min_size=1, max_size=60),
    "guidance_scale": st.none() | st.floats(0, 100),
    "response_format": st.none() | st.sampled_from(["url", "raw", "png", "jpeg", "jpg"]),
    "seed": st.none() | st.integers(0, 2**63 - 1),
    "n": st.none() | st.integers(1, 8),
    "width": st.sampled_from([None, 8, 16, 32, 64, 512]),
    "height": st.sampled_from([None, 8, 16, 32, 64, 512]),
    "negative_prompt": st.none() | st.text(max_size=20),
}
NUM_REQUIRED = 3
EDGES = st.sampled_from(
    [
        "",
        "emoji:",
        "emoji:a:b",
        "emoji:none",
        "../x",
        "\x00",
        0,
        -1,
        51,
        2**63,
        1e400,
        "20",
        20.5,
        True,
        [],
        {},
    ]
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A body: right in most fields, odd in some; sometimes not even JSON."""
    fields = {}
    for number, (name, right) in enumerate(RIGHT.items()):
        if draw(st.integers(0, 19)) < (19 if number < NUM_REQUIRED else 8):
            fields[name] = draw(right)
    if draw(st.booleans()):
        for name in draw(st.lists(st.sampled_from(list(RIGHT)), max_size=2)):
            fields[name] = draw(EDGES | JUNK)
    if draw(st.integers(0, 19)) == 0:
        fields[draw(st.text(max_size=12))] = draw(JUNK)
    raw = json.dumps(fields, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    damage = draw(st.integers(0, 19))
    if damage == 0:
        return draw(st.binary(max_size=80))
    if damage == 1:
        return json.dumps(draw(JUNK)).encode()
    if damage == 2:
        return raw[: draw(st.integers(0, len(raw)))]
    if damage == 3:
        return raw.replace(b"{", b'{"seed": 1, "seed": 2, ', 1)
    return raw


def _file(form: str, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 64).convert("RGB").save(file, form)
    return file.getvalue()


FILES = [_file(form, *size) for form in ("PNG", "JPEG", "WEBP") for size in ((32, 32), (64, 40), (1, 7))]


@st.composite
def pictures(draw: st.DrawFn) -> dict[str, str]:
    """A picture as a body has it: whole, with some bytes changed, cut short, or no base64."""
    data = bytearray(draw(st.sampled_from(FILES)))
    if draw(st.booleans()):
        for _ in range(draw(st.integers(0, 6))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        data = data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data
    text = base64.b64encode(data).decode()
    return {"image": draw(st.sampled_from([text, text, text, f"data:image/png;base64,{text}", text[1:]]))}


EDITS: dict[str, st.SearchStrategy[Any]] = {
    "image": pictures() | st.lists(pictures(), max_size=3),
    "mask": pictures() | st.none(),
    "strength": st.none() | st.floats(0, 1) | EDGES,
}


@st.composite
def edit_bodies(draw: st.DrawFn) -> bytes:
    """A body with pictures, odd in some fields."""
    fields: dict[str, Any] = {"model": "emoji", "num_inference_steps": 4, "prompt": "a cat"}
    fields["image"] = draw(EDITS["image"])
    for name in draw(st.lists(st.sampled_from([*EDITS, *RIGHT, "size"]), max_size=5)):
        right = EDITS.get(name) or RIGHT.get(name) or JUNK
        fields[name] = draw(right if draw(st.integers(0, 3)) else EDGES | JUNK)
    return json.dumps(fields).encode("utf-8", "surrogatepass")


ROUTES = ("/dedicated/v1/images/edits", "/v1/images/edits")


def fuzz(server: Running, num_examples: int, start: int, *, edits: bool) -> tuple[Counter[int], float]:
    """Statuses by number of bodies, and by how many MiB the server grew after the first thousand."""
    statuses: Counter[int] = Counter()
    memory = [0]
    routes = ROUTES if edits else ("/dedicated/v1/images/generations",)

    with httpx2.Client(timeout=HANG_S) as client:

        @seed(start)
        @settings(
            max_examples=num_examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(edit_bodies() if edits else bodies())
        def send(body: bytes) -> None:
            address = server.url + routes[statuses.total() % len(routes)]
            response = client.post(address, content=body, headers={"content-type": "application/json"})
            statuses[response.status_code] += 1
            if sum(statuses.values()) == min(WARM_EXAMPLES, num_examples // 2):
                memory[0] = server.process.memory_info().rss
            assert response.status_code < 500, (response.status_code, body, response.text)
            if response.status_code != 200:
                ErrorBody.model_validate_json(response.content)
            elif address.endswith("/generations"):
                ImageGenerationAnswer.model_validate_json(response.content)

        send()
    return statuses, (server.process.memory_info().rss - memory[0]) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model")
    parser.add_argument("--edits", action="store_true")
    arguments = parser.parse_args()
    with mezzotint_server(arguments.model) if arguments.model else fake_server() as server:
        statuses, growth = fuzz(server, arguments.examples, arguments.seed, edits=arguments.edits)
    rows = [(f"answered {status}", str(number)) for status, number in sorted(statuses.items())]
    rows += [("bodies", str(sum(statuses.values()))), ("server grew by, MiB", f"{growth:.1f}")]
    report("fuzz", rows, {"statuses": dict(statuses), "growth_mib": round(growth, 1)})
    return int(growth > MAX_GROWTH_MIB or not statuses[200])


if __name__ == "__main__":
    raise SystemExit(main())
