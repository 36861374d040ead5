"""What one would write in an afternoon: a diffusers pipeline behind FastAPI, one request after the other.

    python -m benchmarks.baseline_server MODEL_FOLDER FOLDER [--dtype bf16|fp32]

It listens on a free port of 127.0.0.1 and writes its address to FOLDER/server.json, as `mezzotint serve`
does. Same weights, dtype and threads (OMP_NUM_THREADS) as what it is compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI
from pydantic import BaseModel

DEFAULT_TEXT_LENGTH = 512
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Request(BaseModel):
    prompt: str
    num_inference_steps: int
    width: int
    height: int
    guidance_scale: float | None = None
    seed: int = 0


def create_app(pipeline: Any) -> FastAPI:
    """The application around a loaded pipeline."""
    app = FastAPI()
    thread = ThreadPoolExecutor(max_workers=1)

    def generate(request: Request) -> str:
        guidance = {} if request.guidance_scale is None else {"guidance_scale": request.guidance_scale}
        image = pipeline(
            request.prompt,
            num_inference_steps=request.num_inference_steps,
            width=request.width,
            height=request.height,
            **text_length(pipeline),
            generator=torch.Generator().manual_seed(request.seed),
            **guidance,
        ).images[0]
        file = io.BytesIO()
        image.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    @app.post("/dedicated/v1/images/generations")
    async def generations(request: Request) -> dict[str, Any]:
        picture = await asyncio.get_running_loop().run_in_executor(thread, generate, request)
        return {"data": [{"seed": request.seed, "b64_json": picture}]}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        return {"status": "ready"}

    return app


def text_length(pipeline: Any) -> dict[str, int]:
    """What the built-in model's card says to pass: its text encoder is shorter than the default."""
    limit = getattr(getattr(pipeline, "tokenizer_2", None), "model_max_length", DEFAULT_TEXT_LENGTH)
    return {"max_sequence_length": limit} if limit < DEFAULT_TEXT_LENGTH else {}


def load(model: str, dtype: str) -> Any:
    """The pipeline as its documentation says to load it."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    arguments = parser.parse_args()
    app = create_app(load(arguments.model, arguments.dtype))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        (arguments.folder / "server.json").write_text(json.dumps({"url": url, "pid": os.getpid()}))
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
