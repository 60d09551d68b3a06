"""What a model makes of held-out rows of text: its loss, and the experts of each token.

Dimension letters: T tokens, K experts of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.workshop_information import (
    KINDS,
    Choices,
    Label,
    Told,
    by_row,
    by_token,
    kind_of,
    told,
)
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from experts.checkpoint.checkpoint import Checkpoint
    from router.gateway.tokenizer import Tokenizer

Rows = Mapping[str, Sequence[Sequence[int]]]
"""Rows of token ids by language, each row begun as a served prompt is."""


def heldout_rows(
    checkpoint: Checkpoint, tokenizer: Tokenizer, text: Path, num_rows: int, length: int
) -> list[list[int]]:
    """Return rows of ``length`` tokens to predict, evenly spread over a text's held-out blocks.

    Raises ``ConfigError`` for a text that has fewer rows.
    """
    from router.workshop.folders.text import HOLDOUT_EVERY_BLOCKS
    from router.workshop.texts import Sequences, read_corpus

    [documents] = read_corpus([text], HOLDOUT_EVERY_BLOCKS).heldout_documents.values()
    end = checkpoint.config["eos_token_id"]
    ids = ([*tokenizer.encode(one, add_special_tokens=False), end] for one in documents)
    found = list(Sequences(tokenizer, checkpoint.vocab_size, length + 1).cut(ids, str(text)))
    if len(found) < num_rows:
        raise ConfigError(
            f"has {len(found)} held-out rows of {length} tokens; {num_rows} are needed", str(text)
        )
    places = np.linspace(0, len(found) - 1, num_rows).round().astype(int)
    return [found[place] for place in places]


def nats_by_language(checkpoint: Checkpoint, rows: Rows) -> dict[str, float]:
    """Return the loss of each language's rows, in nats a token."""
    from router.workshop.evaluate.local_model import FolderModel

    model = FolderModel(checkpoint, max(len(row) for some in rows.values() for row in some))
    nats = {}
    for language, some in rows.items():
        logprobs = np.concatenate([scored.logprobs for scored in model.score(some)])
        nats[language] = float(-logprobs.mean())
    return nats


@dataclass(frozen=True, slots=True)
class Observed:
    """The tokens of rows, without special ones: ids, rows and languages [T].

    ``experts`` has their experts [T, K] by layer.
    """

    ids: np.ndarray
    rows: np.ndarray
    languages: Label
    experts: dict[int, np.ndarray]
    num_experts: int

    def choices(self, layer_id: int) -> Choices:
        """Return the experts of a layer."""
        return Choices(self.experts[layer_id], self.num_experts)

    def only(self, chosen: np.ndarray) -> Observed:
        """Return the tokens where ``chosen`` [T] is true."""
        return Observed(
            self.ids[chosen],
            self.rows[chosen],
            Label(self.languages.values[chosen], self.languages.size),
            {layer_id: experts[chosen] for layer_id, experts in self.experts.items()},
            self.num_experts,
        )


def observe(checkpoint: Checkpoint, tokenizer: Tokenizer, rows: Rows) -> Observed:
    """Pass rows through the model and return their tokens with their experts."""
    from router.workshop.evaluate.local_model import FolderModel

    model = FolderModel(checkpoint, max(len(row) for some in rows.values() for row in some))
    ids: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    languages: list[np.ndarray] = []
    experts: dict[int, list[np.ndarray]] = {}
    for language, some in enumerate(rows.values()):
        for row, scored in zip(some, model.score(some), strict=True):
            tokens = np.array(row[:-1])  # the last one is only predicted
            numbers.append(np.full_like(tokens, len(ids)))
            languages.append(np.full_like(tokens, language))
            ids.append(tokens)
            for layer_id, chosen in scored.experts.items():
                experts.setdefault(layer_id, []).append(chosen)
    whole = Observed(
        np.concatenate(ids),
        np.concatenate(numbers),
        Label(np.concatenate(languages), len(rows)),
        {layer_id: np.concatenate(parts) for layer_id, parts in experts.items()},
        checkpoint.shape.num_experts,
    )
    return whole.only(~np.isin(whole.ids, list(tokenizer.skipped_ids)))


def in_all_languages(observed: Observed, least: int) -> np.ndarray:
    """Return which tokens [T] are of an id that each language has ``least`` times or more."""
    size = int(observed.ids.max()) + 1
    cells = observed.languages.values * size + observed.ids
    counts = np.bincount(cells, minlength=observed.languages.size * size).reshape(-1, size)
    is_shared = np.asarray(counts.min(axis=0) >= least)
    return is_shared[observed.ids]


def kinds_of(observed: Observed, tokenizer: Tokenizer) -> Label:
    """Return each token's kind, as an index in ``KINDS``."""
    known = {int(one): KINDS.index(kind_of(tokenizer.decode([one]))) for one in set(observed.ids)}
    return Label(np.array([known[one] for one in observed.ids.tolist()]), len(KINDS))


def specialisation(
    observed: Observed, tokenizer: Tokenizer, languages: Sequence[str], rounds: int, least: int
) -> dict[str, Any]:
    """Return, as JSON, what the experts of each layer have to do with kinds and languages.

    ``kinds`` and ``languages`` of a layer are each expert's share of their assignments; ``told`` is
    what :func:`label_information` says. ``shared`` tells of the tokens of all languages, and
    ``kinds`` each kind's share of the text. Raises ``ConfigError`` where no token is of all.
    """
    kinds = kinds_of(observed, tokenizer)
    shared = in_all_languages(observed, least)
    if not shared.any():
        raise ConfigError(f"no token is {least} times or more in each of {', '.join(languages)}")
    common = observed.only(shared)
    common_ids = sorted(set(common.ids.tolist()))
    layers = []
    for layer_id in observed.experts:
        choices = observed.choices(layer_id)
        labels = label_information(observed, kinds, common, layer_id, rounds)
        layers.append(
            {
                "layer": layer_id,
                "kinds": _shares(kinds, KINDS, choices),
                "languages": _shares(observed.languages, languages, choices),
                "told": {name: asdict(one) | {"share": one.share} for name, one in labels.items()},
            }
        )
    return {
        "num_experts": observed.num_experts,
        "tokens": len(observed.ids),
        "shared": {
            "tokens": [tokenizer.decode([one]) for one in common_ids],
            "share": float(shared.mean()),
        },
        "kinds": {kind: float((kinds.values == index).mean()) for index, kind in enumerate(KINDS)},
        "layers": layers,
    }


def label_information(
    observed: Observed, kinds: Label, common: Observed, layer_id: int, rounds: int
) -> dict[str, Told]:
    """Return what each label tells of a layer's experts; ``common`` are tokens of all languages.

    Languages are shuffled by rows, kinds and tokens by tokens.
    """
    every, some = observed.choices(layer_id), common.choices(layer_id)
    languages, common_languages = observed.languages, common.languages
    by_rows, by_common_rows = (
        by_row(languages, observed.rows),
        by_row(common_languages, common.rows),
    )
    _, places = np.unique(common.ids, return_inverse=True)
    tokens = Label(places, int(places.max()) + 1)
    return {
        "kind": told(every, kinds, by_token(kinds), rounds),
        "language": told(every, languages, by_rows, rounds),
        "kind, language known": told(every, kinds, by_token(kinds, languages), rounds, languages),
        "language, kind known": told(every, languages, by_rows, rounds, kinds),
        "token": told(some, tokens, by_token(tokens), rounds),
        "language of these tokens": told(some, common_languages, by_common_rows, rounds),
        "language, token known": told(some, common_languages, by_common_rows, rounds, tokens),
    }


def _shares(label: Label, names: Sequence[str], choices: Choices) -> dict[str, list[float]]:
    [counts] = choices.counts(label, Label(np.zeros_like(label.values), 1))
    return {
        name: (row / row.sum()).tolist()
        for name, row in zip(names, counts, strict=True)
        if row.any()
    }
