"""What the SDK hands back: pictures, answers and events. What a server did not say is None."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import MISSING

from mezzotint.errors import InternalError, MezzotintError
from mezzotint.images import FORMATS, decode
from mezzotint.schemas import ImageItem, ImageTimings, Usage
from mezzotint.spec import loading_text

if TYPE_CHECKING:
    from PIL import Image


class GeneratedImage:
    """One picture. What the server did not say is None."""

    def __init__(self, item: ImageItem, fetch: Callable[[str], bytes] | None = None) -> None:
        self.seed = item.seed
        self.response_format = item.response_format
        self.url: str | None = or_none(item.url)
        self.b64_json: str | None = or_none(item.b64_json)
        self.width: int | None = or_none(item.width)
        self.height: int | None = or_none(item.height)
        self.mime_type: str | None = or_none(item.mime_type)
        self.timings: ImageTimings | None = or_none(item.timings)
        self._fetch = fetch

    @cached_property
    def data(self) -> bytes:
        """The file's bytes, for `raw` the bare pixels; Client fetches them from the URL when first asked."""
        if self.b64_json is not None:
            try:
                return base64.b64decode(self.b64_json, validate=True)
            except ValueError as error:
                raise bad_answer(f"a picture that is not base64 ({error})") from None
        if self._fetch is None or self.url is None:
            raise MezzotintError(
                "the picture is still behind its URL; call `await client.images.fetch(picture)` first",
                code="not_fetched",
            )
        return self._fetch(self.url)

    @cached_property
    def image(self) -> Image.Image:
        """The decoded picture (PIL)."""
        try:
            return decode(self.response_format, self.data, self.width, self.height)
        except (OSError, ValueError) as error:
            raise bad_answer(f"a picture that does not decode as {self.response_format} ({error})") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the picture: as it came if the suffix fits or is missing, else converted."""
        path = Path(path)
        if not path.suffix:
            path = path.with_suffix(
                FORMATS["png" if self.response_format == "raw" else self.response_format].suffix
            )
        suffix = ".jpg" if path.suffix.lower() == ".jpeg" else path.suffix.lower()
        if suffix == FORMATS[self.response_format].suffix:
            path.write_bytes(self.data)
        else:
            self.image.save(path)
        return path

    def __repr__(self) -> str:
        size = f", {self.width}x{self.height}" if self.width and self.height else ""
        return f"<GeneratedImage {self.response_format}, seed {self.seed}{size}>"


@dataclass(frozen=True)
class Generation:
    """The answer to one request: its pictures, of which `image`, `seed` and so on are the first one's."""

    data: Sequence[GeneratedImage]
    id: str | None = None
    created: int | None = None
    usage: Usage | None = None
    warnings: Sequence[str] = ()
    request_id: str | None = None

    @property
    def image(self) -> Image.Image:
        return self.data[0].image

    @property
    def seed(self) -> int:
        return self.data[0].seed

    @property
    def url(self) -> str | None:
        return self.data[0].url

    @property
    def b64_json(self) -> str | None:
        return self.data[0].b64_json

    @property
    def timings(self) -> ImageTimings | None:
        return self.data[0].timings

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Writes every picture; of several, each gets its number (`cat-0.png`, `cat-1.png`)."""
        path = Path(path)
        if len(self.data) == 1:
            return [self.data[0].save(path)]
        names = [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(len(self.data))]
        return [picture.save(name) for picture, name in zip(self.data, names, strict=True)]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a request stands; None is what the server did not say."""

    status: str
    position: int | None = None
    step: int | None = None
    num_steps: int | None = None
    seconds_left: float | None = None
    picture: int | None = None
    """Which picture is being made, from 1."""
    num_pictures: int | None = None
    picture_step: int | None = None
    num_picture_steps: int | None = None
    loading: str | None = None
    """What the endpoint does before it can begin, such as `loading the model`."""
    loading_fraction: float | None = None

    @property
    def text(self) -> str:
        """In words: `loading the model (40 %)`, `queued, 2 go first`, `picture 3 of 8, step 12 of 50`."""
        if self.loading:
            return loading_text(self.loading, self.loading_fraction)
        if self.status == "queued" and self.position is not None:
            verb = "goes" if self.position == 1 else "go"
            return f"queued, {self.position} {verb} first" if self.position else "queued, next in line"
        if self.status != "running" or self.num_steps is None:
            return self.status
        if self.num_picture_steps is None:  # a server of an earlier version
            return f"step {self.step} of {self.num_steps}"
        step = f"step {self.picture_step} of {self.num_picture_steps}"
        several = self.num_pictures is not None and self.num_pictures > 1
        return f"picture {self.picture} of {self.num_pictures}, {step}" if several else step


@dataclass(frozen=True)
class Preview:
    """The current estimate of finished picture `index`, after `step` steps; `data` is a PNG."""

    index: int
    step: int
    data: bytes

    @cached_property
    def image(self) -> Image.Image:
        return decode("png", self.data)


@dataclass(frozen=True, slots=True)
class Completed:
    """The last event of a request that succeeded."""

    result: Generation


Event = Progress | Preview | Completed


def or_none(value: Any) -> Any:
    return None if value is MISSING else value


def bad_answer(what: str) -> InternalError:
    """The error for a server that answers something else than the contract says."""
    return InternalError(f"the server answered with {what}; is base_url right?", code="invalid_answer")
