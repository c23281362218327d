"""A small backbone's CLIP tokenizer: byte-pair merges learned on every caption word, one token a word."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

IDENTIFIERS = ["sks", "ohwx", "zwx", "xyb", "qlm"]  # reserved for DreamBooth: in the vocabulary, in no caption
MAX_LENGTH = 64


def words_of(phrases: Iterable[str]) -> list[str]:
    """Return the distinct words of some texts and the identifiers, sorted."""
    return sorted({word for phrase in (*phrases, *IDENTIFIERS) for word in phrase.split()})


def make_tokenizer(folder: Path, phrases: Iterable[str]) -> CLIPTokenizer:
    """Learn the merges and write `vocab.json`, `merges.txt` and the tokenizer's configuration to `folder`.

    Args:
        folder: to write.
        phrases: texts that hold every word of the captions.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # CLIP's vocabulary has every byte also as the end of a word. Given beforehand, they are numbered alike each time:
    # met on the way, they would be numbered in the order of a hash map.
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        initial_alphabet=alphabet,
        special_tokens=[letter + "</w>" for letter in alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(words_of(phrases))] * 4, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False, indent=0) + "\n", "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_LENGTH, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
