"""Inputs that show in which order a linear layer adds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mezzotint.engine.lora.layers import patch_layers
from mezzotint.engine.steps.probes import MIN_TOKENS, Probes, bare_forward, layer_shape


def layer(
    features: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16
) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(features, outputs, bias=bias, dtype=dtype)


def inputs(of: nn.Module, shape: tuple[int, ...], order: range = range(3)) -> list[Tensor]:
    probe = Probes(3).of(of, torch.zeros(shape, dtype=torch.bfloat16), order)
    assert probe is not None
    assert probe[0] is of
    return probe[1]


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "number"), [((3, 256), 16), ((3, 4, 256), 4), ((3, 10, 10, 256), 1)])
def test_terms_cancel_out_and_inputs_are_like_those_of_the_forward(
    shape: tuple[int, ...], number: int, bias: bool
) -> None:
    linear = layer(256, 32, bias=bias)
    found = inputs(linear, shape)
    assert [tuple(each.shape) for each in found] == [shape] * number
    terms = (found[0].unsqueeze(-2) * linear.weight).abs().sum(-1)
    assert linear(found[0]).abs().mean() < terms.mean() / 1000
    assert found[0].std() > 0.3
    if number > 1:
        assert number * found[0][0].numel() == MIN_TOKENS * 256
        assert not torch.equal(found[0], found[1])


def test_they_are_the_same_for_every_row_wherever_it_stands() -> None:
    linear = layer(64, 8)
    first, turned = inputs(linear, (3, 2, 64)), inputs(linear, (2, 2, 64), range(2, 0, -1))
    assert all(torch.equal(one[[2, 1]], other) for one, other in zip(first, turned, strict=True))


def test_a_layer_of_zeros_or_of_one_input_has_probes() -> None:
    zeros = layer(8, 4)
    nn.init.zeros_(zeros.weight)
    for each in (zeros, layer(1, 4), layer(3, 1)):
        assert all(one.isfinite().all() for one in inputs(each, (3, each.in_features)))


def test_layers_of_one_shape_share_a_probe() -> None:
    one, other = layer(8, 4), layer(8, 4)
    probes, x = Probes(2), torch.zeros(2, 8, dtype=torch.bfloat16)
    first, second = probes.of(one, x, range(2)), probes.of(other, x, range(2))
    assert first is not None
    assert second is not None
    assert second[0] is first[0] is one


def test_what_does_not_round_has_none() -> None:
    assert Probes(2).of(layer(8, 4, dtype=torch.float32), torch.zeros(2, 8), range(2)) is None
    assert Probes(2).of(nn.Conv2d(1, 1, 1).bfloat16(), torch.zeros(2, 1, 1, 1), range(2)) is None


def test_a_shape_is_of_the_layer_and_of_a_row() -> None:
    linear, x = layer(8, 4), torch.zeros(2, 8)
    assert layer_shape(linear, x) == layer_shape(layer(8, 4), torch.ones(5, 8))
    assert layer_shape(linear, x) != layer_shape(linear, torch.zeros(2, 3, 8))
    assert layer_shape(nn.Conv2d(1, 1, 3), x) != layer_shape(nn.Conv2d(1, 1, 3, padding=1), x)
    assert layer_shape(nn.Identity(), x) is None
    assert layer_shape(linear, [x]) is None


def test_adapters_are_left_out() -> None:
    model = nn.Sequential(layer(4, 4))
    plain = model[0].forward
    assert bare_forward(model[0]) == plain
    patch_layers(model)
    assert model[0].forward != plain
    assert bare_forward(model[0]) == plain
