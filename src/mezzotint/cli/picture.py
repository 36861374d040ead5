"""Shows a picture in the terminal: the kitty or iTerm2 protocol where there is one, else half blocks."""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Iterator, Mapping

from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

MAX_COLUMNS = 48
"""Widest picture in half blocks."""
KITTY_CHUNK = 4096
"""Most base64 characters in one escape sequence of the kitty protocol."""


def show(image: Image.Image) -> None:
    """Draws `image` on stderr when that is a terminal; stdout keeps only results."""
    if not sys.stderr.isatty():
        return
    protocol = protocol_of(os.environ)
    if protocol is None:
        console = Console(stderr=True)
        console.print(half_blocks(image, min(MAX_COLUMNS, console.width)))
        return
    data = io.BytesIO()
    image.save(data, "PNG")
    sys.stderr.write(PROTOCOLS[protocol](data.getvalue()) + "\n")
    sys.stderr.flush()


def protocol_of(environment: Mapping[str, str]) -> str | None:
    """`kitty` or `iterm` when the terminal says so of itself; None elsewhere and inside tmux and screen."""
    program = environment.get("TERM_PROGRAM", "")
    terminal = environment.get("TERM", "")
    if terminal.startswith(("tmux", "screen")):
        return None
    if "KITTY_WINDOW_ID" in environment or terminal in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    return "iterm" if program in ("iTerm.app", "WezTerm", "mintty") else None


def kitty(png: bytes) -> str:
    """Source: kitty's terminal graphics protocol; f=100 is PNG, a=T shows at once, m=1 has more to come."""
    text = base64.b64encode(png).decode()
    chunks = [text[start : start + KITTY_CHUNK] for start in range(0, len(text), KITTY_CHUNK)]
    first = "a=T,f=100,"
    parts = []
    for number, chunk in enumerate(chunks, start=1):
        parts.append(f"\x1b_G{first}m={int(number < len(chunks))};{chunk}\x1b\\")
        first = ""
    return "".join(parts)


def iterm(png: bytes) -> str:
    """Source: the inline images protocol of iTerm2."""
    return f"\x1b]1337;File=inline=1;size={len(png)}:{base64.b64encode(png).decode()}\x07"


PROTOCOLS = {"kitty": kitty, "iterm": iterm}


def half_blocks(image: Image.Image, columns: int) -> Text:
    """Two pixels a character: the upper half block in one colour on a background of the other."""
    width = min(columns, image.width)
    height = max(2, round(image.height * width / image.width / 2) * 2)
    small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return Text("\n").join(_rows(small))


def _rows(image: Image.Image) -> Iterator[Text]:
    pixels = image.tobytes()

    def colour(x: int, y: int) -> Color:
        start = (y * image.width + x) * 3
        return Color.from_rgb(*pixels[start : start + 3])

    for y in range(0, image.height, 2):
        row = Text()
        for x in range(image.width):
            row.append("▀", Style(color=colour(x, y), bgcolor=colour(x, y + 1)))
        yield row
