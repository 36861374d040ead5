"""The proof that a Rule holds, by some seven forwards, before it is used.

Three requests that differ in prompt, seed and guidance stop at their first call of a module. Run together,
with padding, and again with their rows turned by one place, each must get what it gets alone. In the second
forward one request has other values in every argument that has rows: so a module that reads only row 0 of
one is found out although the requests agree in it. Where texts are padded, what the padding holds must not
change one bit. All of it happens inside the pipelines' calls, with the attention processors of the request.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.engine.steps.batching import Call, NotMergeable, Part, Rule, join, leaves, merge, split
from mezzotint.engine.steps.exactness import map_rows
from mezzotint.engine.steps.laboratory import Laboratory, Trial, advance, agrees, layer_shapes
from mezzotint.engine.steps.objects import contents
from mezzotint.engine.steps.padding import padded


class RowsNotRead(NotMergeable):
    """Rows of the arguments `names` do not each reach their own result: they must be equal to merge."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"the rows of {', '.join(names)} do not reach their own results")
        self.names = names


def prove(laboratory: Laboratory, trial: Trial, name: str) -> None:
    """Runs module `name` merged and alone for the requests of `trial`; NotMergeable says how they differ."""
    runs = [laboratory.start(arguments, seed) for seed, arguments in enumerate(trial)]
    try:
        calls = [advance(run, name) for run in runs]
        first, rule = calls[0], calls[0].rule
        if first.key is None or rule is None:
            raise NotMergeable(_obstacle(first))
        for other in calls[1:] if rule.text is not None else calls[1:2]:
            if other.key != first.key:
                raise NotMergeable(f"{_difference(first, other)} differs between requests of one shape")
        together = [call for call in calls if call.key == first.key]
        _check(together, rule, laboratory.pipe.components[name])
    finally:
        for run in runs:
            run.close()


def _alone(calls: Sequence[Call], module: nn.Module) -> list[Any]:
    """What each call gets alone; NotMergeable where other values give the layers inside other shapes.

    So it is where each token's experts are chosen by score: how many tokens an expert gets depends on all
    requests of a forward, and with that number its kernels, and a row's bytes, may change.
    """
    if hasattr(calls[0].run, "_torchdynamo_orig_callable"):  # a hook would have it compiled again
        return [call.alone() for call in calls]
    results, seen = [], []
    for call in calls:
        with layer_shapes(module) as shapes:
            results.append(call.alone())
        seen.append(shapes)
    if seen[0] != seen[1]:  # these two have texts of one length
        raise NotMergeable(
            "its values decide the shapes inside it, as where experts are chosen by score, "
            "so a row's bytes could depend on the others"
        )
    return results


def _check(calls: list[Call], rule: Rule, module: nn.Module) -> None:
    alone = _alone(calls, module)
    _require_unwritten(calls, rule)
    if not agrees(alone[0], calls[0].alone(), exactly=True):
        raise NotMergeable("it keeps a state, or draws at random: the same call twice gives two results")
    if rule.text is not None:
        _check_padding(calls[-1], rule)
    rows = sum(call.rows for call in calls)
    pieces = split(_merged(calls, rows + 1), [call.rows for call in calls], rule.results)
    if not all(agrees(one, other) for one, other in zip(alone, pieces, strict=True)):
        raise NotMergeable("merged calls give other results than calls alone")
    names = _with_rows(rule)
    if _turned_agrees(calls, alone, rule, names):
        return
    if _turned_agrees(calls, alone, rule, ()):
        unread = [name for name in names if not _turned_agrees(calls, alone, rule, (name,))]
        raise RowsNotRead(unread or names)
    raise NotMergeable("a row's result depends on its place among the rows")


def _require_unwritten(calls: Sequence[Call], rule: Rule) -> None:
    """NotMergeable where the module has written into an object: merged, one call's alone would be written."""
    for call in calls:
        for name, value in leaves(call.arguments, rule):
            if name in rule.objects and contents(value) != rule.objects[name]:
                raise NotMergeable(f"it writes into {name}")


def _turned_agrees(calls: list[Call], alone: list[Any], rule: Rule, changed: Collection[str]) -> bool:
    """Whether rows turned by one place get what they get alone, the second call with `changed` arguments.

    Not where the module cannot take such values: then they must be equal to merge.
    """
    other = _changed(calls[1], rule, changed)
    asked = [calls[0], other, *calls[2:]]
    try:
        wanted = [alone[0], _run(other) if changed else alone[1], *alone[2:]]
    except (LookupError, RuntimeError, ValueError):
        return False
    rows = sum(call.rows for call in asked)
    arguments = map_rows(
        merge([Part(call, 0, call.rows) for call in asked], rows), rule, lambda each: each[1:] + each[:1]
    )
    pieces = split(calls[0].run(**arguments), [1] * rows, rule.results)
    back = join(pieces[-1:] + pieces[:-1], rule.results)
    return agrees(join(wanted, rule.results), back)


def _with_rows(rule: Rule) -> list[str]:
    return [name for name, kind in rule.arguments.items() if kind in ("row", "scalar")]


def _changed(call: Call, rule: Rule, names: Collection[str]) -> Call:
    """The call with other values in these arguments."""
    if not names:
        return call
    values = dict(leaves(call.arguments, rule))

    def other(name: str, value: Any) -> Any:
        if name in names and isinstance(value, Tensor):
            return _other_values(value)
        if isinstance(value, dict):
            return {key: other(f"{name}.{key}", entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)) and name not in values:
            return type(value)(other(f"{name}.{index}", entry) for index, entry in enumerate(value))
        return value

    return replace_arguments(call, {name: other(name, value) for name, value in call.arguments.items()})


def replace_arguments(call: Call, arguments: Mapping[str, Any]) -> Call:
    """A call like this one with other arguments, as they are."""
    rule = None if call.rule is None else replace(call.rule, text=None)  # they are padded already
    return Call(call.name, call.run, (), dict(arguments), rule, call.parameters)


def _other_values(value: Tensor) -> Tensor:
    """Like `value`, and different everywhere it may be without leaving what such arguments hold."""
    if value.is_floating_point():
        return value * 0.75
    changed = value.clone()
    last = changed if value.ndim < 2 else changed[..., -1:]
    last.copy_(~last if value.dtype == torch.bool else (last - 1).abs())
    return changed


def _check_padding(call: Call, rule: Rule) -> None:
    """What lies behind a text must not reach the result, not even in its last bit."""
    assert rule.text is not None
    raw = dict(zip(call.parameters, call.args, strict=False)) | call.kwargs
    noise = torch.Generator("cpu").manual_seed(0)

    def fill(padding: Tensor) -> Tensor:
        if not padding.is_floating_point():
            return padding
        drawn = torch.randn(padding.shape, generator=noise)
        return drawn.to(padding.dtype).to(padding.device) * 3

    quiet = _run(call)
    loud = call.run(**padded(raw, rule.text, rule.dimensions, fill))
    if not agrees(quiet, loud, exactly=True):
        raise NotMergeable("no mask keeps what lies behind a text out of the result")


def _run(call: Call) -> Any:
    """The result of the call with its arguments as merged forwards take them."""
    return call.run(**call.arguments)


def _merged(calls: Sequence[Call], num_rows: int) -> Any:
    return calls[0].run(**merge([Part(call, 0, call.rows) for call in calls], num_rows))


def _obstacle(call: Call) -> str:
    return (
        f"no Rule covers its argument {call.obstacle}"
        if call.obstacle
        else ("the pipeline sets attention processors of its own")
    )


def _difference(one: Call, other: Call) -> str:
    """The arguments in which two calls differ."""
    if one.key is None or other.key is None:
        return _obstacle(other)
    left, right = dict(one.key[1]), dict(other.key[1])  # type: ignore[index]
    return ", ".join(sorted(name for name in left if left.get(name) != right.get(name))) or "what is passed"
