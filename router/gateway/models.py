"""A model as the gateway knows it: its numbers and its tokenizer, no weights."""

from __future__ import annotations

from dataclasses import dataclass

from experts.checkpoint import resolve_folder
from router.gateway.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class GatewayModel:
    """What clients may ask of a served model, and where its tokenizer lies.

    ``path`` is the configured one; the tokenizer's files lie in its folder. ``max_model_len``
    bounds prompt plus output, in tokens. ``eos_token_ids`` end a choice and never show in its text.
    """

    id: str
    path: str
    family: str
    num_layers: int
    num_experts: int
    num_experts_per_tok: int
    vocab_size: int
    max_model_len: int
    dtype: str
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model and its loaded tokenizer."""

    info: GatewayModel
    tokenizer: Tokenizer


def load_models(models: tuple[GatewayModel, ...]) -> dict[str, ServedModel]:
    """Load the tokenizer of each model; returns them by id, in the given order."""
    return {m.id: ServedModel(m, _tokenizer(m)) for m in models}


def _tokenizer(model: GatewayModel) -> Tokenizer:
    return Tokenizer.load(str(resolve_folder(model.path)), model.eos_token_ids)
