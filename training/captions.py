"""Captions for scenes, in the words that strangers use, and the words that the tokenizers learn."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from training.data import Pictures, Subject
from training.palette import BACKGROUNDS
from training.scenes import OBJECT_COLOURS, PATTERNS, PLACES, Item, Scene

EMPTY_SHARE = 0.1
KEYWORD_SHARE = 0.1
FOREIGN_SHARE = 0.14
STYLE_SAID = 0.2
OPENINGS = ("a photo of", "an icon of", "a picture of", "a drawing of", "a sticker of", "an image of", "draw")
ENDINGS = ("emoji", "icon", "sticker")
STYLE_WORDS: Mapping[str, tuple[str, ...]] = {
    "3d": ("3d", "3d style", "glossy"),
    "flat": ("flat", "flat style", "simple"),
    "noto": ("noto", "noto style"),
    "twemoji": ("twemoji", "twemoji style", "cartoon"),
    "mono": ("mono", "black and white", "outline"),
}
NUMBERS = {2: ("two", "2", "a pair of"), 3: ("three", "3"), 4: ("four", "4")}
SIZES = ("small", "tiny", "little")
FOREIGN_COLOURS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "red": {
        "de": ("roter", "rote", "rotes"),
        "fr": ("rouge",),
        "es": ("rojo", "roja"),
        "zh": ("红色的", "红"),
        "ja": ("赤い",),
    },
    "orange": {
        "de": ("oranger", "orange"),
        "fr": ("orange",),
        "es": ("naranja",),
        "zh": ("橙色的",),
        "ja": ("オレンジの",),
    },
    "yellow": {
        "de": ("gelber", "gelbe", "gelbes"),
        "fr": ("jaune",),
        "es": ("amarillo", "amarilla"),
        "zh": ("黄色的", "黄"),
        "ja": ("黄色い",),
    },
    "green": {
        "de": ("grüner", "grüne", "grünes"),
        "fr": ("vert", "verte"),
        "es": ("verde",),
        "zh": ("绿色的", "绿"),
        "ja": ("緑の",),
    },
    "blue": {
        "de": ("blauer", "blaue", "blaues"),
        "fr": ("bleu", "bleue"),
        "es": ("azul",),
        "zh": ("蓝色的", "蓝"),
        "ja": ("青い",),
    },
    "purple": {
        "de": ("lila",),
        "fr": ("violet", "violette"),
        "es": ("morado", "morada"),
        "zh": ("紫色的",),
        "ja": ("紫の",),
    },
    "pink": {"de": ("rosa",), "fr": ("rose",), "es": ("rosa",), "zh": ("粉色的",), "ja": ("ピンクの",)},
    "brown": {
        "de": ("brauner", "braune", "braunes"),
        "fr": ("marron",),
        "es": ("marrón",),
        "zh": ("棕色的",),
        "ja": ("茶色の",),
    },
    "black": {
        "de": ("schwarzer", "schwarze", "schwarzes"),
        "fr": ("noir", "noire"),
        "es": ("negro", "negra"),
        "zh": ("黑色的", "黑"),
        "ja": ("黒い",),
    },
    "white": {
        "de": ("weißer", "weiße", "weißes"),
        "fr": ("blanc", "blanche"),
        "es": ("blanco", "blanca"),
        "zh": ("白色的", "白"),
        "ja": ("白い",),
    },
}
FOREIGN_ARTICLES = {"de": ("ein", "eine"), "fr": ("un", "une"), "es": ("un", "una"), "zh": ("",), "ja": ("",)}
COLOUR_AFTER = ("fr", "es")
UNSPACED = ("zh", "ja")
IRREGULAR = {
    "mouse": "mice",
    "man": "men",
    "woman": "women",
    "person": "people",
    "child": "children",
    "leaf": "leaves",
    "knife": "knives",
    "fish": "fish",
    "sheep": "sheep",
    "tooth": "teeth",
    "foot": "feet",
    "wolf": "wolves",
}
DULL = ("face", "with", "and", "of", "the")
"""Words of Unicode names that are no subject by themselves."""


def words_of_captions() -> list[str]:
    """The words that captions use around names."""
    texts: list[str] = [*OPENINGS, *ENDINGS, *SIZES, *PATTERNS, *PLACES, *BACKGROUNDS, *OBJECT_COLOURS]
    texts += [text for group in (*STYLE_WORDS.values(), *NUMBERS.values()) for text in group]
    texts += ["a an emoji style on background , next to and with wearing under beside the in colour color"]
    for by_language in FOREIGN_COLOURS.values():
        texts += [word for words in by_language.values() for word in words]
    texts += [word for words in FOREIGN_ARTICLES.values() for word in words]
    return texts


def with_article(thing: str) -> str:
    return "an" if thing[0].lower() in "aeiou" else "a"


def plural(name: str) -> str:
    """The plural of an English name: its last word's."""
    *first, last = name.split()
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*first, last])


def usable_keywords(subject: Subject, keywords: list[str]) -> list[str]:
    """Keywords in plain words, without the name itself."""
    plain = [word.lower() for word in keywords if word.replace(" ", "").replace("-", "").isalpha()]
    return [word for word in plain if word != subject.name.lower().replace("-", " ") and len(word) > 2][:8]


def short_names(subject: Subject) -> list[str]:
    """Every name that people use for it: Unicode's, the listed ones, and 'dog' for 'dog face'."""
    name = subject.name.lower()
    names = [name, *(alias.lower() for alias in subject.aliases)]
    if name.endswith(" face") and len(name.split()) == 2:
        names.append(name.removesuffix(" face"))
    return names


class Captions:
    """Says what a scene shows; every call draws other words."""

    def __init__(
        self, pictures: Pictures, subjects: Iterable[Subject], style_said: float = STYLE_SAID
    ) -> None:
        """`style_said` is how often a caption names the hand; 0 for the training of an adapter."""
        self._pictures, self._style_said = pictures, style_said
        self._subjects = {subject.name: subject for subject in subjects}

    def __call__(self, rng: random.Random, scene: Scene) -> str:
        """A caption in lower or mixed case; one in ten is empty, for guidance."""
        if rng.random() < EMPTY_SHARE:
            return ""
        text = None
        if scene.kind in ("single", "coloured") and rng.random() < FOREIGN_SHARE:
            text = self._foreign(rng, scene.items[0])
        return text if text is not None else self._english(rng, scene)

    def _name(self, rng: random.Random, item: Item) -> str:
        names = short_names(self._subjects[item.name])
        return rng.choice(names) if rng.random() < 0.6 else names[-1 if item.name.endswith(" face") else 0]

    def _english(self, rng: random.Random, scene: Scene) -> str:
        text = {
            "single": self._single,
            "coloured": self._coloured,
            "count": self._count,
            "pair": self._pair,
            "placed": self._placed,
        }[scene.kind](rng, scene)
        style = scene.items[0].style
        always = style == "mono" and self._style_said > 0
        if always or rng.random() < self._style_said:
            word = rng.choice(STYLE_WORDS[style])
            text = rng.choice((f"{word} {text}", f"{text} , {word}", f"{text} {word}"))
        if scene.pattern is not None:
            return f"{text} on a {scene.pattern} {scene.background} background"
        if scene.background != "white" or rng.random() < 0.1:
            return f"{text} on {with_article(scene.background)} {scene.background} background"
        return text

    def _single(self, rng: random.Random, scene: Scene) -> str:
        item = scene.items[0]
        name, subject = self._name(rng, item), self._subjects[item.name]
        words = usable_keywords(subject, self._pictures.keywords[item.name])
        if words and rng.random() < KEYWORD_SHARE:
            word = rng.choice(words)
            return rng.choice((f"{name} , {word}", f"{word} {name}", word))
        return _dressed(rng, name)

    def _coloured(self, rng: random.Random, scene: Scene) -> str:
        item = scene.items[0]
        name = self._name(rng, item)
        return _dressed(rng, f"{item.colour} {name}" if item.colour else name)

    def _count(self, rng: random.Random, scene: Scene) -> str:
        number = rng.choice(NUMBERS[len(scene.items)])
        return f"{number} {plural(self._name(rng, scene.items[0]))}"

    def _pair(self, rng: random.Random, scene: Scene) -> str:
        first, second = (self._name(rng, item) for item in scene.items)
        first, second = (
            f"{with_article(name)} {name}" if rng.random() < 0.6 else name for name in (first, second)
        )
        if scene.relation == "and":
            return f"{first} {rng.choice(('and', 'and', 'with'))} {second}"
        if scene.relation == "on" and rng.random() < 0.3:
            return f"{second} wearing {first}"
        return f"{first} {scene.relation} {second}"

    def _placed(self, rng: random.Random, scene: Scene) -> str:
        name = self._name(rng, scene.items[0])
        size = rng.choice((*SIZES, ""))
        return " ".join(f"{rng.choice(('a', ''))} {size} {name} {scene.place}".split())

    def _foreign(self, rng: random.Random, item: Item) -> str | None:
        language = rng.choice(list(FOREIGN_ARTICLES))
        names = self._pictures.translations.get(language, {}).get(item.name)
        if not names:
            return None
        name = names[0] if rng.random() < 0.4 else rng.choice(names)
        if item.colour is not None:
            words = FOREIGN_COLOURS.get(item.colour, {}).get(language)
            if words is None:
                return None
            colour = rng.choice(words)
            space = "" if language in UNSPACED else " "
            name = f"{name} {colour}" if language in COLOUR_AFTER else f"{colour}{space}{name}"
        article = rng.choice(FOREIGN_ARTICLES[language])
        return f"{article} {name}" if article and rng.random() < 0.4 else name


def _dressed(rng: random.Random, name: str) -> str:
    """The name as people put it: bare, with an article, or asked for as a picture."""
    chance = rng.random()
    article = with_article(name)
    if chance < 0.35:
        return name
    if chance < 0.7:
        return f"{article} {name}"
    if chance < 0.85:
        return f"{name} {rng.choice(ENDINGS)}"
    return f"{rng.choice(OPENINGS)} {article} {name}"
