"""llm with its plugin for OpenAI's images, as commands."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conformance.clients.target import PROMPT, Server, file_of, picture, red_square, run


def command(server: Server, folder: str, *arguments: str) -> bytes:
    """The picture that `llm -m openai/gpt-image-1.5` writes, in its own size and quality."""
    environment = os.environ | {
        "OPENAI_BASE_URL": f"{server.url}/v1",
        "OPENAI_API_KEY": server.key,
        "LLM_USER_PATH": folder,
    }
    call = [sys.executable, "-m", "llm", "-m", "openai/gpt-image-1.5", "--no-stream", PROMPT, *arguments]
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (Path(folder) / done.stdout.strip()).read_bytes()


def generate(server: Server) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert picture(command(server, folder)).size == server.image.size


def edit(server: Server) -> None:
    with tempfile.TemporaryDirectory() as folder:
        red = Path(folder) / "red.png"
        red.write_bytes(file_of(red_square()))
        made = picture(command(server, folder, "--attachment", str(red)))
        assert made.tobytes() != red_square().tobytes()


if __name__ == "__main__":
    run(
        [
            ("its own defaults: `gpt-image-1.5`, 1024x1024", generate),
            ("an attachment is edited", edit),
        ]
    )
