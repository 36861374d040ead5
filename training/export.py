"""Puts a trained folder and a refined autoencoder together, as a folder to ship.

The folder's `mezzotint.json` keeps what it says and gets the vocabulary of the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from diffusers import AutoencoderKL
from transformers import PreTrainedTokenizerFast

from mezzotint.engine.manifest import FILE
from training.device import set_up
from training.model import SHIFT, load_folder, save_folder
from training.text import UNSPACED_FROM


def taught_words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The whole words of a tokenizer's vocabulary: those that begin with `▁`, and those without spaces."""
    words = set()
    for token in tokenizer.get_vocab():
        word = token.removeprefix("▁")
        if word[:1].isalpha() and (token != word or ord(word[0]) >= UNSPACED_FROM):
            words.add(word)
    return sorted(words)


def write_vocabulary(folder: Path, words: list[str]) -> None:
    """Replaces the vocabulary in the folder's manifest and keeps every other field."""
    path = folder / FILE
    said = path.read_text(encoding="utf-8") if path.exists() else "{}"
    fields = {name: value for name, value in json.loads(said).items() if name != "vocabulary"}
    lines = [f'  "{name}": {json.dumps(value, ensure_ascii=False)},' for name, value in fields.items()]
    listed = ", ".join(json.dumps(word, ensure_ascii=False) for word in words)
    wrapped = textwrap.wrap(listed, 116, break_long_words=False, break_on_hyphens=False)
    body = "\n".join(f"    {line}" for line in wrapped)
    path.write_text("\n".join(["{", *lines, '  "vocabulary": [', body, "  ]", "}", ""]), encoding="utf-8")


def make_compact(folder: Path) -> None:
    """Rewrites the tokenizers' files without the white space, a third of their size."""
    for path in folder.glob("tokenizer*/tokenizer.json"):
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="where denoiser and text encoders are")
    parser.add_argument("--vae", type=Path, required=True, help="an autoencoder with the same latents")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shift", type=float, default=SHIFT, help="the scheduler's fixed shift")
    a = parser.parse_args()
    model = load_folder(a.model, set_up(1))
    save_folder(model, AutoencoderKL.from_pretrained(a.vae), a.out, a.shift)
    write_vocabulary(a.out, taught_words(model.text.tokenizer))
    make_compact(a.out)


if __name__ == "__main__":
    main()
