"""The tokenizer among the metadata of a GGUF file, as the files that transformers reads.

llama.cpp has two kinds of byte-pair encoding: ``gpt2`` works on bytes and lists its merges, and
``llama`` is SentencePiece's, which merges the pair of the highest score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from cluster.errors import CheckpointError, shown
from workshop.convert.gguf_file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4
"""Kinds of tokens that no merge makes: with a meaning of their own, and of plain text."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "▁"


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The vocabulary in a file's metadata; ``ids`` has the place of each text."""

    texts: list[str]
    kinds: list[int]
    ids: dict[str, int]


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template to ``folder``.

    Raises :class:`CheckpointError` for metadata that is missing or wrong, and for a kind of
    tokenizer that is not known.
    """
    model = str(file.field("tokenizer.ggml.model"))
    if model not in _MODELS:
        raise CheckpointError(
            f"tokenizer.ggml.model {shown(model)} is not known; known: {', '.join(_MODELS)}",
            str(file.path),
        )
    tokens = _tokens(file)
    try:
        tokenizer = _MODELS[model](file, tokens)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises a plain Exception for wrong merges
        raise CheckpointError(
            f"its tokenizer cannot be used: {shown(str(error))}", str(file.path)
        ) from None
    added = [
        AddedToken(text, special=kind == _CONTROL, normalized=False)
        for text, kind in zip(tokens.texts, tokens.kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    named = _named(file, tokens)
    adds_bos = model == "llama" or file.field("tokenizer.ggml.pre", "") == "llama-bpe"
    if file.field("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **named,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    template = file.field("tokenizer.chat_template", "")
    if template:
        (folder / "chat_template.jinja").write_text(str(template), encoding="utf-8")


def _tokens(file: GgufFile) -> _Tokens:
    texts = _list(file, "tokenizer.ggml.tokens", str)
    if len(set(texts)) != len(texts):
        raise CheckpointError("tokenizer.ggml.tokens has a duplicate token", str(file.path))
    kinds = _list(file, "tokenizer.ggml.token_type", int, [1] * len(texts))
    if len(kinds) != len(texts):
        raise CheckpointError(
            "tokenizer.ggml.token_type must be as long as the tokens", str(file.path)
        )
    return _Tokens(texts, kinds, {text: token_id for token_id, text in enumerate(texts)})


def _list(file: GgufFile, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
    """Return a list of the metadata whose values all are of a kind."""
    values = file.field(key, default)
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise CheckpointError(f"{key} must be a list of {kind.__name__}", str(file.path))
    return values


def _byte_level(file: GgufFile, tokens: _Tokens) -> Tokenizer:
    name = str(file.field("tokenizer.ggml.pre", "missing"))
    if name not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"tokenizer.ggml.pre {shown(name)} is not known; known: {', '.join(_PRE_TOKENIZERS)}",
            str(file.path),
        )
    merges = [tuple(line.split(" ")) for line in _list(file, "tokenizer.ggml.merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise CheckpointError("tokenizer.ggml.merges must be pairs of tokens", str(file.path))
    ignores_merges = name == "llama-bpe"  # a word that is a token is taken whole
    tokenizer = Tokenizer(models.BPE(tokens.ids, merges, ignore_merges=ignores_merges))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _by_words(digits: str) -> pre.PreTokenizer:
    words = Regex(_WORDS.replace("DIGITS", digits))
    return pre.Sequence(
        [
            pre.Split(words, behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_PRE_TOKENIZERS: Mapping[str, Callable[[], pre.PreTokenizer]] = {
    "gpt-2": lambda: pre.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: _by_words("{1,3}"),
    "qwen2": lambda: _by_words(""),
}
"""By llama.cpp's name: how text is split before the merges."""


def _sentence_piece(file: GgufFile, tokens: _Tokens) -> Tokenizer:
    scores = _list(file, "tokenizer.ggml.scores", float)
    if len(scores) != len(tokens.texts):
        raise CheckpointError("tokenizer.ggml.scores must be as long as the tokens", str(file.path))
    unknown = tokens.texts[_token_id(file, "unknown", tokens) or 0]
    tokenizer = Tokenizer(
        models.BPE(
            tokens.ids,
            _merges(tokens, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    adds_space = bool(file.field("tokenizer.ggml.add_space_prefix", True))
    prepend = [normalizers.Prepend(_SPACE)] if adds_space else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(tokens: _Tokens, scores: list[float]) -> list[tuple[str, str]]:
    """Return the pairs that make a token, the highest score of it first."""
    ids, found = tokens.ids, []
    for token_id, text in enumerate(tokens.texts):
        if tokens.kinds[token_id] == _CONTROL:
            continue
        pairs = [(text[:at], text[at:]) for at in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(-scores[token_id], order, pair) for order, pair in enumerate(known)]
    found.sort(key=lambda entry: entry[0])  # stable: equal scores in the order of the tokens
    return [pair for _, _, pair in found]


_MODELS: Mapping[str, Callable[[GgufFile, _Tokens], Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentence_piece,
}


def _named(file: GgufFile, tokens: _Tokens) -> dict[str, str]:
    """Return the tokens with a name in ``tokenizer_config.json``."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {f"{name}_token": _token_id(file, key, tokens) for key, name in names.items()}
    return {
        name: tokens.texts[token_id] for name, token_id in found.items() if token_id is not None
    }


def _token_id(file: GgufFile, name: str, tokens: _Tokens) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = file.number(key, -1)
    if token_id == -1:
        return None
    if not 0 <= token_id < len(tokens.texts):
        raise CheckpointError(f"{key} {token_id} is not a token", str(file.path))
    return token_id
