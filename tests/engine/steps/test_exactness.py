"""The check that a row's bytes are its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.engine.steps.batching import Call, Rule
from mezzotint.engine.steps.exactness import DRAWS, Merging, exact_merging, exact_row_counts

RULE = Rule({"x": "row", "t": "scalar", "words": "list", "mask": "row"})


def call(run: Any, rows: int = 1) -> Call:
    arguments = {
        "x": torch.ones(rows, 4),
        "t": torch.tensor(0.5),
        "mask": torch.ones(rows, 4, dtype=torch.bool),
    }
    return Call("transformer", run, (), arguments, RULE)


def clean(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (x * mask + t.reshape(-1, 1),)


def by_neighbours(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (x - x.mean(0),)


def by_position(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (x + torch.arange(len(x)).reshape(-1, 1),)


def test_rows_that_mind_their_own_business_pass_the_check() -> None:
    assert exact_row_counts(call(clean), 4) == (1, 2, 4)
    assert exact_row_counts(call(clean, rows=2), 3) == (1, 2, 3)


def test_a_smaller_forward_that_gives_other_bytes_is_not_used() -> None:
    def by_size(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (x + (1e-6 if len(x) == 2 else 0.0),)

    assert exact_row_counts(call(by_size), 8) == (1, 4, 8)


@pytest.mark.parametrize("run", [by_neighbours, by_position])
def test_rows_that_depend_on_others_or_on_their_place_are_found_out(run: Any) -> None:
    assert exact_row_counts(call(run), 4) == ()


def test_lists_of_rows_take_part_in_the_check() -> None:
    def mixing(words: list[Tensor]) -> tuple[list[Tensor]]:
        return ([word + words[0] for word in words],)

    def own(words: list[Tensor]) -> tuple[list[Tensor]]:
        return ([word * 2 for word in words],)

    words = {"words": [torch.ones(3)]}
    assert exact_row_counts(Call("transformer", mixing, (), words, RULE), 2) == ()
    assert exact_row_counts(Call("transformer", own, (), words, RULE), 2) == (1, 2)


def test_rows_that_depend_on_a_longer_text_beside_them_are_found_out() -> None:
    def cut_to_the_longest(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (x + 1e-6 * int(mask.sum(1).max()),)

    short = torch.tensor([[True, True, False, False]])
    arguments = {"x": torch.ones(1, 4), "t": torch.tensor(0.5), "mask": short}
    assert exact_row_counts(Call("transformer", cut_to_the_longest, (), arguments, RULE), 4) == ()


class Scale(nn.Linear):
    """Multiplies each value by one of its weights: no processor gives a row other bits beside others."""

    def __init__(self, features: int = 4) -> None:
        super().__init__(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[0]


class BySize(Scale):
    """In forwards of some numbers of rows its last bits are others."""

    def __init__(self, *odd_rows: int) -> None:
        super().__init__()
        self.odd_rows = odd_rows

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 2e-7 * (len(x) in self.odd_rows))


class Rounded(nn.Module):
    """A layer between others, and a result in which rounding hides the layer's last bits."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = Scale(), middle, Scale()

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
        inner: Tensor = self.last(self.middle(self.first(x + t.reshape(-1, 1))))
        return (inner.to(torch.bfloat16).round(),)


class ByPlace(nn.Module):
    """The last row's last bits are others."""

    def forward(self, x: Tensor) -> Tensor:
        last = torch.arange(len(x)).reshape(-1, 1) == len(x) - 1
        return x * (1 + 2e-7 * last) if len(x) > 1 else x


def final_only(module: Rounded) -> Any:
    """The module as a function, so that nothing inside it can be seen."""
    first, middle, last = (each.forward for each in (module.first, module.middle, module.last))
    return lambda x, t, mask: (last(middle(first(x + t.reshape(-1, 1)))).to(torch.bfloat16).round(),)


@torch.inference_mode()
def test_a_difference_inside_is_seen_although_the_result_hides_it() -> None:
    module = Rounded(BySize(8))
    assert exact_row_counts(call(final_only(module)), 8) == (1, 2, 4, 8)
    assert exact_row_counts(call(module), 8) == (8,)
    assert exact_row_counts(call(Rounded(BySize(2))), 8) == (1, 4, 8)


@torch.inference_mode()
def test_a_place_whose_bits_only_differ_inside_is_found_out() -> None:
    assert exact_row_counts(call(final_only(Rounded(ByPlace()))), 4) == (1, 2, 4)
    assert exact_row_counts(call(Rounded(ByPlace())), 4) == ()


@torch.inference_mode()
@pytest.mark.parametrize("odd_rows", [(8,), (2, 8), (4,), (1,), (2, 4, 8)])
def test_a_layer_whose_bits_depend_on_the_number_of_rows_runs_row_by_row(odd_rows: tuple[int, ...]) -> None:
    module = Rounded(BySize(*odd_rows))
    assert exact_merging(call(module), 8) == Merging((1, 2, 4, 8), (module.middle,))
    assert "forward" not in vars(module.middle), "it is put back"


@torch.inference_mode()
def test_nothing_runs_row_by_row_where_that_is_no_help_or_not_needed() -> None:
    assert exact_merging(call(Rounded(ByPlace())), 4) == Merging()
    assert exact_merging(call(Rounded(nn.Sequential(ByPlace(), BySize(4)))), 4) == Merging()
    assert exact_merging(call(Rounded(Scale())), 4) == Merging((1, 2, 4))
    assert exact_merging(call(final_only(Rounded(BySize(2)))), 4) == Merging((1, 2, 4)), "not seen"


@torch.inference_mode()
def test_too_many_layers_do_not_run_row_by_row() -> None:
    module = Rounded(nn.Sequential(BySize(2), BySize(2)))
    assert exact_merging(call(module), 8) == Merging((1, 4, 8)), "two layers of four"


class Tokens(nn.Module):
    """An expert: it gets the tokens that are sent to it, as many as there may be."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * 2


class Routed(nn.Module):
    """Sends the positive ones among the values to an expert, the last first."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = Tokens()
        self.seen: list[int] = []

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
        chosen = x > 0
        result = x.clone()
        self.seen.append(int(chosen.sum()))
        result[chosen] = self.expert(x[chosen].flip(0)).flip(0)
        return (result,)


@torch.inference_mode()
def test_tokens_that_are_as_many_as_the_rows_are_not_taken_for_them() -> None:
    routed = Routed()
    assert [exact_row_counts(call(routed), rows)[-1] for rows in range(2, 24)] == [*range(2, 24)]


class Transposed(nn.Module):
    """Works on [tokens, rows]."""

    def __init__(self, odd_rows: int) -> None:
        super().__init__()
        self.odd_rows = odd_rows

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 2e-7 * (x.shape[1] == self.odd_rows))


class Turned(nn.Module):
    def __init__(self, odd_rows: int) -> None:
        super().__init__()
        self.inner = Transposed(odd_rows)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (self.inner(torch.stack([x.T, x.T], -1)).permute(1, 0, 2).round(),)


@torch.inference_mode()
def test_rows_in_the_second_dimension_are_compared_too() -> None:
    assert exact_row_counts(call(Turned(2)), 8) == (1, 4, 8)


def test_a_compiled_forward_is_tried_on_more_draws() -> None:
    sizes: list[float] = []

    def compiled(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
        sizes.append(x.std().item())
        return (x,)

    once = exact_row_counts(call(compiled), 4)
    few, largest = len(sizes), max(sizes)
    setattr(compiled, "_torchdynamo_orig_callable", clean)  # noqa: B010
    assert exact_row_counts(call(compiled), 4) == once == (1, 2, 4)
    assert len(sizes) - few == (few - 1) * DRAWS  # none to see which modules have rows
    assert max(sizes) > 4 * largest


class Split(nn.Linear):
    """Rounds its sums to bf16; where there are more than two rows they were a millionth larger before."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.double()
        terms = x.double().unsqueeze(-2) * weight
        order = 1e-6 * terms.abs().sum(-1) if len(x) > 2 else 0.0
        return (terms.sum(-1) + self.bias.double() + order).to(x.dtype)


class Once(nn.Module):
    """A layer that each row meets once, as that of a time step: one draw of noise shows little of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.split, self.rest = Split(64, 4, dtype=torch.bfloat16), Scale(256)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.rest(self.split(x).float().repeat(1, 64)),)


@torch.inference_mode()
def test_another_order_of_adding_that_noise_does_not_show_is_seen() -> None:
    module = Once()
    wanted = Call("transformer", module, (), {"x": torch.ones(1, 64, dtype=torch.bfloat16)}, RULE)
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    alone = torch.cat([module.split(noise[row : row + 1]) for row in range(4)])
    assert torch.equal(module.split(noise), alone), "nothing to be seen"
    assert exact_row_counts(wanted, 4) == (4,)
    assert exact_merging(wanted, 4) == Merging((1, 2, 4), (module.split,))
