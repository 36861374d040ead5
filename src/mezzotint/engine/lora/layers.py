"""Layers that add each row's own low-rank product: `forward` is patched once, adapters come and go.

A layer's output is `base(x)`, and for each row that has an adapter `base(x) + (x @ down) @ up`. Three rules
keep a row's bytes independent of its neighbours:

- Rows without an adapter keep the base's output itself: nothing is added to them, not even zero.
- Products run either row by row, or as one `bmm` over *all* rows of the forward, adapted or not; what an
  unadapted row got is thrown away. So the shapes of a kernel call depend on the adapter and on the number of
  rows, on nothing else.
- A rank is padded with zeros to its own bucket (`bucket`), never to the largest rank around.

Adapters with the same layers and the same buckets share a Layout and with it one product per layer; a batch
that mixes layouts pays one product for each.
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


def bucket(rank: int) -> int:
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


class Layer:
    """A prepared Linear or Conv2d: stands in for its `forward`; does nothing more while `parts` is empty."""

    __slots__ = ("_previous", "base", "group", "module", "name", "parts", "row_wise")

    def __init__(self, name: str, module: nn.Linear | nn.Conv2d, group: str, row_wise: bool = True) -> None:
        self.name = name
        self.module = module
        self.row_wise = row_wise
        """Whether dimension 0 of its input is the row."""
        self.group = group
        """Layers of one group read the same input, so that their first product can be shared."""
        self.base: Callable[[Tensor], Tensor] = module.forward
        self.parts: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = ()
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
        for part in self.parts:
            out = part(x, base, out)
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


def prepare(root: nn.Module) -> dict[str, Layer]:
    """Patches every Linear and Conv2d under `root`; parameters and their names stay as they are."""
    layers = {}
    for name, module in root.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            parent, _, own = name.rpartition(".")
            group = f"{parent}.{_GROUPS[own]}" if own in _GROUPS else name
            if isinstance(module, nn.Linear):
                group += f" {module.in_features}"
            row_wise = not name.startswith(_TOKENS_FIRST.get(type(root).__name__, ()))
            layers[name] = Layer(name, module, group, row_wise)
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


class Packed:
    """One adapter's weights for one model: padded, alpha applied, in the layers' own types."""

    __slots__ = ("convs", "downs", "layout", "ups")

    def __init__(self, layers: Mapping[str, Layer], weights: Mapping[str, Weights]) -> None:
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


def _layout(layers: Mapping[str, Layer], linear: Mapping[str, Weights]) -> Layout:
    grouped: dict[tuple[str, int, torch.dtype], list[str]] = {}
    for name in layers:  # the model's order, whatever the file's
        if name in linear:
            dtype = layers[name].module.weight.dtype
            grouped.setdefault((layers[name].group, bucket(linear[name].down.shape[0]), dtype), []).append(
                name
            )
    return Layout(tuple(Block(tuple(names), rank) for (_, rank, _), names in grouped.items()))


def _on(layer: Layer, tensor: Tensor) -> Tensor:
    return tensor.to(layer.module.weight.device, layer.module.weight.dtype).contiguous()


def _down(layer: Layer, weights: Weights, rank: int) -> Tensor:
    down = weights.down.new_zeros(weights.down.shape[1], rank)
    down[:, : weights.down.shape[0]] = weights.down.T
    return _on(layer, down)


def _up(layer: Layer, weights: Weights, rank: int) -> Tensor:
    up = torch.zeros(rank, weights.up.shape[0], dtype=torch.float32, device=weights.up.device)
    up[: weights.up.shape[1]] = weights.up.T.float() * weights.factor
    return _on(layer, up)


@dataclass(frozen=True, slots=True)
class Row:
    """What one row of a forward uses."""

    serial: int
    """Number of this loading of the adapter; no two loadings share one."""
    packed: Packed
    scale: float


class RowCopies:
    """The matrices of every row of a forward side by side, as `bmm` wants them; refilled row by row."""

    def __init__(self, like: Packed, num_rows: int) -> None:
        self.downs = [tensor.new_zeros(num_rows, *tensor.shape) for tensor in like.downs]
        self.ups = [[tensor.new_zeros(num_rows, *tensor.shape) for tensor in ups] for ups in like.ups]
        flat_ups = [up for ups in self.ups for up in ups]
        self._downs_of = [[down[row] for down in self.downs] for row in range(num_rows)]
        self._ups_of = [[up[row] for up in flat_ups] for row in range(num_rows)]
        self._held: list[tuple[int, float] | None] = [None] * num_rows
        self.num_bytes = sum(tensor.nbytes for tensor in self.downs) + sum(
            tensor.nbytes for tensor in flat_ups
        )

    def fill(self, index: int, row: Row) -> None:
        """Puts the adapter of `row` in place `index`, its scale applied."""
        if self._held[index] == (row.serial, row.scale):
            return
        self._held[index] = None
        torch._foreach_copy_(self._downs_of[index], row.packed.downs)
        torch._foreach_copy_(self._ups_of[index], [up for ups in row.packed.ups for up in ups])
        if row.scale != 1.0:
            for up in self._ups_of[index]:  # _foreach_mul_ would round the scale itself to bf16
                up.mul_(row.scale)
        self._held[index] = (row.serial, row.scale)


class NotRowWise(Exception):
    """A layer's input does not have the forward's rows in dimension 0."""


def _check_rows(name: str, x: Tensor, num_rows: int) -> None:
    if num_rows != 1 and x.shape[0] != num_rows:
        raise NotRowWise(
            f"layer {name} got a tensor of shape {list(x.shape)} in a forward of {num_rows} rows"
        )


class _Last:
    """The latest first product of a layout: siblings of a group take theirs from it."""

    __slots__ = ("down", "products", "x")

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.down: Tensor | None = None
        self.products: Sequence[Tensor] = ()

    def clear(self) -> None:
        self.x, self.down, self.products = None, None, ()


class _Together:
    """The products of one linear layer for all rows of a forward at once."""

    __slots__ = ("down", "index", "last", "mask", "name", "num_rows", "rank", "up")

    def __init__(
        self, name: str, down: Tensor, up: Tensor, *, rank: int, index: int, last: _Last, mask: Tensor | None
    ) -> None:
        self.name, self.down, self.up, self.rank, self.index, self.last, self.mask = (
            name, down, up, rank, index, last, mask,
        )  # fmt: skip
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
        last = self.last
        if last.x is x and last.down is self.down:
            return last.products[self.index]
        rows = (
            x if x.dim() == 3 and x.shape[0] == self.num_rows else x.reshape(self.num_rows, -1, x.shape[-1])
        )
        product = torch.bmm(rows, self.down)
        if self.down.shape[2] == self.rank:
            return product
        parts = product.view(*product.shape[:2], -1, self.rank).permute(2, 0, 1, 3).contiguous()
        last.x, last.down, last.products = x, self.down, parts.unbind(0)
        return last.products[self.index]


class _OneByOne:
    """The products of one layer row after row, from the adapters' own tensors."""

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


class Plan:
    """What every layer of one model adds for one list of rows; a context manager that puts it in place."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._layers = layers
        self._parts: dict[str, list[Any]] = {}
        self._put: list[tuple[Layer, tuple[Any, ...]]] = []
        self._lasts: list[_Last] = []

    def add_together(self, layout: Layout, copies: RowCopies | Packed, mask: Tensor | None) -> None:
        """One product per layer for all rows; `mask` [rows, 1, 1] says which rows take it (None: all)."""
        last = _Last()
        self._lasts.append(last)
        for block, down, ups in zip(layout.blocks, copies.downs, copies.ups, strict=True):
            down = down if down.ndim == 3 else down.unsqueeze(0)
            for index, (name, up) in enumerate(zip(block.names, ups, strict=True)):
                up = up if up.ndim == 3 else up.unsqueeze(0)
                part = _Together(name, down, up, rank=block.rank, index=index, last=last, mask=mask)
                self._parts.setdefault(name, []).append(part)

    def add_one_by_one(self, num_rows: int, rows: Sequence[tuple[int, Row]], *, linear: bool) -> None:
        """Products row by row: of the convolutions, and with `linear` of the linear layers as well."""
        found: dict[str, list[tuple[int, Tensor, Tensor, float]]] = {}
        for index, row in rows:
            for name, (down, up) in row.packed.convs.items():
                found.setdefault(name, []).append((index, down, up, row.scale))
            if linear:
                for name, down, up in _linear_of(row.packed):
                    found.setdefault(name, []).append((index, down, up, row.scale))
        for name, entries in found.items():
            module = self._layers[name].module
            add = _add_conv(module) if isinstance(module, nn.Conv2d) else _add_linear
            self._parts.setdefault(name, []).append(_OneByOne(name, num_rows, entries, add))

    def finish(self) -> None:
        """To be called after the last `add_*`."""
        self._put = [(self._layers[name], tuple(parts)) for name, parts in self._parts.items()]

    def __enter__(self) -> None:
        for layer, parts in self._put:
            layer.parts = parts

    def __exit__(self, *_: object) -> None:
        for layer, _parts in self._put:
            layer.parts = ()
        for last in self._lasts:
            last.clear()


def _linear_of(packed: Packed) -> Iterable[tuple[str, Tensor, Tensor]]:
    for block, down, ups in zip(packed.layout.blocks, packed.downs, packed.ups, strict=True):
        for index, (name, up) in enumerate(zip(block.names, ups, strict=True)):
            yield name, down[:, index * block.rank : (index + 1) * block.rank], up
