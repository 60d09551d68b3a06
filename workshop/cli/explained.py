"""Which experts the tokens of a text go to: counts, shares by kind, entropies, and a picture.

Dimension letters: T tokens, L MoE layers, K experts per token, E experts of a layer, C kinds of
token.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from router.cli.common import printable
from router.client import ModelInfo, Token

SPECIAL = "special tokens"
"""The kind of tokens that are no text, such as those that begin and end one."""
ALL_KINDS = (
    "punctuation", "numbers", "capitals", "words", "parts of words", "line ends and spaces",
    SPECIAL,
)  # fmt: skip
"""Each token is of one of these kinds."""


@dataclass(frozen=True)
class Explained:
    """A text's tokens and their experts.

    ``rows`` [T, L, K] are experts, the gate's first one first; ids beyond the model's experts stand
    for experts whose share was left out, and count nowhere. ``num_prompt`` tokens are the prompt's,
    the others were generated. Without ``exact`` experts were replaced or left out.
    """

    info: ModelInfo
    tokens: Sequence[Token]
    rows: np.ndarray
    num_prompt: int
    exact: bool

    @cached_property
    def kinds(self) -> list[str]:
        """The kind of each token."""
        return [SPECIAL if t.special else token_kind(t.text) for t in self.tokens]

    @cached_property
    def counts(self) -> np.ndarray:
        """The numbers of assignments by layer, kind and expert, int64 [L, C, E]."""
        kinds = np.array([ALL_KINDS.index(kind) for kind in self.kinds])
        token, layer, rank = np.nonzero(self.rows < self.info.num_experts)
        shape = len(self.info.moe_layers), len(ALL_KINDS), self.info.num_experts
        places = layer, kinds[token], self.rows[token, layer, rank].astype(np.int64)
        flat = np.bincount(np.ravel_multi_index(places, shape), minlength=int(np.prod(shape)))
        return flat.reshape(shape)

    @property
    def shares(self) -> np.ndarray:
        """The shares of a layer's assignments by expert, [L, E]; 0 where there are none."""
        return _shares(self.counts.sum(axis=1))

    @property
    def kind_shares(self) -> np.ndarray:
        """The same for each kind of token, [L, C, E]."""
        return _shares(self.counts)

    @property
    def entropies_bits(self) -> np.ndarray:
        """The entropy of a layer's shares in bits, [L]; log2 E where all experts have as much."""
        return _entropy(self.shares)

    @property
    def information_bits(self) -> np.ndarray:
        """What a layer's expert tells of the kind of its token, in bits, [L].

        The mutual information of both in the counts (Shannon 1948); of few tokens it is too large.
        """
        by_kind = _shares(self.counts.sum(axis=2))  # [L, C]
        return self.entropies_bits - (by_kind * _entropy(self.kind_shares)).sum(axis=1)

    @property
    def best_layer(self) -> int:
        """The place of the layer whose experts tell most of the kind of token."""
        return int(self.information_bits.argmax())

    def first_experts(self, place: int) -> list[int | None]:
        """Return each token's first expert in a layer; ``None`` where its share was left out."""
        first = self.rows[:, place, 0].tolist()
        return [expert if expert < self.info.num_experts else None for expert in first]

    def most_used(self, place: int, most: int) -> list[int]:
        """Return the experts of a layer with any token, the most used first, at most so many."""
        shares = self.shares[place]
        order = np.argsort(-shares, kind="stable")[:most]
        return [int(expert) for expert in order if shares[expert]]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as ``--json`` prints it."""
        layers = []
        parts = zip(self.info.moe_layers, self.entropies_bits, self.information_bits, strict=True)
        for place, (layer, entropy, information) in enumerate(parts):
            layers.append(
                {
                    "layer": layer,
                    "entropy_bits": round(float(entropy), 6),
                    "information_bits": round(float(information), 6),
                    "shares": _rounded(self.shares[place]),
                    "kinds": {
                        kind: _rounded(self.kind_shares[place, number])
                        for number, kind in enumerate(ALL_KINDS)
                        if kind in self.kinds
                    },
                }
            )
        return {
            "model": self.info.id,
            "num_experts": self.info.num_experts,
            "exact": self.exact,
            "prompt_tokens": self.num_prompt,
            "tokens": [
                {"id": token.id, "text": token.text, "kind": kind, "experts": row}
                for token, kind, row in zip(
                    self.tokens, self.kinds, self.rows.tolist(), strict=True
                )
            ],
            "layers": layers,
        }


def token_kind(text: str) -> str:
    """Return the kind of a token, by its text and the space before it.

    A word begins after a space. Any other token with letters is a part of a word.
    """
    bare = text.strip()
    if not bare:
        return "line ends and spaces"
    if any(map(str.isdigit, bare)):
        return "numbers"
    if not any(map(str.isalpha, bare)):
        return "punctuation"
    if bare[0].isupper():
        return "capitals"
    return "words" if text[0].isspace() else "parts of words"


def _shares(counts: np.ndarray) -> np.ndarray:
    """Return counts [..., E] divided by their sums."""
    sums = counts.sum(axis=-1, keepdims=True)
    shares: np.ndarray = counts / np.maximum(sums, 1)
    return shares


def _entropy(shares: np.ndarray) -> np.ndarray:
    """Return the entropies in bits of shares [..., E]."""
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    entropies: np.ndarray = -(shares * logs).sum(axis=-1)
    return entropies


def _rounded(shares: np.ndarray) -> list[float]:
    return [round(float(share), 6) for share in shares]


MAX_NAMED = 160
"""The most tokens that have their texts under the picture."""
_DPI = 120
_DISTINCT = 20


def draw(explained: Explained, path: Path) -> None:
    """Write a picture: each token's first expert in each layer, and the experts' shares by layer.

    The format is that of the file's name. Raises ``OSError`` for a file that cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, num_experts = explained.info.moe_layers, explained.info.num_experts
    first = np.array([explained.first_experts(place) for place in range(len(layers))], dtype=float)
    num_tokens = len(explained.tokens)
    width = min(max(5.0, 1.0 + 0.16 * num_tokens), 40.0)
    height = 1.6 + 0.26 * len(layers)
    figure = Figure(figsize=(width + 4.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    tokens, shares = figure.subplots(1, 2, sharey=True, width_ratios=(width, 4.0))
    name = "tab20" if num_experts <= _DISTINCT else "turbo"
    colours = matplotlib.colormaps[name].resampled(num_experts)
    image = tokens.imshow(
        first, aspect="auto", cmap=colours, vmin=-0.5, vmax=num_experts - 0.5, interpolation="none"
    )
    tokens.set_title(f"{explained.info.id}: the first expert of each token", fontsize=10)
    tokens.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers], fontsize=8)
    if num_tokens <= MAX_NAMED:
        texts = [_label(token.text) for token in explained.tokens]
        tokens.set_xticks(range(num_tokens), texts, rotation=90, fontsize=7, family="monospace")
    if explained.num_prompt < num_tokens:
        tokens.axvline(explained.num_prompt - 0.5, color="black", linewidth=2)
    ticks = None if num_experts > _DISTINCT else range(num_experts)
    figure.colorbar(image, ax=tokens, label="expert", fraction=0.03, pad=0.01, ticks=ticks)
    heat = shares.imshow(
        100 * explained.shares, aspect="auto", cmap="Greys", vmin=0, interpolation="none"
    )
    per_token = explained.info.num_experts_per_tok
    shares.set_title(f"shares of all {per_token} experts of a token", fontsize=10)
    shares.set_xlabel("expert", fontsize=8)
    label = f"%; even is {100 / num_experts:.1f}"
    figure.colorbar(heat, ax=shares, label=label, fraction=0.06, pad=0.02)
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(path, dpi=_DPI, metadata=_metadata(path))


def _metadata(path: Path) -> dict[str, None]:
    """Return what leaves times and versions out of a file."""
    return {"Software": None} if path.suffix == ".png" else {"Date": None, "Creator": None}


def _label(text: str) -> str:
    """Return a token's text with visible spaces; a dollar sign begins no formula."""
    shown = text.replace("\n", "↵").replace("\t", "→").replace(" ", "␣")
    return printable(shown).replace("$", r"\$")
