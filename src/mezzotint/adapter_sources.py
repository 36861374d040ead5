"""Which of a folder's files holds an adapter: the server looks into its folders, commands into the user's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mezzotint import hub
from mezzotint.errors import InvalidRequestError

PREFERRED = (hub.DIFFUSERS_WEIGHTS, hub.PEFT_WEIGHTS)
"""Names of the file to take where there are several."""


def choose_weights(names: Iterable[str], where: str) -> str:
    """The name of the weights among a folder's files; InvalidRequestError where that is not clear."""
    names = list(names)
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    for name in PREFERRED:
        if name in found:
            return name
    if len(found) == 1:
        return found[0]
    if found:
        raise _refusal(
            f"{where} holds {len(found)} safetensors files ({', '.join(found[:5])}); name one of them",
            "adapter_source_not_found",
        )
    pickled = next((name for name in names if Path(name).suffix in hub.PICKLES), None)
    if pickled:
        raise _refusal(f"{where} holds only {pickled}, {hub.PICKLE_RISK}; convert it", "adapter_unsupported")
    raise _refusal(f"{where} holds no safetensors file", "adapter_source_not_found")


def _refusal(message: str, code: str) -> InvalidRequestError:
    return InvalidRequestError(message, code=code, param="source")
