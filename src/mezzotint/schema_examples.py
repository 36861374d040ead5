"""Examples of bodies and answers, for the OpenAPI document."""

from __future__ import annotations

from pydantic import JsonValue

REQUEST_EXAMPLES: list[JsonValue] = [
    {"model": "emoji", "num_inference_steps": 8, "prompt": "a smiling cat", "response_format": "png"},
    {
        "model": "emoji",
        "num_inference_steps": 20,
        "prompt": "a red apple",
        "guidance_scale": 4.0,
        "response_format": "url",
        "seed": 123,
    },
]
ANSWER_EXAMPLE: JsonValue = {
    "created": 1795300000,
    "id": "req_01jd8k3v9w2m5x7q",
    "data": [
        {
            "seed": 123,
            "response_format": "png",
            "b64_json": "iVBORw0KGgo=",
            "width": 128,
            "height": 128,
            "mime_type": "image/png",
            "timings": {"queue_ms": 3.1, "generate_ms": 81.2, "encode_ms": 1.4},
        }
    ],
    "usage": {"images": 1, "steps": 8},
    "warnings": [],
}
ERROR_EXAMPLE: JsonValue = {
    "error": {
        "message": "num_inference_steps must be between 1 and 50 (got 99)",
        "type": "invalid_request_error",
        "param": "num_inference_steps",
        "code": "out_of_range",
    },
    "detail": "num_inference_steps must be between 1 and 50 (got 99)",
    "request_id": "req_01jd8k3v9w2m5x7q",
}
