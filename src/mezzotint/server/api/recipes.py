"""Commands for a shell that ask one address; where the answer is a picture, they end in a picture file."""

from __future__ import annotations

import json
import shlex
from typing import Any

_KEY = '-H "Authorization: Bearer $MEZZOTINT_API_KEY"'
_JSON = '-H "Content-Type: application/json"'
_FROM_URL = "| tee /dev/stderr | grep -o 'http[^\"]*' | xargs -r curl -sS -o {file}"
_FROM_BASE64 = '| sed -n \'s/.*"images":\\["\\([^"]*\\)".*/\\1/p\' | base64 --decode > {file}'
_PICTURES = {
    "/dedicated/v1/images/generations": (
        {"model": "emoji", "prompt": "a red apple", "num_inference_steps": 8, "seed": 7},
        _FROM_URL,
    ),
    "/v1/images/generations": (
        {"model": "emoji", "prompt": "a red apple", "seed": 7, "response_format": "url"},
        _FROM_URL,
    ),
    "/sdapi/v1/txt2img": (
        {"prompt": "a red apple", "steps": 8, "seed": 7, "width": 128, "height": 128},
        _FROM_BASE64,
    ),
}
"""Path -> body, and the way from the answer to picture.png."""
_EDITS = {
    "/dedicated/v1/images/edits": (
        {"model": "emoji", "prompt": "a green apple", "strength": 0.6, "seed": 7, "image": {"image": "%s"}},
        _FROM_URL,
    ),
    "/sdapi/v1/img2img": (
        {"prompt": "a green apple", "denoising_strength": 0.6, "seed": 7, "init_images": ["%s"]},
        _FROM_BASE64,
    ),
}
"""The same for those that start from picture.png and end in edited.png."""
_BODIES = {
    ("post", "/dedicated/beta/endpoint"): {"name": "second", "hfModelRepo": "owner/name"},
    ("put", "/dedicated/beta/endpoint/{endpoint_id}"): {"settings": {"default_steps": 8}},
    ("post", "/sdapi/v1/options"): {"sd_model_checkpoint": "emoji"},
}
"""Better bodies than the document's own."""
_NAMES = {
    "endpoint_id": "emoji",
    "model": "emoji",
    "route": "ink",
    "request_id": "$REQUEST_ID",
    "name": "$NAME",
}
"""What stands for the parts of a path."""


def command(path: str, method: str, example: Any, base_url: str) -> str:
    """The command for one operation; `example` is the JSON body where it takes one, else None."""
    base = base_url.rstrip("/")
    if path in _PICTURES:
        body, rest = _PICTURES[path]
        return _lines(
            f"curl -sS {base}{path}", _KEY, _JSON, f"-d {_quoted(body)}", rest.format(file="picture.png")
        )
    if path in _EDITS:
        body, rest = _EDITS[path]
        picture = '"$(base64 < picture.png | tr -d "\\n")"'
        sent = f"printf {_quoted(body)} {picture}"
        ask = f"| curl -sS {base}{path}"
        return _lines(sent, ask, _KEY, _JSON, "--data-binary @-", rest.format(file="edited.png"))
    if path == "/v1/images/edits":
        fields = "-F model=emoji -F prompt='a green apple' -F response_format=url -F image=@picture.png"
        return _lines(f"curl -sS {base}{path}", _KEY, fields, _FROM_URL.format(file="edited.png"))
    if path == "/images/{name}":
        return 'curl -sS -o picture.png "$URL"  # the url of an answer, with its signature'
    example = _BODIES.get((method, path), example)
    for part, value in _NAMES.items():
        path = path.replace(f"{{{part}}}", value)
    verb = "" if method == "get" or (method == "post" and example is not None) else f"-X {method.upper()} "
    if example is None:
        return _lines(f"curl -sS {verb}{base}{path}", _KEY)
    return _lines(f"curl -sS {verb}{base}{path}", _KEY, _JSON, f"-d {_quoted(example)}")


def _lines(*parts: str) -> str:
    return " \\\n  ".join(parts)


def _quoted(body: Any) -> str:
    return shlex.quote(json.dumps(body, ensure_ascii=False))
