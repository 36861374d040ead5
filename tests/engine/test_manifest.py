"""What a model's folder says of itself: read, refused where it is wrong, and held against prompts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mezzotint.engine.manifest import EMPTY, FILE, MAX_NAMED, Manifest, read
from mezzotint.errors import ModelLoadError

WORDS = "a and red cat cats fox snow Straße 猫 红色 的 犬 と"
KNOWN = Manifest(vocabulary=WORDS.split())


def written(folder: Path, value: Any) -> Path:
    (folder / FILE).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


def test_a_folder_without_one_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path) is EMPTY
    assert read(tmp_path / "weights.safetensors") is EMPTY
    assert EMPTY.warning("anything at all") is None


def test_what_it_says_is_read(tmp_path: Path) -> None:
    values = {
        "examples": ["a cat"],
        "sizes": [[128, 128], [256, 128]],
        "num_inference_steps": 8,
        "guidance_scale": 4,
        "vocabulary": ["a", "cat"],
    }
    said = read(written(tmp_path, values))
    assert (said.examples, said.sizes) == (["a cat"], [(128, 128), (256, 128)])
    assert (said.num_inference_steps, said.guidance_scale) == (8, 4.0)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ("{", "the file"),
        ([], "the file"),
        ({"exampels": []}, "exampels"),
        ({"sizes": [[128]]}, "sizes.0.1"),
        ({"sizes": [[128, 0]]}, "sizes.0.1"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"guidance_scale": "NaN"}, "guidance_scale"),
        ({"vocabulary": [""]}, "vocabulary.0"),
    ],
)
def test_a_wrong_one_is_refused_with_its_place(tmp_path: Path, value: Any, place: str) -> None:
    with pytest.raises(ModelLoadError, match=f"{FILE}: {place}: .*correct or remove the file") as caught:
        read(written(tmp_path, value))
    assert caught.value.code == "corrupt_file"


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red cat", []),
        ("A RED Cat, and 2 cats!", []),
        ("a red-cat and a fox's snow", []),
        ("a purple cat and a purple gryphon", ["purple", "gryphon"]),
        ("die STRASSE", ["die"]),
        ("红色的猫", []),
        ("红色的大象和猫", ["大象和"]),
        ("犬と猫", []),
        ("кот", ["кот"]),
        ("🦊 12 !?", []),
    ],
)
def test_unknown_words_are_found_in_any_script(prompt: str, unknown: list[str]) -> None:
    assert KNOWN.unknown_words(prompt) == unknown


def test_the_warning_names_the_nearest_known_word() -> None:
    assert KNOWN.warning("a red cta") == (
        "prompt has words that this model was not taught: 'cta' (nearest known: 'cat')"
    )
    assert KNOWN.warning("a zyzzyva") == "prompt has words that this model was not taught: 'zyzzyva'"


def test_a_long_prompt_of_strange_words_is_answered_shortly_and_soon() -> None:
    words = [f"w{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}x" for i in range(600)]
    large = Manifest(
        vocabulary=[f"w{i:x}".translate(str.maketrans("0123456789", "ghijklmnop")) for i in range(20_000)]
    )
    start = time.process_time()
    text = large.warning(" ".join(words))
    assert text is not None
    assert "and 595 more" in text
    assert text.count("nearest") == MAX_NAMED
    assert time.process_time() - start < 2, "a worker's other jobs wait meanwhile"
