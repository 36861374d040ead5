"""Rules that nobody wrote: a family of tomorrow merges, and modules that must not merge are found out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from torch import Tensor

from mezzotint.engine.steps.batching import Call, NotMergeable, Rule
from mezzotint.engine.steps.inference import Finding, Laboratory, find_rules, infer
from mezzotint.engine.steps.pipeline_run import Tap
from mezzotint.engine.steps.shared_state import AttentionState

Compute = Callable[["Odd", Tensor, Tensor], Tensor]


class Odd(ModelMixin):  # type: ignore[misc]
    """A denoiser with a signature of its own: rows in dimension 1, a dict with numbers, a list of words."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.calls = 0

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
    assert finding.reason == "calls merge only while they share moment"
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
    ],
    ids=["mixes rows", "reads row 0", "looks at places", "counts", "draws"],
)
def test_a_module_that_must_not_merge_is_found_out(compute: Compute, reason: str) -> None:
    finding, tap = found(compute)
    assert finding.rule is None
    assert reason in finding.reason
    assert tap.rule is None


def test_an_argument_that_no_rule_can_cover_is_named() -> None:
    with pytest.raises(NotMergeable, match=r"mask is \(1, 4\) for one prompt and \(2, 6\) for two"):
        infer([{"mask": torch.ones(1, 4)}], [{"mask": torch.ones(2, 6)}])
    with pytest.raises(NotMergeable, match="count is 1 for one prompt and 2 for two"):
        infer([{"count": 1}], [{"count": 2}])
    with pytest.raises(NotMergeable, match="no argument grows"):
        infer([{"x": torch.ones(2)}], [{"x": torch.ones(2)}])


def test_a_pipeline_that_takes_no_second_prompt_is_served_unmerged() -> None:
    finding, _ = found(lambda module, z, text: own(module, z, text) if len(z) == 2 else z.view(0))
    assert finding.rule is None
    assert "its trial failed" in finding.reason


def test_rows_in_another_dimension_merge_and_split() -> None:
    rule = Rule({"x": "row", "y": "row"}, dimensions={"y": 1})
    call = Call("m", lambda x, y: x, (), {"x": torch.ones(2, 5), "y": torch.ones(3, 2)}, rule)
    assert (call.rows, call.obstacle) == (2, "")
