"""What the built-in model says of itself is true of it."""

from __future__ import annotations

from mezzotint.engine.manifest import read
from mezzotint.engine.models.sources import built_in_names, locate


def test_every_built_in_model_knows_the_words_of_its_examples() -> None:
    assert built_in_names()
    for name in built_in_names():
        said = read(locate(name))
        assert len(said.examples) >= 3
        assert said.num_inference_steps
        assert [prompt for prompt in said.examples if said.warning(prompt)] == []
        assert said.unknown_words("a gryphon") == ["gryphon"], "it says what it does not know"
