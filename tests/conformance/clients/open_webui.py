"""The real Open WebUI server, asked through its own HTTP API as its page asks it.

It begins with an empty data folder. The first account is the admin, who sets the two engines up.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conformance.clients.target import PROMPT, Server, picture, red_square, run, text_of

START_S = 240
QUIET = {
    "OFFLINE_MODE": "true",
    "HF_HUB_OFFLINE": "1",
    "RAG_EMBEDDING_ENGINE": "openai",  # else it loads a model of its own for documents
    "ENABLE_OLLAMA_API": "false",
    "ENABLE_OPENAI_API": "false",
    "ANONYMIZED_TELEMETRY": "false",
    "WEBUI_SECRET_KEY": "for this run",
    "OMP_NUM_THREADS": "1",
}


class WebUI:
    """A running Open WebUI, with the token of its admin."""

    def __init__(self, url: str) -> None:
        self.url, self.token = url, ""

    def call(self, path: str, body: Any = None) -> Any:
        """The JSON at this path: what `body` gives when it is posted, else what is there."""
        answer = json.loads(self.fetch(path, body))
        return answer

    def fetch(self, path: str, body: Any = None) -> bytes:
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.token}"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, data, headers), timeout=120
        ) as answer:
            return bytes(answer.read())

    def configure(self, **values: Any) -> None:
        """Saves the admin's settings of images; all others keep Open WebUI's own defaults."""
        config = self.call("/api/v1/images/config")
        self.call("/api/v1/images/config/update", config | {"ENABLE_IMAGE_GENERATION": True} | values)

    def generate(self, **fields: Any) -> Any:
        [made] = self.call("/api/v1/images/generations", {"prompt": PROMPT, **fields})
        return picture(self.fetch(made["url"]))


@contextlib.contextmanager
def running() -> Iterator[WebUI]:
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        log = Path(folder) / "log"
        program = str(Path(sys.executable).parent / "open-webui")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [program, "serve", "--host", "127.0.0.1", "--port", str(port)],
                env=os.environ | QUIET | {"DATA_DIR": folder},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            web = WebUI(f"http://127.0.0.1:{port}")
            wait_for(web, process, log)
            yield web
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_for(web: WebUI, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until it answers, and makes the first account."""
    until = time.monotonic() + START_S
    while True:
        try:
            web.fetch("/health")
            break
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(log.read_text()[-3000:]) from None
            time.sleep(1)
    account = {"name": "admin", "email": "admin@example.org", "password": "only for this run"}
    web.token = web.call("/api/v1/auths/signup", account)["token"]


def openai_engine(web: WebUI, server: Server) -> None:
    web.configure(
        IMAGE_GENERATION_ENGINE="openai",
        IMAGE_GENERATION_MODEL=server.model,
        IMAGES_OPENAI_API_BASE_URL=f"{server.url}/v1",
        IMAGES_OPENAI_API_KEY=server.key,
    )
    assert web.generate().size == server.image.size
    assert web.generate(size="1024x1024", negative_prompt="blurry").size == server.image.size
    several = web.call("/api/v1/images/generations", {"prompt": PROMPT, "n": 2})
    assert len({web.fetch(one["url"]) for one in several}) == 2


def own_model_name(web: WebUI, server: Server) -> None:
    """It asks for no format of models with OpenAI's names, and then fetches no URL of its own network."""
    web.configure(IMAGE_GENERATION_MODEL="gpt-image-1", IMAGE_SIZE="auto")
    assert web.generate().size == server.image.size
    web.configure(IMAGE_GENERATION_MODEL=server.model, IMAGE_SIZE="512x512")


def automatic1111_engine(web: WebUI, server: Server) -> None:
    """50 steps at 512x512, which are its defaults."""
    web.configure(
        IMAGE_GENERATION_ENGINE="automatic1111",
        AUTOMATIC1111_BASE_URL=server.url,
        AUTOMATIC1111_API_AUTH=f"anyone:{server.key}",
    )
    assert server.model in [model["id"] for model in web.call("/api/v1/images/models")]
    assert web.generate().size == server.image.size
    assert web.generate(model=server.model, negative_prompt="blurry, text").size == server.image.size


def edit(web: WebUI, server: Server) -> None:
    data = f"data:image/png;base64,{text_of(red_square())}"
    for model in (server.model, "gpt-image-1"):
        web.configure(
            ENABLE_IMAGE_EDIT=True,
            IMAGE_EDIT_ENGINE="openai",
            IMAGE_EDIT_MODEL=model,
            IMAGES_EDIT_OPENAI_API_BASE_URL=f"{server.url}/v1",
            IMAGES_EDIT_OPENAI_API_KEY=server.key,
        )
        [made] = web.call("/api/v1/images/edit", {"image": data, "prompt": PROMPT})
        edited = picture(web.fetch(made["url"]))
        assert edited.size == red_square().size
        assert edited.tobytes() != red_square().tobytes()
    [made] = web.call("/api/v1/images/edit", {"image": [data], "prompt": PROMPT, "n": 1, "size": "512x512"})
    assert picture(web.fetch(made["url"])).size == server.image.size


def refusal(web: WebUI, server: Server) -> None:
    """Its user reads that the request was refused."""
    web.configure(IMAGE_GENERATION_ENGINE="openai", IMAGE_GENERATION_MODEL="nothing")
    said = ""
    try:
        web.generate()
    except urllib.error.HTTPError as error:
        said = f"{error.code} {error.read().decode()}"
    assert said.startswith("400"), said or "accepted"
    assert "Not Found" in said


if __name__ == "__main__":
    with running() as web:
        run(
            [
                ("OpenAI engine: 512x512, 1024x1024, n", lambda server: openai_engine(web, server)),
                ("OpenAI engine with `gpt-image-1`", lambda server: own_model_name(web, server)),
                ("AUTOMATIC1111 engine: 512x512, 50 steps", lambda server: automatic1111_engine(web, server)),
                ("edit, with both kinds of names", lambda server: edit(web, server)),
                ("a refusal reaches its user", lambda server: refusal(web, server)),
            ]
        )
