from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import mezzotint
from mezzotint.cli import picture
from mezzotint.cli.generate import default_path, parse_size
from mezzotint.cli.serve import endpoint_flags
from mezzotint.errors import ConfigError, InvalidRequestError
from tests.cli.conftest import Ended, Run

BLOCKED = ("torch", "diffusers", "transformers", "fastapi", "starlette", "uvicorn", "sqlalchemy", "structlog")


def run_python(*arguments: str) -> Ended:
    command = [sys.executable, "-W", "error", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_help_names_every_command_and_the_exit_codes() -> None:
    done = run_python("-m", "mezzotint", "--help")
    assert done.returncode == 0
    for word in ("serve", "generate", "pull", "doctor", "keys", "Exit status"):
        assert word in done.stdout


COMMANDS = """serve generate edit pull doctor bench plan top ps
    keys-create keys-list keys-revoke
    endpoints-list endpoints-show endpoints-create endpoints-update endpoints-history endpoints-sleep
    endpoints-calibrate endpoints-wake endpoints-restart endpoints-terminate endpoints-delete
    adapters-add adapters-list adapters-show adapters-remove"""


def test_the_version_is_told(run: Run) -> None:
    assert run("--version").stdout == f"mezzotint {mezzotint.__version__}\n"


@pytest.mark.parametrize("command", [words.replace("-", " ") for words in COMMANDS.split()])
def test_each_help_has_an_example(run: Run, command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert f"mezzotint {command}" in done.stdout.split("Example:")[1]


def test_the_command_line_loads_neither_torch_nor_the_server() -> None:
    code = (
        f"import sys, mezzotint, mezzotint.cli; print([name for name in {BLOCKED!r} if name in sys.modules])"
    )
    assert run_python("-c", code).stdout.strip() == "[]"


def test_doctor_and_pull_reach_the_engine(tmp_path: Path) -> None:
    facts = json.loads(run_python("-m", "mezzotint", "doctor", "--json").stdout)
    assert facts["versions"]["mezzotint"] == mezzotint.__version__
    missing = run_python("-m", "mezzotint", "pull", str(tmp_path / "nothing"))
    assert missing.returncode == 1
    assert "was not found" in missing.stderr


@pytest.mark.parametrize(
    "arguments", [["serve"], ["keys", "list"], ["generate", "a cat"], ["doctor"], ["pull", "x"]]
)
def test_a_bare_install_says_what_to_install(arguments: list[str]) -> None:
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name}}", name=name)
sys.meta_path.insert(0, Blocked())
from mezzotint.cli import main
sys.argv = ["mezzotint", *{arguments!r}]
main()
"""
    done = run_python("-c", code)
    assert done.returncode == 2
    assert "pip install 'mezzotint[server]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_print_config_prints_a_file_with_the_flags_in_force(run: Run) -> None:
    done = run("serve", "--port", "9000", "--model", "runs/My Model.safetensors", "--print-config")
    settings = tomllib.loads(done.stdout)
    assert settings["server"]["port"] == 9000
    assert settings["endpoints"] == [
        settings["endpoints"][0] | {"id": "my-model", "model": "runs/My Model.safetensors"}
    ]


def test_a_bad_setting_stops_the_start_with_one_sentence_and_status_2(run: Run) -> None:
    Path("mezzotint.toml").write_text("[server]\nport = 99999\n")
    done = run("serve")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mezzotint: mezzotint.toml: port: ")
    assert done.stderr.count("\n") == 1


def test_with_json_an_error_is_json_on_stderr(run: Run) -> None:
    Path("mezzotint.toml").write_text("[server]\nport = 99999\n")
    done = run("keys", "list", "--json")
    assert done.returncode == 2
    assert json.loads(done.stderr)["error"]["code"] == "invalid_setting"


def test_wrong_usage_has_status_2(run: Run) -> None:
    assert run("generate").returncode == 2
    assert run("serve", "--id", "flux").returncode == 2
    assert run("generate", "a cat", "--size", "big").returncode == 2


def test_a_taken_port_is_a_sentence(run: Run) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", "--port", port, "--data-dir", "data")
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_is_shown_once_listed_by_name_and_revoked(run: Run) -> None:
    Path("mezzotint-data").mkdir()
    secret = run("keys", "create", "laptop", "--endpoint", "emoji").stdout.strip()
    assert secret.startswith("mz_")
    listed = run("keys", "list")
    assert "laptop" in listed.stdout
    assert secret not in listed.stdout
    assert secret.encode() not in b"".join(path.read_bytes() for path in Path("mezzotint-data").iterdir())

    made = json.loads(run("keys", "create", "admin", "--admin", "--priority", "-3", "--json").stdout)
    assert (made["name"], made["admin"], made["limits"]["priority"]) == ("admin", True, -3)
    refused = run("keys", "create", "vip", "--priority", "11")
    assert (refused.returncode, "--priority" in refused.stderr) == (2, True)
    assert made["key"].startswith("mz_")

    again = run("keys", "create", "laptop")
    assert again.returncode == 1
    assert "laptop" in again.stderr

    assert run("keys", "revoke", "laptop").returncode == 0
    states = {key["name"]: key["revoked"] for key in json.loads(run("keys", "list", "--json").stdout)}
    assert states["laptop"] is not None
    assert states["admin"] is None
    assert run("keys", "revoke", "nobody").returncode == 1


def test_generate_says_when_a_named_server_cannot_be_reached(run: Run) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    done = run("generate", "a cat", "--server", f"http://127.0.0.1:{port}", "--endpoint", "emoji")
    assert done.returncode == 3
    assert f"127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize(
    ("source", "id"),
    [
        ("emoji", "emoji"),
        ("black-forest-labs/FLUX.1-schnell", "flux.1-schnell"),
        ("owner/name@v2", "name"),
        ("some/folder/", "folder"),
        ("./Some Model.safetensors", "some-model"),
        ("..", "model"),
    ],
)
def test_the_endpoint_of_a_model_is_called_after_its_source(source: str, id: str) -> None:
    assert endpoint_flags(source, None) == [{"id": id, "model": source}]
    assert endpoint_flags(source, "x") == [{"id": "x", "model": source}]


def test_an_id_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="--model"):
        endpoint_flags(None, "x")
    assert endpoint_flags(None, None) is None


def test_a_picture_is_called_after_its_prompt_and_seed() -> None:
    assert default_path("A red apple, on teal!", 7, "png") == Path("a-red-apple-on-teal-7.png")
    assert default_path("日本", 7, "jpeg") == Path("picture-7.jpg")
    assert len(default_path("x" * 900, 7, "raw").name) < 60


def test_a_size_is_two_numbers() -> None:
    assert parse_size(None) == (None, None)
    assert parse_size("512x768") == (512, 768)
    for wrong in ("512", "512x", "axb", "512x768x3", "-1x5"):
        with pytest.raises(InvalidRequestError):
            parse_size(wrong)


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"KITTY_WINDOW_ID": "1", "TERM": "xterm-256color"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM_PROGRAM": "iTerm.app", "TERM": "screen-256color"}, None),
        ({"TERM": "xterm-256color"}, None),
    ],
)
def test_the_picture_protocol_is_what_the_terminal_says(
    environment: dict[str, str], protocol: str | None
) -> None:
    assert picture.protocol_of(environment) == protocol


def test_half_blocks_show_two_pixels_a_character() -> None:
    image = Image.new("RGB", (2, 2))
    image.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)])
    text = picture.half_blocks(image, 48)
    assert text.plain == "▀▀"
    first, second = (span.style for span in text.spans)
    assert str(first) == "#ff0000 on #0000ff"
    assert str(second) == "#00ff00 on #090909"
    tall = picture.half_blocks(Image.new("RGB", (128, 256)), 48)
    assert [len(line) for line in tall.plain.split("\n")] == [48] * 48


def test_a_long_picture_goes_to_kitty_in_chunks() -> None:
    import base64

    data = os.urandom(10_000)
    parts = picture.kitty(data).split("\x1b_G")[1:]
    heads = [part.partition(";")[0] for part in parts]
    assert heads == ["a=T,f=100,m=1", "m=1", "m=1", "m=0"]
    assert all(part.endswith("\x1b\\") for part in parts)
    assert base64.b64decode("".join(part.partition(";")[2][:-2] for part in parts)) == data
