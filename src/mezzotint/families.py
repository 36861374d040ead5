"""Facts on model families, as data: what server and engine must know about a pipeline class before it is loaded.

A new family is one entry here and one parity test (tests/engine). A pipeline class without an entry still runs,
with the values of DEFAULT, and is never merged.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of one pipeline class."""

    default_steps: int = 28
    default_guidance: float | None = None
    """None: the pipeline's own default."""
    guidance_argument: str | None = "guidance_scale"
    """Name of the pipeline argument that `guidance_scale` feeds; None: the model ignores guidance."""
    negative_prompt: bool = True
