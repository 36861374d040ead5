"""The tokenizers and the two text encoders, and how they first learn to tell the subjects apart.

The T5 tokenizer puts eight slot tokens before every prompt. In the first training each slot learns to name
one eighth of the picture (its latents, by a linear map that is thrown away): the denoiser then finds there
what to draw, and where.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from training.captions import FOREIGN_COLOURS, plural, short_names, usable_keywords, words_of_captions
from training.data import Pictures, Subject

SLOTS = 8
TEXT_LENGTH = 24
POOLED_LENGTH = 16
WIDTH = 256
SPECIAL = ("<pad>", "</s>", "<unk>", *(f"<slot{i}>" for i in range(SLOTS)))
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.!?'-"
UNSPACED_FROM = 0x2E80
"""Words from this letter on (Chinese, Japanese) stand in sentences without spaces."""
ENDINGS = ("s", "es", "ies", "y", "ing", "ed", "er", "ly", "like", "ish", "man", "-", "'s")


def texts_of(pictures: Pictures, subjects: list[Subject]) -> list[str]:
    """Everything that captions may say, in all languages."""
    texts = words_of_captions()
    for subject in subjects:
        names = short_names(subject)
        texts += [*names, *map(plural, names), *usable_keywords(subject, pictures.keywords[subject.name])]
        for names_in in pictures.translations.values():
            texts += names_in.get(subject.name, [])
    return [text.lower().replace(",", " , ") for text in texts]


def vocabulary(pictures: Pictures, subjects: list[Subject]) -> list[tuple[str, float]]:
    """Whole words that captions use, then letters and endings, with unigram scores (log shares)."""
    words = {word for text in texts_of(pictures, subjects) for word in text.split()}
    pieces = {word if ord(word[0]) >= UNSPACED_FROM else "▁" + word: -8.0 for word in sorted(words)}
    pieces.setdefault("▁", -12.0)
    for letter in sorted({letter for word in words for letter in word} | set(LETTERS)):
        pieces.setdefault(letter, -13.0)
    for ending in ENDINGS:
        pieces.setdefault(ending, -10.0)
    pieces[","] = -9.0
    return [(token, 0.0) for token in SPECIAL] + list(pieces.items())


def meanings(pictures: Pictures, subjects: list[Subject]) -> dict[str, list[str]]:
    """English texts for each word of another language: the subjects and colours that it stands for."""
    found: dict[str, list[str]] = {}
    for names in pictures.translations.values():
        for subject in subjects:
            for word in {word for name in names.get(subject.name, []) for word in name.split()}:
                found.setdefault(word, []).append(short_names(subject)[-1])
    for colour, by_language in FOREIGN_COLOURS.items():
        for word in (word for words in by_language.values() for word in words):
            found[word] = [colour]
    return found


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


def build_text_side(pictures: Pictures, subjects: list[Subject]) -> TextSide:
    """Fresh tokenizers and encoders for those subjects."""
    vocab = vocabulary(pictures, subjects)
    return TextSide(
        build_tokenizer(vocab, 0, POOLED_LENGTH),
        build_tokenizer(vocab, SLOTS, TEXT_LENGTH),
        build_clip(len(vocab)),
        build_t5(len(vocab)),
    )


@torch.no_grad()
def carry_over(old: TextSide, pictures: Pictures, subjects: list[Subject]) -> TextSide:
    """The old encoders with today's vocabulary: known words keep their vectors, new ones begin near theirs.

    A new English word begins as the mean of its pieces, a foreign one as the mean of what it stands for.
    """
    new = build_text_side(pictures, subjects)
    known = old.tokenizer.get_vocab()
    stands_for = meanings(pictures, subjects)
    first = [(old.clip.get_input_embeddings(), new.clip.get_input_embeddings()),
             (old.t5.get_input_embeddings(), new.t5.get_input_embeddings())]  # fmt: skip
    for module, before in ((new.clip, old.clip), (new.t5, old.t5)):
        kept = {name: value for name, value in before.state_dict().items() if not _is_table(name)}
        module.load_state_dict(kept, strict=False)
    for token, row in new.tokenizer.get_vocab().items():
        if token in known:
            rows = [known[token]]
        else:
            texts = stands_for.get(token.removeprefix("▁"), [token.removeprefix("▁")])
            pieces = old.tokenizer(texts, add_special_tokens=False).input_ids
            rows = [piece for ids in pieces for piece in ids] or [SPECIAL.index("<unk>")]
        for source, target in first:
            target.weight[row] = source.weight[rows].mean(0)
    return new


def _is_table(name: str) -> bool:
    return "token_embedding" in name or name in ("shared.weight", "encoder.embed_tokens.weight")


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
