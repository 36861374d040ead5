"""Tokenizers made on the spot: one token a character (or byte), so that any prompt can be written."""

from __future__ import annotations

import atexit
import functools
import re
import tempfile
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS_TEMPLATE = CHAT_TEMPLATE.replace(
    "message['content']",
    "(message['content'] if message['content'] is string"
    " else message['content'] | map(attribute='text') | join)",
)
"""For messages whose content is a list of texts."""

GLM_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<|start|><|image|><|end|>' }}"
    "{% endfor %}{% endfor %}"
)
"""For `glm_image`; pictures are marked."""

TEMPLATE_WORDS = re.findall(
    r"\w+",
    "system user Describe the image by detailing color shape size texture quantity text "
    "spatial relationships of objects and background",
)
"""One token each, as in the real tokenizer: Qwen-Image and Ovis-Image count the tokens of their template."""


def clip(max_length: int = 77) -> Any:
    """514 tokens; the end token is 513, the highest, as in the real one."""
    words = [*BYTES, *(byte + "</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab=_numbered(words), merges=[], model_max_length=max_length)


def t5(max_length: int = 512) -> Any:
    """Fewer than 128 tokens."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["<pad>", "</s>", "<unk>", "▁", *letters]
    return T5Tokenizer(vocab=[(word, -1.0) for word in words], extra_ids=0, model_max_length=max_length)


def qwen2(max_length: int = 2048) -> Any:
    """Fewer than 320 tokens, with a chat template."""
    words = [*BYTES, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab=_numbered(words),
        merges=[],
        model_max_length=max_length,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    words = [space + word for word in TEMPLATE_WORDS for space in ("", " ")]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def gemma(max_length: int = 2048) -> Any:
    """Fewer than 384 tokens."""
    letters = [chr(code) for code in range(33, 127)]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters, *fallback]
    return GemmaTokenizer(vocab=_numbered(words), merges=[], model_max_length=max_length)


def bert(max_length: int = 77) -> Any:
    """Fewer than 256 tokens."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    return BertTokenizer(vocab=_numbered(words), model_max_length=max_length)


def plain(max_length: int = 2048) -> Any:
    """Bytes after a start token; stands for the tokenizers that a pipeline loads through AutoTokenizer."""
    words = [*BYTES, "<|endoftext|>", "<sop>"]
    tokenizer = Tokenizer(models.BPE(vocab=_numbered(words), merges=[]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<sop> $A", special_tokens=[("<sop>", words.index("<sop>"))]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        padding_side="left",
        model_max_length=max_length,
    )


def glm_image(max_length: int = 2048) -> Any:
    """Bytes and 6 marks, with the names by which GLM-Image's processor asks for them."""
    marks = ["<|endoftext|>", "<|start|>", "<sop>", "<eop>", "<|image|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE(vocab=_numbered([*BYTES, *marks]), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=marks[0],
        eos_token=marks[0],
        bos_token=marks[1],
        extra_special_tokens={
            "grid_bos_token": marks[2],
            "grid_eos_token": marks[3],
            "image_token": marks[4],
            "image_end_token": marks[5],
        },
        padding_side="left",
        model_max_length=max_length,
    )


def llama(max_length: int = 2048) -> Any:
    """Fewer than 384 tokens."""
    letters = [chr(code) for code in range(33, 127)]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["<unk>", "<s>", "</s>", "▁", *letters, *fallback]
    return LlamaTokenizer(vocab=_numbered(words), merges=[], model_max_length=max_length)


def starting(tokenizer: Any) -> Any:
    """The tokenizer with its start token before every text, even an empty one."""
    start = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    return tokenizer


def roberta(max_length: int = 77) -> Any:
    """Fewer than 1000 tokens, with an end of its own for each word."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", *letters, "<mask>"]
    return XLMRobertaTokenizer(vocab=[(word, -1.0) for word in words], model_max_length=max_length)


def chatglm(max_length: int = 256) -> Any:
    """From a sentencepiece model, which is trained on the spot on the alphabet."""
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    letters = [chr(code) for code in range(33, 127)]
    path = f"{_scratch()}/chatglm"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(letters)] * 4),
        model_prefix=path,
        vocab_size=384,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    return ChatGLMTokenizer(f"{path}.model", model_max_length=max_length)


@functools.cache
def _scratch() -> str:
    """A folder that lives as long as the process, for tokenizers that copy their file when saved."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return folder.name


def _numbered(words: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}
