"""Layers that run row by row inside a merged forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.engine.lora.layers import PackedAdapter, RowAdapter, RowProducts, Weights, patch_layers
from mezzotint.engine.steps.probes import Probes
from mezzotint.engine.steps.unmerged import Finder, row_by_row
from tests.engine.steps.test_exactness import Scale


class Merged(Scale):
    """In forwards of more than one row its last bits are others."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        """The numbers of rows it has seen."""

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return super().forward(x) * (1 + 1e-6 * (len(x) > 1))


def found(model: nn.Module, x: Tensor) -> Finder:
    finder = Finder(Probes(len(x)))
    with finder.watching(len(x)), torch.inference_mode():
        model(x)
    return finder


def test_each_row_gets_what_it_gets_alone() -> None:
    layer, x = Merged(), torch.randn(3, 5, 4)
    alone = torch.cat([layer(x[row : row + 1]) for row in range(3)])
    assert not torch.equal(layer(x), alone)
    with row_by_row([layer], 3):
        layer.sizes.clear()
        assert torch.equal(layer(x), alone)
        assert layer.sizes == [1, 1, 1]
        layer(x[:2])  # no tensor with the rows of this forward
        assert layer.sizes[3:] == [2]
    assert "forward" not in vars(layer)
    with row_by_row([layer], 1):
        assert "forward" not in vars(layer), "there is nothing to take apart"


def test_a_forward_that_somebody_has_patched_is_put_back() -> None:
    layer = Merged()
    patched: Any = lambda x: Merged.forward(layer, x) + 1  # noqa: E731
    layer.forward = patched  # type: ignore[method-assign]
    with row_by_row([layer], 2):
        assert torch.equal(layer(torch.ones(2, 4)), torch.cat([patched(torch.ones(1, 4))] * 2))
    assert layer.forward is patched
    with pytest.raises(RuntimeError), row_by_row([layer], 2):
        layer(torch.ones(2, 3))
    assert layer.forward is patched


@torch.inference_mode()
def test_adapters_add_to_a_layer_that_runs_row_by_row() -> None:
    model = nn.Sequential(Merged())
    layers = patch_layers(model)
    weights = {"0": Weights(torch.randn(2, 4), torch.randn(4, 2), 0.5)}
    adapter = RowAdapter(1, PackedAdapter(layers, weights), 1.0)
    x = torch.randn(3, 5, 4)

    def forward(rows: Tensor, adapted: list[int]) -> Any:
        products = RowProducts(layers)
        products.add_row_by_row(len(rows), [(row, adapter) for row in adapted], linear=True)
        products.finish()
        with products, row_by_row([model[0]], len(rows)):
            return model(rows)

    together = forward(x, [0, 2])
    alone = [forward(x[:1], [0]), forward(x[1:2], []), forward(x[2:], [0])]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(alone[0], model(x[:1])), "the adapter counts"
    layers["0"].close()
    assert "forward" not in vars(model[0])


def test_layers_that_differ_are_found_with_those_of_their_shape() -> None:
    plain = nn.Conv2d(1, 1, 1)
    model = nn.ModuleList([Merged(), Merged(), Scale(8), plain, nn.Identity()])

    def forward(x: Tensor) -> None:
        model[0](x)
        model[1](torch.zeros_like(x))  # nothing can differ here
        model[2](torch.zeros(len(x), 8))
        model[3](x.reshape(-1, 1, 2, 2))
        model[4](x)

    finder = Finder(Probes(2))
    with finder.watching(2):
        forward(torch.randn(2, 4))
    assert finder.found == (model[0], model[1])
    assert finder.too_many is False


def test_many_are_too_many() -> None:
    assert found(nn.Sequential(Merged(), Scale()), torch.randn(2, 4)).too_many
    assert not found(nn.Sequential(Merged(), Scale(), Scale()), torch.randn(2, 4)).too_many
    assert found(nn.Identity(), torch.randn(2, 4)).found == ()
