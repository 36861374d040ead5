"""What captions say, and that the tokenizers hold it."""

from __future__ import annotations

import random

from training.captions import compose, usable_keywords, with_article
from training.data import read_subjects
from training.palette import BACKGROUNDS
from training.text import SLOTS, TEXT_LENGTH, build_tokenizer, vocabulary


def test_at_least_six_hundred_subjects_are_listed_and_none_twice() -> None:
    names = [subject.name for subject in read_subjects()]
    assert len(names) >= 600
    assert len(set(names)) == len(names)


def test_a_name_that_people_type_belongs_to_one_subject_only() -> None:
    typed = [alias.lower() for subject in read_subjects() for alias in subject.aliases]
    assert len(set(typed)) == len(typed)


def test_a_caption_names_its_background_unless_that_is_white_or_the_caption_is_empty() -> None:
    rng = random.Random(0)
    subject = next(subject for subject in read_subjects() if subject.name == "cat face")
    captions = [compose(rng, subject, ["kitty"], "light blue") for _ in range(500)]
    said = [caption for caption in captions if caption]
    assert all(caption.endswith("on a light blue background") for caption in said)
    assert 20 < len(captions) - len(said) < 90
    unsaid = [compose(rng, subject, [], "white") for _ in range(200)]
    assert any(caption and "background" not in caption for caption in unsaid)


def test_most_captions_hold_the_name() -> None:
    rng = random.Random(1)
    subject = next(subject for subject in read_subjects() if subject.name == "rocket")
    captions = [compose(rng, subject, ["launch", "space"], "red") for _ in range(500)]
    assert sum("rocket" in caption for caption in captions) > 400


def test_keywords_that_are_no_words_are_left_out() -> None:
    subject = read_subjects()[0]
    assert usable_keywords(subject, [":D", subject.name, "happy", "a", "100%"]) == ["happy"]


def test_articles_follow_the_sound() -> None:
    assert [with_article(word) for word in ("apple", "cat")] == ["an", "a"]


def test_prompts_keep_their_words_whole_in_any_case_and_fit_the_length() -> None:
    subjects = read_subjects()
    vocab = vocabulary(subjects, {subject.name: [] for subject in subjects})
    tokenizer = build_tokenizer(vocab, SLOTS, TEXT_LENGTH)
    ids = tokenizer("A Rocket on a Teal background", padding="max_length", truncation=True).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert len(tokens) == TEXT_LENGTH
    assert tokens[SLOTS : SLOTS + 7] == ["▁a", "▁rocket", "▁on", "▁a", "▁teal", "▁background", "</s>"]


def test_ordinary_captions_are_not_cut() -> None:
    rng = random.Random(2)
    subjects = read_subjects()
    vocab = vocabulary(subjects, {subject.name: [] for subject in subjects})
    tokenizer = build_tokenizer(vocab, SLOTS, TEXT_LENGTH)
    captions = [compose(rng, rng.choice(subjects), [], rng.choice(list(BACKGROUNDS))) for _ in range(2000)]
    lengths = [len(ids) for ids in tokenizer(captions).input_ids]
    assert sum(length > TEXT_LENGTH for length in lengths) < 20
