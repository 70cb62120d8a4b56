"""Tokenizers for the few words of the embedded models, made by hand in the standard classes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from .world import VOCABULARY

MAX_TOKENS = 20
"""Length of every token sequence: the longest caption, its ends and some room."""

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
_PUNCTUATION = ".,!?"
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789'-"


def clip_tokenizer() -> Any:
    """A `CLIPTokenizer` that makes one token of each word it knows and letters of the others."""
    from transformers import CLIPTokenizer

    vocabulary, merges = byte_pairs(VOCABULARY)
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=merges,  # type: ignore[arg-type]
        model_max_length=MAX_TOKENS,
    )


def byte_pairs(words: tuple[str, ...]) -> tuple[list[str], list[tuple[str, str]]]:
    """A byte-pair vocabulary and its merges in order of priority, one token for each word.

    Each word is merged with what is there before its own merges are added, at lower priority:
    these cannot come first in an earlier word, which is complete without them.
    """
    letters = [*_LETTERS, *_PUNCTUATION]
    vocabulary = [CLIP_START, CLIP_END, *letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _merged([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            if pieces[0] not in vocabulary:
                vocabulary.append(pieces[0])
    return vocabulary, merges


def _merged(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Apply the merges of highest priority until none fits."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while True:
        pairs = [(ranks.get(pair, len(merges)), pair) for pair in pairwise(pieces)]
        rank, best = min(pairs, default=(len(merges), None))
        if best is None or rank == len(merges):
            return pieces
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == best:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined


def t5_tokenizer() -> Any:
    """A `T5Tokenizer` of whole words, capitalised too; any other word is one `<unk>`."""
    from transformers import T5Tokenizer

    known = [word for lower in VOCABULARY for word in (lower, lower.capitalize())]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -50.0)]
    pieces += [("▁" + word, -1.0) for word in dict.fromkeys(known)]
    pieces += [(mark, -1.0) for mark in _PUNCTUATION]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def token_ids(tokenizer: Any, prompts: list[str]) -> Any:
    """Padded token ids `(prompts, MAX_TOKENS)`, as both pipelines make them."""
    encoded = tokenizer(
        prompts,
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids
