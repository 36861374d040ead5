"""Rules that nobody wrote: a family of tomorrow merges, and modules that must not merge are found out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from torch import Tensor

from mezzotint.engine.steps.batching import Call, NotMergeable, Rule
from mezzotint.engine.steps.inference import Finding, find_rules, infer, text_of
from mezzotint.engine.steps.laboratory import Laboratory, Seen
from mezzotint.engine.steps.padding import BUCKET, Text
from mezzotint.engine.steps.pipeline_run import Tap
from mezzotint.engine.steps.shared_state import AttentionState

Compute = Callable[["Odd", Tensor, Tensor], Tensor]


class Odd(ModelMixin):  # type: ignore[misc]
    """A denoiser with a signature of its own: rows in dimension 1, a dict with numbers, a list of words."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.calls = 0
        self.expert = torch.nn.Identity()

    def forward(
        self, moment: Tensor, *, told: Mapping[Any, Any], words: list[Tensor], grid: Tensor, mood: str
    ) -> tuple[Tensor]:
        self.calls += 1
        text = torch.stack([word.sum() for word in words])
        z = told["z"] + told[7][0].transpose(0, 1) + grid.sum() + moment.reshape(-1, 1)
        return (self.compute(self, z, text),)


class Tomorrow:
    """A pipeline that has one forward a step, with a guidance row for each picture."""

    def __init__(self, compute: Compute) -> None:
        self.denoiser = Odd(compute)

    @property
    def components(self) -> Mapping[str, Any]:
        return {"denoiser": self.denoiser}

    def __call__(self, prompt: str | list[str], guidance_scale: float, generator: torch.Generator) -> Tensor:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        z = torch.randn(len(prompts), 3, generator=generator).repeat(2, 1)
        words = [torch.tensor([float(ord(letter)) for letter in each]) for each in prompts]
        negative = [torch.zeros(1) for _ in prompts]
        for moment in (1.0, 0.5):
            (out,) = self.denoiser(
                torch.tensor(moment),
                told={"z": z, 7: [torch.full((3, len(z)), guidance_scale)]},
                words=[*negative, *words],
                grid=torch.arange(4.0),
                mood="calm",
            )
            low, high = out.chunk(2)
            z = (low + guidance_scale * (high - low)).repeat(2, 1)
        return z


TRIAL: list[dict[str, Any]] = [
    {"prompt": "red fox", "guidance_scale": 3.0},
    {"prompt": "fox red", "guidance_scale": 3.0},
    {"prompt": "two boats at dawn", "guidance_scale": 4.0},
]


def found(compute: Compute) -> tuple[Finding, Tap]:
    pipe = Tomorrow(compute)
    tap = Tap("denoiser", pipe.denoiser)
    with torch.inference_mode():
        findings = find_rules(Laboratory(pipe, [tap], AttentionState(pipe.components)), TRIAL)
    tap.close()
    return findings["denoiser"], tap


def own(module: Odd, z: Tensor, text: Tensor) -> Tensor:
    return z * 2 + text[:, None] / 1000


def routed(module: Odd, z: Tensor, text: Tensor) -> Tensor:
    """Gives its expert as many of the values as are above a bound; each row's result is its own."""
    values = own(module, z, text)
    chosen = values > values.amin(1, keepdim=True) + 0.7
    return values.masked_scatter(chosen, module.expert(values[chosen]))


def test_a_family_of_tomorrow_gets_its_rule() -> None:
    finding, tap = found(own)
    assert finding.reason == ""
    assert finding.rule is not None
    assert finding.rule.arguments == {
        "moment": "scalar",
        "told.z": "row",
        "told.7.0": "row",
        "words": "list",
        "grid": "shared",
    }
    assert finding.rule.dimensions == {"told.z": 0, "told.7.0": 1}
    assert tap.rule is finding.rule


def test_a_scalar_that_cannot_become_rows_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Odd.forward

    def forward(self: Odd, moment: Tensor, **rest: Any) -> tuple[Tensor]:
        return plain(self, moment.reshape(()), **rest)

    monkeypatch.setattr(Odd, "forward", forward)
    finding, _ = found(own)
    assert finding.reason == "only while calls share moment"
    assert finding.rule is not None
    assert finding.rule.arguments["moment"] == "shared"


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda module, z, text: own(module, z, text) - z.mean(), "merged calls give other results"),
        (lambda module, z, text: own(module, z, text) + text[0], "depends on its place"),
        (
            lambda module, z, text: own(module, z, text) + torch.arange(len(z))[:, None] % 2,
            "depends on its place",
        ),
        (lambda module, z, text: own(module, z, text) + module.calls, "keeps a state"),
        (lambda module, z, text: own(module, z, text) + torch.rand(1), "keeps a state, or draws"),
        (routed, "experts are chosen by score"),
    ],
    ids=["mixes rows", "reads row 0", "looks at places", "counts", "draws", "chooses experts"],
)
def test_a_module_that_must_not_merge_is_found_out(compute: Compute, reason: str) -> None:
    finding, tap = found(compute)
    assert finding.rule is None
    assert reason in finding.reason
    assert tap.rule is None


def test_an_argument_that_no_rule_can_cover_is_named() -> None:
    with pytest.raises(NotMergeable, match=r"mask is \(1, 4\) for one prompt and \(2, 6\) for two"):
        infer([Seen({"mask": torch.ones(1, 4)}, 1)], [Seen({"mask": torch.ones(2, 6)}, 2)])
    with pytest.raises(NotMergeable, match="count is 1 for one prompt and 2 for two"):
        infer([Seen({"count": 1}, 1)], [Seen({"count": 2}, 2)])
    with pytest.raises(NotMergeable, match="no argument grows"):
        infer([Seen({"x": torch.ones(2)}, 2)], [Seen({"x": torch.ones(2)}, 2)])


def test_a_pipeline_that_takes_no_second_prompt_is_served_unmerged() -> None:
    finding, _ = found(lambda module, z, text: own(module, z, text) if len(z) == 2 else z.view(0))
    assert finding.rule is None
    assert "its trial failed" in finding.reason


def test_rows_in_another_dimension_merge_and_split() -> None:
    rule = Rule({"x": "row", "y": "row"}, dimensions={"y": 1})
    call = Call("m", lambda x, y: x, (), {"x": torch.ones(2, 5), "y": torch.ones(3, 2)}, rule)
    assert (call.rows, call.obstacle) == (2, "")


# ---------------------------------------------------------------- objects


class Cache:
    """As pipelines hand over for keys and values: one list for each of two layers."""

    def __init__(self) -> None:
        self.mode: str | None = None
        self.layers: list[list[Tensor]] = [[], []]


def cached(write: Callable[[Cache, Tensor], None], *, cleared: bool = False) -> Finding:
    """The finding of a module that is given a cache of each run's own, into which it may write.

    `cleared`: the pipeline empties it after every call.
    """

    class Keeping(Odd):
        def forward(self, moment: Tensor, *, told: Mapping[Any, Any], **rest: Any) -> tuple[Tensor]:
            (out,) = super().forward(moment, told=told, **rest)
            write(told["cache"], out)
            return (out,)

    class WithCache(Tomorrow):
        def __init__(self) -> None:
            self.denoiser = Keeping(own)

        def __call__(self, *args: Any, **arguments: Any) -> Tensor:
            cache, inner = Cache(), Tomorrow(own)

            def asked(moment: Tensor, *, told: Mapping[Any, Any], **rest: Any) -> tuple[Tensor]:
                out = self.denoiser(moment, told={**told, "cache": cache}, **rest)
                if cleared:
                    vars(cache).update(vars(Cache()))
                result: tuple[Tensor] = out
                return result

            inner.denoiser = asked  # type: ignore[assignment]
            return inner(*args, **arguments)

    pipe = WithCache()
    tap = Tap("denoiser", pipe.denoiser)
    with torch.inference_mode():
        findings = find_rules(Laboratory(pipe, [tap], AttentionState(pipe.components)), TRIAL)
    tap.close()
    return findings["denoiser"]


def test_an_object_without_tensors_is_a_constant_that_must_hold_what_it_held_in_the_proof() -> None:
    finding = cached(lambda cache, out: None)
    assert finding.rule is not None
    assert finding.reason == ""
    (held,) = finding.rule.objects.values()
    assert held == "Cache(layers=list(0=list(), 1=list()), mode=None)"

    def forward(**_: Any) -> None: ...

    def asked(cache: Cache) -> Call:
        told = {"z": torch.ones(2, 3), 7: [torch.ones(3, 2)], "cache": cache}
        words = [torch.ones(1), torch.ones(1)]
        rest = {"told": told, "words": words, "grid": torch.arange(4.0), "mood": "calm"}
        return Call("denoiser", forward, (), {"moment": torch.tensor(1.0), **rest}, finding.rule)

    used, reading = Cache(), Cache()
    used.layers[0].append(torch.ones(1))
    reading.mode = "read"
    assert asked(Cache()).key == asked(Cache()).key is not None
    assert "told.cache" in asked(used).obstacle
    assert "told.cache" in asked(reading).obstacle


def reads(cache: Cache, out: Tensor) -> None:
    cache.mode = "read"


@pytest.mark.parametrize(
    ("write", "cleared", "reason"),
    [
        (lambda cache, out: cache.layers[0].append(out), False, "told.cache is a Cache"),
        (lambda cache, out: cache.layers[0].append(len(out)), False, "told.cache is a Cache"),
        (reads, False, "told.cache, which holds something else"),
        (reads, True, "it writes into told.cache"),
    ],
    ids=["tensors", "numbers of rows", "a mode", "a mode that the pipeline takes back"],
)
def test_a_module_that_writes_into_an_object_never_merges(
    write: Callable[[Cache, Tensor], None], cleared: bool, reason: str
) -> None:
    finding = cached(write, cleared=cleared)
    assert finding.rule is None
    assert reason in finding.reason


# ---------------------------------------------------------------- texts, equal rows, one picture at a time


class Worded(ModelMixin):  # type: ignore[misc]
    """A denoiser that reads one number for each letter, as far as its mask says, and one for its place."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, z: Tensor, *, text: Tensor, text_mask: Tensor | None, places: Tensor) -> Tensor:
        mask = torch.ones(text.shape) if text_mask is None else text_mask.to(text.dtype)
        return self.compute(z, text, mask, places)


class Reader:
    """A pipeline that passes no mask for one prompt; `most` is how many it can draw at once."""

    def __init__(self, compute: Callable[..., Tensor], most: int = 8) -> None:
        self.denoiser = Worded(compute)
        self.most = most

    @property
    def components(self) -> Mapping[str, Any]:
        return {"denoiser": self.denoiser}

    def __call__(self, prompt: str | list[str], guidance_scale: float, generator: torch.Generator) -> Tensor:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if len(prompts) > self.most:
            raise ValueError("too many")
        z = torch.randn(2 * len(prompts), 3, generator=generator)
        text = torch.tensor([[ord(letter) / 100 for letter in each] for each in prompts * 2])
        for _ in range(2):
            z = self.denoiser(z, text=text, text_mask=None, places=torch.ones(len(z), 2, dtype=torch.long))
        return z


def read(compute: Callable[..., Tensor], most: int = 8) -> tuple[Finding, Reader, Tap]:
    pipe = Reader(compute, most)
    tap = Tap("denoiser", pipe.denoiser)
    with torch.inference_mode():
        laboratory = Laboratory(pipe, [tap], AttentionState(pipe.components))
        finding = find_rules(laboratory, TRIAL)["denoiser"]
    tap.close()
    return finding, pipe, tap


def masked(z: Tensor, text: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    pooled = (text * mask).sum(1) / mask.sum(1)
    return z + pooled[:, None] + places.sum(1, keepdim=True)


def test_texts_of_different_length_merge_where_a_mask_makes_it_exact() -> None:
    finding, pipe, _ = read(masked)
    assert finding.words == "merges"
    assert finding.rule is not None
    assert finding.rule.text == Text({"text": 1}, "text_mask")
    arguments = {"text": torch.ones(1, 5), "text_mask": None, "places": torch.ones(1, 2, dtype=torch.long)}
    call = Call("d", pipe.denoiser.forward, (torch.zeros(1, 3),), arguments, finding.rule, ("z",))
    longer = Call(
        "d", call.run, call.args, {**arguments, "text": torch.ones(1, 9)}, finding.rule, call.parameters
    )
    assert call.key is not None
    assert call.key == longer.key
    assert call.arguments["text"].shape == call.arguments["text_mask"].shape == (1, BUCKET)
    assert call.arguments["text_mask"].sum() == 5
    assert torch.equal(call.alone(), call.run(**call.arguments))


def test_texts_merge_only_at_one_length_where_nothing_masks_them() -> None:
    finding, _, _ = read(lambda z, text, mask, places: masked(z, text, torch.ones(text.shape), places))
    assert finding.rule is not None
    assert finding.rule.text is None
    assert finding.words == (
        "merges: texts of one length; no mask keeps what lies behind a text out of the result"
    )


def test_rows_that_no_one_reads_must_be_equal() -> None:
    finding, _, _ = read(lambda z, text, mask, places: masked(z, text, mask, places[:1]))
    assert finding.rule is not None
    assert finding.rule.arguments["places"] == "shared"
    assert finding.words == "merges: only while calls share places"


def test_an_argument_that_can_have_no_other_value_must_be_equal() -> None:
    def looked_up(z: Tensor, text: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        assert len(places) == len(z)
        return masked(z, text, mask, places) + torch.embedding(torch.ones(1, 1), places[:, 1:] - 1)[:, 0]

    finding, _, _ = read(looked_up)
    assert finding.rule is not None
    assert finding.rule.arguments["places"] == "equal"
    assert finding.words == "merges: only while calls share places"


def test_a_pipeline_that_draws_one_picture_at_a_time_is_seen_by_the_rows_of_its_result() -> None:
    finding, _, _ = read(masked, most=1)
    assert finding.rule is not None
    assert finding.rule.arguments == {"z": "row", "text": "row", "places": "row", "text_mask": "row"}


def test_what_differs_by_more_than_a_length_is_no_text() -> None:
    rule = Rule({"a": "row", "b": "row", "c": "shared"})
    one = {"a": torch.ones(1, 4), "b": torch.ones(1, 4), "c": torch.ones(4)}
    assert text_of(one, {**one, "a": torch.ones(1, 6)}, rule) == Text({"a": 1})
    assert text_of(one, {**one, "a": torch.ones(1, 6), "b": torch.ones(1, 7)}, rule) is None
    assert text_of(one, {**one, "a": torch.ones(2, 6)}, rule) is None
    assert text_of(one, {**one, "c": torch.ones(6)}, rule) is None
    assert text_of(one, one, rule) is None
