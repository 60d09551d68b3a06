"""A model in a gateway: its description and its tokenizer, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.errors import CheckpointError
from experts.checkpoint.folder import language_model
from experts.checkpoint.identity import text_identity
from experts.checkpoint.remote.remote_files import open_model
from experts.checkpoint.remote.remote_reader import RayNeighbours
from router.gateway.input.tokenizer import Tokenizer
from router.served import ServedModel


@dataclass(frozen=True, slots=True)
class GatewayModel:
    """A served model and its loaded tokenizer."""

    info: ServedModel
    tokenizer: Tokenizer


def load_models(models: tuple[ServedModel, ...]) -> dict[str, GatewayModel]:
    """Load the tokenizer of each model; returns them by id, in the given order."""
    return {model.id: GatewayModel(model, load_tokenizer(model)) for model in models}


def load_tokenizer(model: ServedModel) -> Tokenizer:
    """Load a model's tokenizer; raises :class:`CheckpointError` where its files are others.

    The identity of the weights does not cover them.
    """
    opened = open_model(model.path, model.source.identity, RayNeighbours())
    checkpoint = language_model(opened)
    if model.text_identity and text_identity(checkpoint) != model.text_identity:
        raise CheckpointError(
            "its tokenizer, chat template or generation_config.json differ from those of the "
            "served checkpoint; deploy again",
            str(checkpoint.folder),
        )
    if checkpoint.remote is None:
        return Tokenizer.load(str(checkpoint.folder), model.eos_token_ids)
    with TemporaryDirectory(prefix="expertmesh-") as folder:
        for name, data in checkpoint.remote.small_files.items():
            (Path(folder) / name).write_bytes(data)
        checkpoint.remote.release()
        return Tokenizer.load(folder, model.eos_token_ids)
