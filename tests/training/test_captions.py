"""What captions say, and that the tokenizers hold it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import numpy as np
import pytest

from training.captions import Captions, plural, short_names, usable_keywords, with_article
from training.data import STYLES, Pictures, Subject, read_subjects
from training.evaluate import read_strangers
from training.scenes import Item, Scene
from training.text import SLOTS, TEXT_LENGTH, build_text_side, build_tokenizer, carry_over, vocabulary


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    return read_subjects()


@pytest.fixture(scope="module")
def pictures(subjects: list[Subject]) -> Pictures:
    """No pixels: captions read names and keywords only."""
    names = {subject.name: 0 for subject in subjects}
    words = {name: ["launch"] if name == "rocket" else [] for name in names}
    foreign = {
        "de": {"red apple": ["roter apfel", "apfel"]},
        "fr": {"red apple": ["pomme"]},
        "es": {"red apple": ["manzana"]},
        "zh": {"red apple": ["苹果"]},
        "ja": {"red apple": ["りんご"]},
    }
    return Pictures(np.zeros((1, 128, 128, 4), np.uint8), dict.fromkeys(STYLES, names), words, foreign)


def said(pictures: Pictures, scene: Scene, times: int = 400) -> Iterator[str]:
    captions, rng = Captions(pictures, read_subjects()), random.Random(0)
    return (text for _ in range(times) if (text := captions(rng, scene)))


def test_at_least_six_hundred_subjects_are_listed_and_none_twice(subjects: list[Subject]) -> None:
    names = [subject.name for subject in subjects]
    assert len(names) >= 600
    assert len(set(names)) == len(names)


def test_a_name_that_people_type_belongs_to_one_subject_only(subjects: list[Subject]) -> None:
    typed = [alias.lower() for subject in subjects for alias in subject.aliases]
    assert len(set(typed)) == len(typed)


def test_one_caption_in_ten_is_empty(pictures: Pictures) -> None:
    texts = list(said(pictures, Scene("single", (Item("rocket", "3d"),)), 1000))
    assert 60 < 1000 - len(texts) < 140


def test_captions_name_subject_colour_background_count_and_place(pictures: Pictures) -> None:
    guitar = Item("guitar", "3d")
    single = list(said(pictures, Scene("single", (guitar,), "light blue")))
    assert sum("guitar" in text for text in single) > 0.8 * len(single)
    english = [text for text in single if "background" in text]
    assert all(text.endswith("on a light blue background") for text in english)
    painted = Scene("coloured", (Item("guitar", "3d", "purple"),))
    assert all("purple" in text for text in said(pictures, painted))
    three = Scene("count", (guitar,) * 3)
    assert all(("three" in text or "3 " in text) and "guitars" in text for text in said(pictures, three))
    placed = Scene("placed", (guitar,), place="at the top left")
    assert all("at the top left" in text for text in said(pictures, placed))
    koala = Item("koala", "3d")
    on = list(said(pictures, Scene("pair", (guitar, koala), relation="on")))
    assert all(re.search("guitar on .*koala|koala.* wearing .*guitar", text) for text in on)
    assert any("wearing" in text for text in on)
    beside = said(pictures, Scene("pair", (guitar, koala), relation="and"))
    assert all(text.index("guitar") < text.index("koala") for text in beside)


def test_black_and_white_is_always_asked_for(pictures: Pictures) -> None:
    words = ("mono", "black and white", "outline")
    texts = list(said(pictures, Scene("count", (Item("rocket", "mono"),) * 2)))
    assert all(any(word in text for word in words) for text in texts)


def test_colours_in_other_languages_stand_where_they_belong(pictures: Pictures) -> None:
    texts = set(said(pictures, Scene("coloured", (Item("red apple", "3d", "blue"),)), 4000))
    assert {"blauer apfel", "pomme bleue", "manzana azul", "蓝色的苹果", "青いりんご"} <= texts


def test_keywords_that_are_no_words_are_left_out(subjects: list[Subject]) -> None:
    subject = subjects[0]
    assert usable_keywords(subject, [":D", subject.name, "happy", "a", "100%"]) == ["happy"]


def test_articles_and_plurals_follow_the_word() -> None:
    assert [with_article(word) for word in ("apple", "cat")] == ["an", "a"]
    assert [plural(word) for word in ("cat", "red box", "cherry", "mouse", "fish")] == [
        "cats",
        "red boxes",
        "cherries",
        "mice",
        "fish",
    ]


def test_a_dog_face_is_also_a_dog() -> None:
    assert short_names(Subject("dog face", ("puppy",))) == ["dog face", "puppy", "dog"]


def test_no_subject_is_named_by_a_whole_prompt_of_the_strangers(subjects: list[Subject]) -> None:
    assert len(read_strangers()) == 40


def test_prompts_keep_their_words_whole_in_any_case_and_fit_the_length(
    pictures: Pictures, subjects: list[Subject]
) -> None:
    tokenizer = build_tokenizer(vocabulary(pictures, subjects), SLOTS, TEXT_LENGTH)
    ids = tokenizer("A Rocket on a Teal background", padding="max_length", truncation=True).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert len(tokens) == TEXT_LENGTH
    assert tokens[SLOTS : SLOTS + 7] == ["▁a", "▁rocket", "▁on", "▁a", "▁teal", "▁background", "</s>"]
    assert tokenizer.tokenize("红色的苹果") == ["▁", "红色的", "苹果"]


def test_a_larger_vocabulary_keeps_what_was_learnt(pictures: Pictures, subjects: list[Subject]) -> None:
    old = build_text_side(pictures, subjects[:50])
    new = carry_over(old, pictures, subjects)
    assert len(new.tokenizer) > len(old.tokenizer)
    prompt = [subjects[3].name]
    device = next(old.t5.parameters()).device
    before, after = old(prompt, device), new(prompt, device)
    assert all(bool((a == b).all()) for a, b in zip(before, after, strict=True))
