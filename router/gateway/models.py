"""A model as the gateway knows it: its numbers and its tokenizer, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from experts.checkpoint.remote_files import open_model
from experts.checkpoint.remote_reader import RayNeighbours
from router.gateway.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class GatewayModel:
    """What clients may ask of a served model, and where its tokenizer lies.

    ``path`` is the configured one; the tokenizer's files lie in its folder, here or on another
    node, beside the weights of this ``identity``. ``max_model_len`` bounds prompt plus output, in
    tokens. ``eos_token_ids`` end a choice and never show in its text.
    """

    id: str
    path: str
    identity: str
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
    checkpoint = open_model(model.path, model.identity, RayNeighbours())
    if checkpoint.remote is None:
        return Tokenizer.load(str(checkpoint.folder), model.eos_token_ids)
    with TemporaryDirectory(prefix="expertmesh-") as folder:
        for name, data in checkpoint.remote.small_files.items():
            (Path(folder) / name).write_bytes(data)
        checkpoint.remote.release()
        return Tokenizer.load(folder, model.eos_token_ids)
