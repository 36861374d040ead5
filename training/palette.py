"""The background colours a prompt may name."""

from __future__ import annotations

WHITE = (255, 255, 255)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 60, 60),
    "orange": (245, 150, 60),
    "yellow": (250, 215, 80),
    "green": (90, 180, 90),
    "teal": (50, 160, 160),
    "blue": (70, 120, 220),
    "light blue": (165, 210, 245),
    "purple": (140, 90, 200),
    "pink": (245, 160, 190),
    "brown": (140, 95, 65),
    "grey": (150, 150, 155),
    "black": (25, 25, 28),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {"white": WHITE, **COLOURS}
