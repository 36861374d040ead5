"""Layers that add each row's own low-rank product: `forward` is patched once, adapters come and go.

A layer's output is `base(x)`, and for each row that has an adapter `base(x) + (x @ down) @ up`. Three rules
keep a row's bytes independent of its neighbours:

- Rows without an adapter keep the base's output itself: nothing is added to them, not even zero.
- Products run either row by row, or as one `bmm` over *all* rows of the forward, adapted or not; what an
  unadapted row got is thrown away. So the shapes of a kernel call depend on the adapter and on the number of
  rows, on nothing else.
- A rank is padded with zeros to the next multiple of RANK_STEP, never to the largest rank around.

Adapters with the same layers and the same padded ranks share a Layout and with it one product per layer; a
batch that mixes layouts pays one product for each.

Shapes: a linear layer sees x as [rows, tokens, in] and returns [rows, tokens, out]; its matrices are
down [in, rank] and up [rank, out], and stacked for the rows of a forward [rows, in, rank] and
[rows, rank, out]. `rank` is the padded one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

RANK_STEP = 16
"""Ranks are padded to a multiple of this, so that every matrix starts on a cache line."""


def padded_rank(rank: int) -> int:
    """The rank that a matrix of `rank` is padded to."""
    return -(-rank // RANK_STEP) * RANK_STEP


@dataclass(frozen=True, slots=True)
class Weights:
    """One layer's part of an adapter, as trained."""

    down: Tensor
    """[rank, in], or [rank, in, height, width] for a convolution."""
    up: Tensor
    """[out, rank], or [out, rank, 1, 1] for a convolution."""
    factor: float
    """alpha / rank."""


def together(
    adapters: Sequence[tuple[Mapping[str, Mapping[str, Weights]], float]],
) -> dict[str, dict[str, Weights]]:
    """One adapter that adds what these add, each times its scale: their ranks stand side by side.

    Adapters are weights by component and layer.
    """
    found: dict[str, dict[str, list[tuple[Weights, float]]]] = {}
    for weights, scale in adapters:
        for component, layers in weights.items():
            for name, each in layers.items():
                found.setdefault(component, {}).setdefault(name, []).append((each, scale))
    return {
        component: {
            name: Weights(
                torch.cat([each.down.float() for each, _ in parts]),
                torch.cat([each.up.float() * (each.factor * scale) for each, scale in parts], dim=1),
                1.0,
            )
            for name, parts in layers.items()
        }
        for component, layers in found.items()
    }


class LoraLayer:
    """Replaces `forward` of a Linear or Conv2d; does nothing more than that while `products` is empty."""

    __slots__ = ("_previous", "base", "group", "module", "name", "products", "row_wise")

    def __init__(self, name: str, module: nn.Linear | nn.Conv2d, group: str, row_wise: bool = True) -> None:
        self.name = name
        self.module = module
        self.row_wise = row_wise
        """Whether dimension 0 of its input is the row."""
        self.group = group
        """Layers of one group read the same input, so that their first product can be shared."""
        self.base: Callable[[Tensor], Tensor] = module.forward
        self.products: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = ()
        """From (x, base(x), output so far) to the output; filled by RowProducts around each forward."""
        self._previous = module.__dict__.get("forward")
        setattr(module, "forward", self.forward)  # noqa: B010

    def close(self) -> None:
        """Restores the module, unless somebody else has patched it since."""
        if self.module.__dict__.get("forward") != self.forward:
            return
        del self.module.__dict__["forward"]
        if self._previous is not None:
            self.module.__dict__["forward"] = self._previous

    def forward(self, x: Tensor) -> Tensor:
        out = base = self.base(x)
        for product in self.products:
            out = product(x, base, out)
        return out

    def misfit(self, weights: Weights) -> str | None:
        """Why these weights cannot be this layer's, in words; None if they can."""
        down, up, shape = weights.down.shape, weights.up.shape, self.module.weight.shape
        if not self.row_wise:
            return (
                "it sees the tokens of all rows in one piece, so that rows cannot have adapters of their own"
            )
        if isinstance(self.module, nn.Conv2d) and self.module.groups != 1:
            return "it is a grouped convolution, which takes no LoRA here"
        if not self.module.weight.is_floating_point():
            return f"its weights are quantised ({self.module.weight.dtype})"
        rank = down[0] if down else 0
        want = ((rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:])))
        if (tuple(down), tuple(up)) != want or rank == 0:
            return f"the model's weight is {list(shape)}, the adapter has {list(down)} and {list(up)}"
        return None


_GROUPS = {
    **dict.fromkeys(("to_q", "to_k", "to_v"), "qkv"),
    **dict.fromkeys(("add_q_proj", "add_k_proj", "add_v_proj"), "added qkv"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    "proj_mlp": "attn.qkv",  # in Flux's single blocks it reads what the attention beside it reads
}


_TOKENS_FIRST = {"ZImageTransformer2DModel": ("all_x_embedder.", "cap_embedder.", "siglip_embedder.")}
"""Layers whose input has no dimension for rows, by model class."""


def patch_layers(root: nn.Module) -> dict[str, LoraLayer]:
    """Patches every Linear and Conv2d under `root`; parameters and their names stay as they are."""
    layers = {}
    for name, module in root.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            parent, _, own = name.rpartition(".")
            group = f"{parent}.{_GROUPS[own]}" if own in _GROUPS else name
            if isinstance(module, nn.Linear):
                group += f" {module.in_features}"
            row_wise = not name.startswith(_TOKENS_FIRST.get(type(root).__name__, ()))
            layers[name] = LoraLayer(name, module, group, row_wise)
    return layers


@dataclass(frozen=True, slots=True)
class Block:
    """Linear layers that read one input, with one padded rank."""

    names: tuple[str, ...]
    rank: int


@dataclass(frozen=True)
class Layout:
    """Which linear layers an adapter has, and their padded ranks."""

    blocks: tuple[Block, ...]

    @cached_property
    def _hash(self) -> int:
        return hash(self.blocks)

    def __hash__(self) -> int:
        return self._hash


class PackedAdapter:
    """One adapter's weights for one component: padded, alpha applied, in the layers' own types.

    downs: for each block of the layout [in, layers * rank], the layers of the block side by side;
    ups: for each block and each of its layers [rank, out];
    convs: by layer, down [rank, in, height, width] and up [out, rank, 1, 1], not padded.
    """

    __slots__ = ("convs", "downs", "layout", "ups")

    def __init__(self, layers: Mapping[str, LoraLayer], weights: Mapping[str, Weights]) -> None:
        linear = {name: weight for name, weight in weights.items() if weight.down.ndim == 2}
        self.layout = _layout(layers, linear)
        self.downs = [
            torch.cat([_down(layers[name], linear[name], block.rank) for name in block.names], dim=1)
            for block in self.layout.blocks
        ]
        self.ups = [
            [_up(layers[name], linear[name], block.rank) for name in block.names]
            for block in self.layout.blocks
        ]
        self.convs = {
            name: (_on(layers[name], weight.down), _on(layers[name], weight.up.float() * weight.factor))
            for name, weight in weights.items()
            if weight.down.ndim == 4
        }

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        linear = [*self.downs, *(up for ups in self.ups for up in ups)]
        return linear + [tensor for pair in self.convs.values() for tensor in pair]

    @property
    def linear_bytes(self) -> int:
        """Bytes of the linear layers' part: what a copy for one row takes."""
        return sum(tensor.nbytes for tensor in self.downs) + sum(up.nbytes for ups in self.ups for up in ups)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


def _layout(layers: Mapping[str, LoraLayer], linear: Mapping[str, Weights]) -> Layout:
    grouped: dict[tuple[str, int, torch.dtype], list[str]] = {}
    for name in layers:  # the model's order, whatever the file's
        if name in linear:
            dtype = layers[name].module.weight.dtype
            grouped.setdefault(
                (layers[name].group, padded_rank(linear[name].down.shape[0]), dtype), []
            ).append(name)
    return Layout(tuple(Block(tuple(names), rank) for (_, rank, _), names in grouped.items()))


def _on(layer: LoraLayer, tensor: Tensor) -> Tensor:
    return tensor.to(layer.module.weight.device, layer.module.weight.dtype).contiguous()


def _down(layer: LoraLayer, weights: Weights, rank: int) -> Tensor:
    """[in, rank]."""
    down = weights.down.new_zeros(weights.down.shape[1], rank)
    down[:, : weights.down.shape[0]] = weights.down.T
    return _on(layer, down)


def _up(layer: LoraLayer, weights: Weights, rank: int) -> Tensor:
    """[rank, out], alpha applied."""
    up = torch.zeros(rank, weights.up.shape[0], dtype=torch.float32, device=weights.up.device)
    up[: weights.up.shape[1]] = weights.up.T.float() * weights.factor
    return _on(layer, up)


@dataclass(frozen=True, slots=True)
class RowAdapter:
    """The adapter that one row of a forward uses."""

    serial: int
    """Number of this loading of the adapter; no two loadings share one."""
    packed: PackedAdapter
    scale: float


class RowCopies:
    """The matrices of all rows of a forward, as `bmm` takes them; refilled row by row.

    downs: for each block [rows, in, layers * rank]; ups: for each block and layer [rows, rank, out].
    """

    def __init__(self, like: PackedAdapter, num_rows: int) -> None:
        self.downs = [tensor.new_zeros(num_rows, *tensor.shape) for tensor in like.downs]
        self.ups = [[tensor.new_zeros(num_rows, *tensor.shape) for tensor in ups] for ups in like.ups]
        flat_ups = [up for ups in self.ups for up in ups]
        self._downs_of = [[down[row] for down in self.downs] for row in range(num_rows)]
        self._ups_of = [[up[row] for up in flat_ups] for row in range(num_rows)]
        self._filled: list[tuple[int, float] | None] = [None] * num_rows
        """For each row the serial and scale that `fill` put there; None while it is being written."""
        self.num_bytes = sum(tensor.nbytes for tensor in self.downs) + sum(
            tensor.nbytes for tensor in flat_ups
        )

    def fill(self, index: int, row: RowAdapter) -> None:
        """Copies the adapter of `row` to index `index`, its scale applied."""
        if self._filled[index] == (row.serial, row.scale):
            return
        self._filled[index] = None
        torch._foreach_copy_(self._downs_of[index], row.packed.downs)
        torch._foreach_copy_(self._ups_of[index], [up for ups in row.packed.ups for up in ups])
        if row.scale != 1.0:
            for up in self._ups_of[index]:  # _foreach_mul_ would round the scale itself to bf16
                up.mul_(row.scale)
        self._filled[index] = (row.serial, row.scale)


class NotRowWise(Exception):
    """A layer's input does not have the forward's rows in dimension 0."""


def _check_rows(name: str, x: Tensor, num_rows: int) -> None:
    if num_rows != 1 and x.shape[0] != num_rows:
        raise NotRowWise(
            f"layer {name} got a tensor of shape {list(x.shape)} in a forward of {num_rows} rows"
        )


class _FirstProducts:
    """x @ down of the block that ran last, for the other layers of the block, which read the same x.

    Filled by the first layer of a block, read by its siblings, cleared after the forward.
    """

    __slots__ = ("down", "products", "x")

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.down: Tensor | None = None
        self.products: Sequence[Tensor] = ()
        """For each layer of the block [rows, tokens, rank]."""

    def clear(self) -> None:
        self.x, self.down, self.products = None, None, ()


class _BatchedProduct:
    """(x @ down) @ up of one linear layer, for all rows at once.

    down is its block's [rows, in, layers * rank], up its own [rows, rank, out]; `index` is its place in the
    block. mask [rows, 1, 1] says which rows have the adapter; None: all.
    """

    __slots__ = ("down", "first", "index", "mask", "name", "num_rows", "rank", "up")

    def __init__(
        self,
        name: str,
        down: Tensor,
        up: Tensor,
        *,
        rank: int,
        index: int,
        first: _FirstProducts,
        mask: Tensor | None,
    ) -> None:
        self.name, self.down, self.up, self.mask = name, down, up, mask
        self.rank, self.index, self.first = rank, index, first
        self.num_rows = down.shape[0]

    def __call__(self, x: Tensor, base: Tensor, out: Tensor) -> Tensor:
        if self.mask is None and base.dim() == 3 and base.shape[0] == self.num_rows:  # what nearly always is
            return base.baddbmm_(self._inner(x), self.up)
        _check_rows(self.name, x, self.num_rows)
        inner = self._inner(x)
        rows = base.reshape(self.num_rows, -1, base.shape[-1])
        if self.mask is None:
            return rows.baddbmm_(inner, self.up).view(base.shape)
        added = rows.clone().baddbmm_(inner, self.up)
        return torch.where(self.mask, added, out.reshape(rows.shape)).view(base.shape)

    def _inner(self, x: Tensor) -> Tensor:
        """x @ down, [rows, tokens, rank]."""
        first = self.first
        if first.x is x and first.down is self.down:
            return first.products[self.index]
        rows = (
            x if x.dim() == 3 and x.shape[0] == self.num_rows else x.reshape(self.num_rows, -1, x.shape[-1])
        )
        product = torch.bmm(rows, self.down)
        if self.down.shape[2] == self.rank:
            return product
        parts = product.view(*product.shape[:2], -1, self.rank).permute(2, 0, 1, 3).contiguous()
        first.x, first.down, first.products = x, self.down, parts.unbind(0)
        return first.products[self.index]


class _RowByRowProduct:
    """(x @ down) @ up of one layer, row after row, from the adapters' own tensors.

    rows: (row, down, up, scale), shaped as in PackedAdapter, a linear layer's down cut to [in, rank].
    `add` adds one such product to the output in place.
    """

    __slots__ = ("add", "name", "num_rows", "rows")

    def __init__(
        self,
        name: str,
        num_rows: int,
        rows: Sequence[tuple[int, Tensor, Tensor, float]],
        add: Callable[[Tensor, Tensor, Tensor, Tensor, float], None],
    ) -> None:
        self.name, self.num_rows, self.rows, self.add = name, num_rows, rows, add

    def __call__(self, x: Tensor, base: Tensor, out: Tensor) -> Tensor:
        _check_rows(self.name, x, self.num_rows)
        if not out.is_contiguous() and not out.is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous()
        if self.num_rows == 1:
            for _, down, up, scale in self.rows:
                self.add(out, x, down, up, scale)
            return out
        for row, down, up, scale in self.rows:
            self.add(out[row : row + 1], x[row : row + 1], down, up, scale)
        return out


def _add_linear(out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> None:
    inner = x.reshape(-1, x.shape[-1]) @ down
    scaled = up if scale == 1.0 else up * scale  # not `alpha`: rounded as in RowCopies
    out.view(-1, out.shape[-1]).addmm_(inner, scaled)


def _add_conv(module: nn.Conv2d) -> Callable[[Tensor, Tensor, Tensor, Tensor, float], None]:
    def add(out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> None:
        inner = functional.conv2d(x, down, None, module.stride, module.padding, module.dilation)
        out.add_(functional.conv2d(inner, up), alpha=scale)

    return add


class RowProducts:
    """What the layers of one component add for one list of rows; a context manager around the forward."""

    def __init__(self, layers: Mapping[str, LoraLayer]) -> None:
        self._layers = layers
        self._by_name: dict[str, list[Any]] = {}
        """Filled by `add_*`, read by `finish`."""
        self._by_layer: list[tuple[LoraLayer, tuple[Any, ...]]] = []
        """Filled by `finish`, put into the layers at every entry."""
        self._firsts: list[_FirstProducts] = []

    def add_batched(self, layout: Layout, copies: RowCopies | PackedAdapter, mask: Tensor | None) -> None:
        """One product per layer for all rows; `mask` [rows, 1, 1] says which rows take it (None: all)."""
        first = _FirstProducts()
        self._firsts.append(first)
        for block, down, ups in zip(layout.blocks, copies.downs, copies.ups, strict=True):
            down = down if down.ndim == 3 else down.unsqueeze(0)
            for index, (name, up) in enumerate(zip(block.names, ups, strict=True)):
                up = up if up.ndim == 3 else up.unsqueeze(0)
                product = _BatchedProduct(
                    name, down, up, rank=block.rank, index=index, first=first, mask=mask
                )
                self._by_name.setdefault(name, []).append(product)

    def add_row_by_row(self, num_rows: int, rows: Sequence[tuple[int, RowAdapter]], *, linear: bool) -> None:
        """Products row by row: of the convolutions, and with `linear` of the linear layers as well."""
        found: dict[str, list[tuple[int, Tensor, Tensor, float]]] = {}
        for index, row in rows:
            for name, (down, up) in row.packed.convs.items():
                found.setdefault(name, []).append((index, down, up, row.scale))
            if linear:
                for name, down, up in _linear_parts(row.packed):
                    found.setdefault(name, []).append((index, down, up, row.scale))
        for name, entries in found.items():
            module = self._layers[name].module
            add = _add_conv(module) if isinstance(module, nn.Conv2d) else _add_linear
            self._by_name.setdefault(name, []).append(_RowByRowProduct(name, num_rows, entries, add))

    def finish(self) -> None:
        """To be called after the last `add_*`."""
        self._by_layer = [(self._layers[name], tuple(products)) for name, products in self._by_name.items()]

    def __enter__(self) -> None:
        for layer, products in self._by_layer:
            layer.products = products

    def __exit__(self, *_: object) -> None:
        for layer, _ in self._by_layer:
            layer.products = ()
        for first in self._firsts:
            first.clear()


def _linear_parts(packed: PackedAdapter) -> Iterable[tuple[str, Tensor, Tensor]]:
    """(layer, down [in, rank], up [rank, out]) of every linear layer."""
    for block, down, ups in zip(packed.layout.blocks, packed.downs, packed.ups, strict=True):
        for index, (name, up) in enumerate(zip(block.names, ups, strict=True)):
            yield name, down[:, index * block.rank : (index + 1) * block.rank], up
