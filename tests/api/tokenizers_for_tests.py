"""Small tokenizers of the kinds that LLMs use, built on the spot."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "One and two are three; three and four are seven. Let me think about it again and again.",
    "naïve café, 東京タワー, привет, 🚶🏽‍♀️🙂 ½ ١٢٣",
    "def f(x):\n    return x + 1\n\n<tool>none</tool> stop END STOP",
]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>")


def byte_level(tags_are_special: bool = False) -> tokenizers.Tokenizer:
    """As GPT-2, Qwen, Llama 3, DeepSeek: byte-level BPE."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=tags_are_special, normalized=False) for token in TAGS])
    tokenizer.add_tokens([AddedToken("<｜User｜>", special=True, normalized=False)])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral: sentencepiece's BPE with a token for each byte, and a BOS from the post-processor."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("d", "o"), ("do", "g"), ("▁", "dog"), ("▁", "▁")]
    for token in [*"▁abcdefghijklmnopqrstuvwxyzéä.,!<>/", *("".join(pair) for pair in merges)]:
        vocab.setdefault(token, len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """As BERT: a decoder that is not the joining of pieces."""
    words = ["[UNK]", "the", "fox", "jump", "##s", "##ing", "over", "dog", ",", ".", "don", "'", "t", "##t"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """As T5 and the first Llama conversions: a decoder that turns ▁ into spaces and drops the first one."""
    words = ["<unk>", "▁", "▁the", "▁fox", "ing", "▁jump", "s", ".", "é"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer
