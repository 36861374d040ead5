"""Captions for a subject, and the words the tokenizers learn."""

from __future__ import annotations

import random

from training.data import Subject

EMPTY_SHARE = 0.1
KEYWORD_SHARE = 0.12
FORMS = ("{name}", "{name}", "{name} emoji", "{article} {name}", "{article} {name} emoji")


def words_of_forms() -> tuple[str, ...]:
    """The words that captions use around names."""
    return ("a", "an", "emoji", "on", "background", ",")


def with_article(thing: str) -> str:
    return "an" if thing[0].lower() in "aeiou" else "a"


def usable_keywords(subject: Subject, keywords: list[str]) -> list[str]:
    """Keywords in plain words, without the name itself."""
    plain = [word.lower() for word in keywords if word.replace(" ", "").replace("-", "").isalpha()]
    return [word for word in plain if word != subject.name.lower().replace("-", " ") and len(word) > 2][:8]


def phrase(rng: random.Random, subject: Subject, keywords: list[str]) -> str:
    """What is drawn, without the background."""
    names = [subject.name, *subject.aliases]
    name = rng.choice(names) if rng.random() < 0.5 else subject.name
    words = usable_keywords(subject, keywords)
    if words and rng.random() < KEYWORD_SHARE:
        word = rng.choice(words)
        return rng.choice((f"{name} , {word}", f"{word} {name}", word))
    return rng.choice(FORMS).format(name=name, article=with_article(name))


def compose(rng: random.Random, subject: Subject, keywords: list[str], background: str) -> str:
    """A caption for a picture on that background; white may go unsaid, and one in ten captions is empty."""
    if rng.random() < EMPTY_SHARE:
        return ""
    text = phrase(rng, subject, keywords).lower()
    if background == "white" and rng.random() < 0.8:
        return text
    return f"{text} on {with_article(background)} {background} background"
