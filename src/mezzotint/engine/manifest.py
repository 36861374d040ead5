"""`mezzotint.json`: what a model's maker says of it that its weights do not. Any folder may carry one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mezzotint.errors import ModelLoadError, echo, nearest
from mezzotint.spec import MAX_STEPS

FILE = "mezzotint.json"
MAX_NAMED = 5
"""Most unknown words that one warning names."""
_LETTERS = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Letters of scripts that put no spaces between words: Thai, Lao, Japanese, Chinese."""

Text = Annotated[str, Field(min_length=1, max_length=200)]
Pixels = Annotated[int, Field(gt=0)]


class Manifest(BaseModel):
    """Every field may be absent; an unknown one is refused, since it is more likely a slip than a wish."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: Annotated[str, Field(max_length=300)] = ""
    """What it draws, in a sentence for people."""
    license: Annotated[str, Field(max_length=100)] = ""
    """Of the weights: a name such as `Apache-2.0`."""
    examples: list[Text] = Field([], max_length=12)
    """Prompts that the model draws well."""
    sizes: list[tuple[Pixels, Pixels]] = []
    """Every (width, height) that it can draw, its own first; empty: any that its family can."""
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    vocabulary: list[Text] = []
    """Every word that it was taught, function words too; empty: nothing is said of unknown words."""

    @cached_property
    def _known(self) -> dict[str, dict[str, None]]:
        """The vocabulary by first letter."""
        known: dict[str, dict[str, None]] = {}
        for word in map(_folded, self.vocabulary):
            known.setdefault(word[0], {})[word] = None
        return known

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the vocabulary lacks, in their order, each once."""
        if not self.vocabulary:
            return []
        found = (word for run in _LETTERS.findall(_folded(prompt)) for word in self._lacking(run))
        return list(dict.fromkeys(found))

    def nearest_word(self, word: str) -> str | None:
        """The known word of the same first letter that is spelt most like this one."""
        near = self._known.get(word[0], {})
        return nearest(word, (other for other in near if abs(len(other) - len(word)) <= 3))

    def warning(self, prompt: str) -> str | None:
        """One sentence on the unknown words of a prompt; None where every word is known."""
        unknown = self.unknown_words(prompt)
        if not unknown:
            return None
        named = []
        for word in unknown[:MAX_NAMED]:
            near = self.nearest_word(word)
            named.append(echo(word) + (f" (nearest known: {near!r})" if near else ""))
        more = len(unknown) - len(named)
        rest = f" and {more} more" if more else ""
        return f"prompt has words that this model was not taught: {', '.join(named)}{rest}"

    def _has(self, word: str) -> bool:
        return word in self._known.get(word[0], {})

    def _lacking(self, run: str) -> Iterator[str]:
        """What is unknown of letters that stand together: all of them, or parts where no spaces are used."""
        if self._has(run):
            return
        parts = re.split(r"['’-]", run)
        if len(parts) > 1:
            for part in parts:
                if len(part) > 1:  # the `s` of "fox's" and the `l` of "l'ours" are no words
                    yield from self._lacking(part)
        elif _UNSPACED.search(run):
            yield from self._unspaced(run)
        else:
            yield run

    def _unspaced(self, run: str) -> Iterator[str]:
        """Takes the longest known word at each place; letters between known words are one unknown one."""
        start = place = 0
        while place < len(run):
            ends = (end for end in range(len(run), place, -1) if self._has(run[place:end]))
            end = next(ends, place)
            if end > place:
                if start < place:
                    yield run[start:place]
                start = place = end
            else:
                place += 1
        if start < place:
            yield run[start:]


EMPTY = Manifest()
"""Of a model that says nothing of itself."""


def read(folder: Path) -> Manifest:
    """The manifest of a model folder, EMPTY where there is none; ModelLoadError says what is wrong in it."""
    path = folder / FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return EMPTY
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error}", code="corrupt_file") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ModelLoadError(
            f"{path}: {place}: {first['msg']} (got {echo(first['input'])}); correct or remove the file",
            code="corrupt_file",
        ) from error


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
