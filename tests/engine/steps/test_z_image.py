"""Z-Image's Rule by hand: captions whose lengths pad to one multiple of 32 merge without a mask."""

from __future__ import annotations

from typing import Any

import torch

from mezzotint.engine.steps.batching import Call, Part, merge, split
from mezzotint.engine.steps.laboratory import layer_shapes
from mezzotint.engine.steps.rules import RULES
from tests.engine import tiny

LENGTHS = (1, 17, 31, 32)


def call(transformer: Any, length: int) -> Call:
    noise = torch.Generator().manual_seed(length)
    arguments = {
        "x": [torch.randn(4, 1, 8, 8, generator=noise)],
        "t": torch.tensor([0.5]),
        "cap_feats": [torch.randn(length, transformer.config["cap_feat_dim"], generator=noise)],
    }
    return Call("transformer", transformer.forward, (), arguments, RULES["ZImageTransformer2DModel"])


@torch.inference_mode()
def test_the_length_of_a_caption_changes_no_shape_and_no_byte_of_the_others() -> None:
    """So the check of a new shape need not try other lengths: the shapes choose the kernels."""
    transformer = tiny.build("z-image").transformer
    calls = [call(transformer, length) for length in LENGTHS]
    assert len({each.key for each in calls}) == 1
    assert call(transformer, 33).key != calls[0].key

    def beside(lengths: tuple[int, ...]) -> tuple[torch.Tensor, list[tuple[tuple[int, ...], ...]]]:
        """What the first caption gets before others of these lengths, and the shapes inside."""
        together = [calls[0], *(call(transformer, length) for length in lengths)]
        with layer_shapes(transformer) as shapes:
            result = transformer(**merge([Part(each, 0, 1) for each in together], 4))
        (own, *_) = split(result, [1] * 4)
        return own[0][0], shapes

    wanted, usual = beside((17, 31, 32))
    for lengths in ((1, 1, 1), (32, 32, 32), (2, 30, 3)):
        own, shapes = beside(lengths)
        assert torch.equal(own, wanted)
        assert shapes == usual
