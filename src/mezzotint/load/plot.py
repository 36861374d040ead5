"""A run as a picture: every request by its moment and its latency, and how much longer it took than alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mezzotint.load.results import WITHIN

WIDTH, HEIGHT, LEFT, TOP, PANEL_W, PANEL_H, GAP = 960, 400, 70, 60, 400, 270, 80
COLOURS = ("#2b6cb0", "#b7791f", "#2f855a", "#805ad5", "#c05621", "#4a5568")
REFUSED = "#c53030"
Point = tuple[float, float, str]
"""Seconds from the start, latency in seconds, and the name of its group."""


def svg(title: str, done: Sequence[Point], refused: Sequence[float], slowdowns: Sequence[float]) -> str:
    """The file. `refused` has the moments of requests without a picture, `slowdowns` latency over lone."""
    moments = [at for at, *_ in done] + list(refused)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 24, title, "start", 15),
        *_latencies(done, refused, max(moments, default=1.0) or 1.0),
        *_slowdowns(sorted(slowdowns)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _latencies(done: Sequence[Point], refused: Sequence[float], end_s: float) -> list[str]:
    values = [latency for _, latency, _ in done if latency > 0] or [1.0]
    low, high = _decades(min(values), max(values))
    parts = _frame(LEFT, "seconds until the picture", "moment of arrival, seconds", low, high)
    parts += [
        _text(LEFT + PANEL_W * share, TOP + PANEL_H + 18, f"{end_s * share:.3g}", "middle")
        for share in (0, 0.5, 1)
    ]
    groups = sorted({group for *_, group in done}, key=lambda group: (len(group), group))
    for place, group in enumerate(groups):
        colour = COLOURS[place % len(COLOURS)]
        parts += [
            f'<circle cx="{LEFT + PANEL_W * at / end_s:.1f}" cy="{_height(latency, low, high):.1f}" r="2.5" '
            f'fill="{colour}" fill-opacity="0.6"/>'
            for at, latency, name in done
            if name == group
        ]
    parts += [
        f'<path d="M{LEFT + PANEL_W * at / end_s:.1f} {TOP + PANEL_H}v-10" stroke="{REFUSED}"/>'
        for at in refused
    ]
    legend = [(group, COLOURS[place % len(COLOURS)]) for place, group in enumerate(groups)]
    legend += [(f"no picture ({len(refused)})", REFUSED)] if refused else []
    x = float(LEFT)
    for name, colour in legend:
        parts.append(f'<rect x="{x:.0f}" y="38" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(x + 14, 47, name, "start"))
        x += 34 + 7 * len(name)
    return parts


def _slowdowns(values: Sequence[float]) -> list[str]:
    left = LEFT + PANEL_W + GAP
    low, high = _decades(min(values, default=1.0), max(*values, WITHIN) if values else 10.0)
    parts = _frame(left, "times its lone time", "share of the pictures, %", low, high)
    parts += [
        _text(left + PANEL_W * share / 100, TOP + PANEL_H + 18, str(share), "middle")
        for share in (0, 25, 50, 75, 95)
    ]
    y = _height(WITHIN, low, high)
    parts.append(f'<path d="M{left} {y:.1f}h{PANEL_W}" stroke="#888" stroke-dasharray="4 3"/>')
    parts.append(_text(left + 6, y - 4, f"{WITHIN:g} times", "start"))
    if values:
        points = " ".join(
            f"{left + PANEL_W * (place + 1) / len(values):.1f},{_height(value, low, high):.1f}"
            for place, value in enumerate(values)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>')
    return parts


def _frame(left: int, y_title: str, x_title: str, low: int, high: int) -> list[str]:
    """The panel's box, and a line for each power of ten from `low` to `high`."""
    parts = [
        f'<rect x="{left}" y="{TOP}" width="{PANEL_W}" height="{PANEL_H}" fill="none" stroke="#aaa"/>',
        _text(left + PANEL_W / 2, TOP + PANEL_H + 38, x_title, "middle"),
        f'<g transform="translate({left - 48} {TOP + PANEL_H / 2}) rotate(-90)">',
        _text(0, 0, y_title, "middle") + "</g>",
    ]
    for exponent in range(low, high + 1):
        y = _height(10.0**exponent, low, high)
        parts.append(f'<path d="M{left} {y:.1f}h{PANEL_W}" stroke="#ddd"/>')
        parts.append(_text(left - 6, y + 4, f"{10.0**exponent:g}", "end"))
    return parts


def _decades(least: float, most: float) -> tuple[int, int]:
    low = math.floor(math.log10(max(least, 1e-6)))
    return low, max(low + 1, math.ceil(math.log10(max(most, 1e-6))))


def _height(value: float, low: int, high: int) -> float:
    share = (math.log10(max(value, 1e-6)) - low) / (high - low)
    return TOP + PANEL_H * (1 - min(max(share, 0.0), 1.0))


def _text(x: float, y: float, words: str, anchor: str, size: int = 12) -> str:
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{words}</text>'
