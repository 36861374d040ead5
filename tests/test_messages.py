"""Each message survives the pipe as it was, and no frame that `encode` did not make is taken for one."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.messages import (
    Done,
    FromWorker,
    Generate,
    MergeFinding,
    Message,
    ModelInfo,
    Ping,
    Proof,
    ToWorker,
    decode,
    encode,
)
from mezzotint.spec import (
    AdapterSpec,
    AdapterUse,
    ControlNetSettings,
    EngineSettings,
    ImageSpec,
    InputPicture,
)
from tests.attacks import attack

CLASSES: tuple[type[Message], ...] = (*get_args(ToWorker), *get_args(FromWorker))
JSON = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
SETTINGS = [
    EngineSettings(),
    EngineSettings(
        revision="main", dtype="fp32", device="cuda:1", num_threads=3, batching="off",
        performance="reference", max_rows=2, max_jobs=3, min_batch_gain=1.5, max_batch_stretch=3.5,
        max_wait_s=1.5, offload=True, allow_remote_code="studio/own@" + "0" * 40, adapter_bytes=5,
        text_cache_bytes=6,
        default_steps=3, default_guidance=2.5, width=64, height=32, scheduler="DDIMScheduler",
        scheduler_settings={"shift": 5.0}, arguments={"clip_skip": 1, "texts": ["é", None]},
        controlnets=(ControlNetSettings(route="edges", source="studio/edges"),),
    ),
]  # fmt: skip


def every_field(cls: Any, **known: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Instances of a dataclass with all their fields drawn, those with defaults too."""
    return st.builds(cls, **{field.name: ... for field in fields(cls)} | known)


def pictures(channels: int) -> st.SearchStrategy[InputPicture]:
    sides = st.integers(1, 3)
    return st.builds(
        lambda width, height, chance: InputPicture(
            width, height, chance.randbytes(width * height * channels), channels
        ),
        sides,
        sides,
        st.randoms(use_true_random=False),
    )


SPECS = every_field(
    ImageSpec,
    extra=st.dictionaries(st.text(), JSON),
    images=st.lists(pictures(3), max_size=3).map(tuple),
    mask=st.none() | pictures(1),
    control_images=st.lists(pictures(3), max_size=2).map(tuple),
)
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
st.register_type_strategy(Mapping, lambda kind: st.dictionaries(*map(st.from_type, get_args(kind))))
st.register_type_strategy(EngineSettings, st.sampled_from(SETTINGS))
st.register_type_strategy(ImageSpec, SPECS)
for part in (AdapterUse, AdapterSpec, MergeFinding, Proof, ModelInfo, *CLASSES):
    st.register_type_strategy(part, every_field(part))


def frame(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(header)) + header + payload


def test_the_second_settings_differ_from_the_defaults_in_every_field() -> None:
    default, other = (settings.model_dump() for settings in SETTINGS)
    assert [name for name, value in default.items() if other[name] == value] == []


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_a_message_comes_back_as_it_was_sent(cls: type[Message], data: st.DataObject) -> None:
    message = data.draw(st.from_type(cls))
    back = decode(encode(message))
    assert type(back) is cls
    assert back == message


def test_pixels_travel_behind_the_header_as_they_are() -> None:
    done = Done(job_id="1", width=1, height=1, generate_s=0.5, payload=b'\x00\xff"')
    sent = encode(done)
    assert sent.endswith(b'}\x00\xff"')
    assert decode(sent) == done


PICTURE = InputPicture(1, 2, b'\x00\xff"456')
EDIT = encode(
    Generate(
        "1",
        ImageSpec(prompt="", num_inference_steps=1, images=(PICTURE,), mask=InputPicture(2, 1, b"78", 1)),
    )
)


def test_the_pictures_of_a_request_travel_behind_the_header_as_they_are() -> None:
    assert EDIT.endswith(b'}\x00\xff"45678')
    back = decode(EDIT)
    assert isinstance(back, Generate)
    assert [picture.pixels for picture in back.spec.pictures] == [PICTURE.pixels, b"78"]


PING = {"is": "Ping", "number": 1}
DONE = {"is": "Done", "job_id": "1", "width": 1, "height": 1, "generate_s": 0.5}
SPECIFIC = {
    "is": "AddAdapter",
    "adapter": {"route": "a", "path": "b", "scale": 1.0, "checksum": "", "odd": 1},
}


@attack("Bytes on the workers' pipe that are no message", outcome="refused with one kind of error")
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x00\x00", id="half a length"),
        pytest.param(frame(b""), id="no header"),
        pytest.param(encode(Ping(1))[:-1], id="header cut short"),
        pytest.param(frame(b"\xff\xfe"), id="header not UTF-8"),
        pytest.param(frame(b"ping"), id="header not JSON"),
        pytest.param(frame(b"[1]"), id="header no object"),
        pytest.param(frame(b"null"), id="header null"),
        pytest.param(frame(b'{"number":1}'), id="no class"),
        pytest.param(frame(json.dumps(PING | {"is": "Pong2"}).encode()), id="unknown class"),
        pytest.param(frame(json.dumps(PING | {"is": ["Ping"]}).encode()), id="class no text"),
        pytest.param(frame(json.dumps({"is": "Ping"}).encode()), id="field missing"),
        pytest.param(frame(json.dumps(PING | {"numbr": 2}).encode()), id="unknown field"),
        pytest.param(frame(json.dumps(SPECIFIC).encode()), id="unknown field of a field"),
        pytest.param(frame(json.dumps(PING | {"number": "1"}).encode()), id="number as text"),
        pytest.param(frame(json.dumps(PING | {"number": "one"}).encode()), id="wrong type"),
        pytest.param(frame(json.dumps(DONE | {"width": None}).encode(), b"abc"), id="null for a number"),
        pytest.param(EDIT[:-1], id="a picture cut short"),
        pytest.param(EDIT + b"x", id="more pixels than pictures"),
        pytest.param(EDIT.replace(b'"height":2', b'"height":-2'), id="a picture of negative size"),
        pytest.param(encode(Ping(1)) + b"x", id="payload of a message without one"),
    ],
)
def test_what_is_no_message_is_refused_with_one_kind_of_error(bad: bytes) -> None:
    with pytest.raises(ValueError, match="not a message of this version"):
        decode(bad)
