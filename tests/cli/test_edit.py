from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tests.cli.conftest import Run
from tests.conftest import Fake


def test_a_picture_and_words_become_a_file(run: Run, fake: Fake) -> None:
    Image.new("RGB", (32, 16), "red").save("red.png")
    data_dir = ("--data-dir", str(fake.settings.data_dir))
    done = run("edit", "red.png", "a green apple", "--seed", "7", "--strength", "0.5", "--json", *data_dir)
    assert done.returncode == 0, done.stderr
    (made,) = json.loads(done.stdout)["pictures"]
    assert made["path"] == "a-green-apple-7.png"
    with Image.open(made["path"]) as picture:
        assert picture.size == (32, 16)
    first = Path(made["path"]).read_bytes()
    Image.new("L", (32, 16), 255).save("mask.png")
    done = run("edit", "red.png", "a green apple", "--seed", "7", "--mask", "mask.png", *data_dir)
    assert done.stdout == "a-green-apple-7-2.png\n"
    assert Path("a-green-apple-7-2.png").read_bytes() != first


def test_a_control_picture_needs_a_controlnet(run: Run, fake: Fake) -> None:
    Image.new("RGB", (32, 16), "red").save("red.png")
    asked = ("generate", "a cat", "--control", "red.png", "--control-weight", "0.5")
    done = run(*asked, "--data-dir", str(fake.settings.data_dir))
    assert done.returncode == 2
    assert "has no ControlNet" in done.stderr


def test_a_picture_that_is_not_there_is_a_sentence(run: Run, fake: Fake) -> None:
    done = run("edit", "none.png", "a cat", "--data-dir", str(fake.settings.data_dir))
    assert done.returncode == 2
    assert "none.png" in done.stderr
    assert "cannot be read" in done.stderr
