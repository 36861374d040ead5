"""Turns the downloaded packages into one array of pictures: `python -m training.prepare --data FOLDER`."""

from __future__ import annotations

import argparse
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from training.data import SIZE, STYLES

LANGUAGES = ("de", "fr", "es", "zh", "ja")
RARE, COMMON = 4, 20
"""A tag of at most RARE emoji names each of them; one that is part of the name, of at most COMMON."""


def slug(name: str) -> str:
    """The file name that the SVG packages give an emoji of that Unicode name."""
    plain = name.lower().replace("’", "").replace("ñ", "n")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def draw_svg(svg: str) -> Image.Image:
    """An SVG as RGBA of the training size."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    return picture if picture.size == (SIZE, SIZE) else picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def code_points(emoji: str) -> list[str]:
    """The file stems under which the 3D package may keep an emoji."""
    joined = "-".join(f"{ord(character):04x}" for character in emoji)
    return [joined, joined.replace("-fe0f", ""), joined + "-fe0f"]


def open_3d(packages: Path, emoji: str) -> Image.Image | None:
    for stem in code_points(emoji):
        path = packages / "@lobehub/fluent-emoji-3d/assets" / f"{stem}.webp"
        if path.exists():
            return Image.open(path).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return None


def fluent_svg(packages: Path, kind: str, name: str) -> Image.Image | None:
    for stem in (slug(name), slug(name) + "-default"):
        path = packages / "fluentui-emoji/icons" / kind / f"{stem}.svg"
        if path.exists():
            return draw_svg(path.read_text(encoding="utf-8"))
    return None


def icon_svg(icons: dict[str, Any], name: str) -> Image.Image | None:
    key = slug(name)
    key = icons.get("aliases", {}).get(key, {}).get("parent", key)
    icon = icons["icons"].get(key)
    if icon is None:
        return None
    width, height = icon.get("width", icons.get("width", 128)), icon.get("height", icons.get("height", 128))
    box = f"0 0 {width} {height}"
    return draw_svg(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>')


def translate(packages: Path, emoji: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """By language and English name: the CLDR name, then the tags that tell the emoji from most others."""
    found: dict[str, dict[str, list[str]]] = {}
    for language in LANGUAGES:
        path = packages / "emojibase-data" / language / "data.json"
        entries = {entry["emoji"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}
        shared = Counter(tag for entry in entries.values() for tag in entry.get("tags", []))
        found[language] = {}
        for character, facts in emoji.items():
            entry = entries.get(character) or entries.get(character + "\ufe0f")
            if entry is not None:
                label, tags = entry["label"].lower(), entry.get("tags", [])
                inside = [tag for tag in tags if tag in label and shared[tag] <= COMMON]
                rare = [tag for tag in tags if shared[tag] <= RARE]
                found[language][facts["name"]] = list(dict.fromkeys([label, *inside, *rare[:3]]))
    return found


def prepare(data: Path) -> None:
    """Writes pictures.npy and index.json into the data folder."""
    packages = data / "node_modules"
    emoji = json.loads((packages / "unicode-emoji-json/data-by-emoji.json").read_text(encoding="utf-8"))
    words = json.loads((packages / "emojilib/dist/emoji-en-US.json").read_text(encoding="utf-8"))
    noto, twemoji = (
        json.loads((packages / f"@iconify-json/{name}/icons.json").read_text(encoding="utf-8"))
        for name in ("noto", "twemoji")
    )
    drawers: dict[str, Callable[[str, str], Image.Image | None]] = {
        "3d": lambda character, name: open_3d(packages, character),
        "flat": lambda character, name: fluent_svg(packages, "flat", name),
        "mono": lambda character, name: fluent_svg(packages, "high-contrast", name),
        "noto": lambda character, name: icon_svg(noto, name),
        "twemoji": lambda character, name: icon_svg(twemoji, name),
    }
    pictures: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    rows: dict[str, dict[str, int]] = {style: {} for style in STYLES}
    keywords = {}
    for character, facts in emoji.items():
        if facts["group"] == "Flags":
            continue
        name = facts["name"]
        keywords[name] = [word.replace("_", " ") for word in words.get(character, [])]
        for style, draw in drawers.items():
            picture = draw(character, name)
            if picture is not None:
                rows[style][name] = len(pictures)
                pictures.append(np.asarray(picture))
    np.save(data / "pictures.npy", np.stack(pictures))
    index = {"rows": rows, "keywords": keywords, "translations": translate(packages, emoji)}
    (data / "index.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    prepare(parser.parse_args().data)


if __name__ == "__main__":
    main()
