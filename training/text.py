"""The tokenizers and the two text encoders, and how they first learn to tell the subjects apart.

The T5 tokenizer puts eight slot tokens before every prompt. In the first training each slot learns to name
one eighth of the picture (its latents, by a linear map that is thrown away): the denoiser then finds there
what to draw, and where.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from training.captions import compose, usable_keywords, words_of_forms
from training.data import Subject
from training.palette import BACKGROUNDS

SLOTS = 8
TEXT_LENGTH = 24
POOLED_LENGTH = 16
WIDTH = 256
SPECIAL = ("<pad>", "</s>", "<unk>", *(f"<slot{i}>" for i in range(SLOTS)))
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.!?'-"
ENDINGS = ("s", "es", "ies", "y", "ing", "ed", "er", "ly", "like", "ish", "man", "-", "'s")


def vocabulary(subjects: list[Subject], keywords: dict[str, list[str]]) -> list[tuple[str, float]]:
    """Whole words that captions use, then letters and endings, with unigram scores (log shares)."""
    words: Counter[str] = Counter()
    for subject in subjects:
        texts = [subject.name, *subject.aliases, *usable_keywords(subject, keywords[subject.name])]
        for text in texts:
            words.update(re.findall(r"\S+", text.lower().replace(",", " , ")))
    words.update(word for text in (*words_of_forms(), *BACKGROUNDS) for word in text.split())
    pieces: dict[str, float] = {"▁" + word: -8.0 for word in sorted(words)}
    pieces.setdefault("▁", -12.0)
    for letter in sorted({letter for word in words for letter in word} | set(LETTERS)):
        pieces.setdefault(letter, -13.0)
    for ending in ENDINGS:
        pieces.setdefault(ending, -10.0)
    pieces[","] = -9.0
    return [(token, 0.0) for token in SPECIAL] + list(pieces.items())


def build_tokenizer(vocab: list[tuple[str, float]], slots: int, length: int) -> PreTrainedTokenizerFast:
    """A lower-casing unigram tokenizer: that many slots, the words, the end, padding up to the length."""
    backend = Tokenizer(models.Unigram(vocab, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    first = [f"<slot{i}>" for i in range(slots)]
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join([*first, "$A", "</s>"]),
        special_tokens=[(token, SPECIAL.index(token)) for token in (*first, "</s>")],
    )
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def build_t5(vocab_size: int) -> T5EncoderModel:
    model = T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=WIDTH,
            d_kv=64,
            d_ff=2 * WIDTH,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=64,
            relative_attention_max_distance=64,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=SPECIAL.index("<pad>"),
            eos_token_id=SPECIAL.index("</s>"),
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    with torch.no_grad():
        model.shared.weight.mul_(0.1)  # short vectors turn sooner
    return model


def build_clip(vocab_size: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POOLED_LENGTH,
            pad_token_id=SPECIAL.index("<pad>"),
            bos_token_id=SPECIAL.index("<slot0>"),
            eos_token_id=SPECIAL.index("</s>"),
        )
    )


@dataclass(slots=True)
class TextSide:
    """Both tokenizers and both encoders, as FLUX pairs them: CLIP pooled, T5 token by token."""

    tokenizer: PreTrainedTokenizerFast
    tokenizer_2: PreTrainedTokenizerFast
    clip: CLIPTextModel
    t5: T5EncoderModel

    def __call__(self, captions: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """T5's states (n, 24, 256) and CLIP's pooled output (n, 256)."""
        ids = self.ids(self.tokenizer, captions, POOLED_LENGTH).to(device)
        ids_2 = self.ids(self.tokenizer_2, captions, TEXT_LENGTH).to(device)
        return self.t5(ids_2)[0], self.clip(ids).pooler_output

    @staticmethod
    def ids(tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int) -> torch.Tensor:
        encoded = tokenizer(captions, padding="max_length", max_length=length, truncation=True)
        return torch.tensor(encoded.input_ids)


def build_text_side(subjects: list[Subject], keywords: dict[str, list[str]]) -> TextSide:
    """Fresh tokenizers and encoders for those subjects."""
    vocab = vocabulary(subjects, keywords)
    return TextSide(
        build_tokenizer(vocab, 0, POOLED_LENGTH),
        build_tokenizer(vocab, SLOTS, TEXT_LENGTH),
        build_clip(len(vocab)),
        build_t5(len(vocab)),
    )


class PictureHeads(nn.Module):
    """Linear maps from slots and pooled output to packed latents; used only in the first training."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        per_slot = tokens * channels // SLOTS
        self.slots = nn.Parameter(torch.randn(SLOTS, WIDTH, per_slot) * WIDTH**-0.5)
        self.slot_bias = nn.Parameter(torch.zeros(SLOTS, per_slot))
        self.pooled = nn.Linear(WIDTH, tokens * channels)

    def forward(self, states: torch.Tensor, pooled: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The mean squared error of both predictions of `wanted` (n, tokens, channels)."""
        regions = wanted.reshape(len(wanted), SLOTS, -1)
        from_slots = torch.einsum("nsw,swo->nso", states[:, :SLOTS], self.slots) + self.slot_bias
        from_pooled = self.pooled(pooled).view_as(wanted)
        return functional.mse_loss(from_slots, regions) + functional.mse_loss(from_pooled, wanted)


def draw_captions(
    rng: random.Random, subjects: list[Subject], keywords: dict[str, list[str]], rows: list[int]
) -> tuple[list[str], list[int]]:
    """A caption for each subject index, and which background each one asks for."""
    names = list(BACKGROUNDS)
    chosen = [0 if rng.random() < 0.3 else rng.randrange(len(names)) for _ in rows]
    texts = [
        compose(rng, subjects[row], keywords[subjects[row].name], names[colour])
        for row, colour in zip(rows, chosen, strict=True)
    ]
    return texts, chosen
