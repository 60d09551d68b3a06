"""The model at which a training run starts: a folder with a Mixtral-format checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, MixtralForCausalLM, PreTrainedTokenizerFast

from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.identity import identity_of
from workshop.train.settings import ModelSettings, TrainingError


@dataclass(frozen=True)
class Origin:
    """A model to train further: its sizes, its tokenizer, and the identity of its weights."""

    folder: Path
    identity: str
    sizes: ModelSettings
    tokenizer: PreTrainedTokenizerFast

    def model(self) -> MixtralForCausalLM:
        """Return the model in fp32; raises TrainingError where tensors are missing or too many."""
        try:
            model, loaded = MixtralForCausalLM.from_pretrained(
                self.folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise TrainingError(f"{self.folder}: cannot be loaded: {error}") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, loaded[kind])):
                raise TrainingError(
                    f"{self.folder}: {kind.replace('_', ' ')}: {', '.join(names[:3])}; "
                    "the folder must hold a whole Mixtral model"
                )
        if not isinstance(model, MixtralForCausalLM):
            raise TrainingError(f"{self.folder}: holds a {type(model).__name__}, not a Mixtral")
        return model


def open_origin(folder: Path) -> Origin:
    """Return the model in a folder: one that was trained, pruned or merged, or any plain Mixtral.

    Raises TrainingError for a folder without a checkpoint, and for a model that cannot be trained
    further: of another family than Mixtral, quantised, or with a tokenizer that does not fit.
    """
    try:
        checkpoint = open_checkpoint(folder)
        identity = identity_of(checkpoint)
    except CheckpointError as error:
        raise TrainingError(str(error)) from error
    config = checkpoint.config
    family = config.get("model_type")
    if family != "mixtral":
        raise TrainingError(f"{folder}: only mixtral models can be trained further; got {family!r}")
    if config.get("quantization_config") is not None:
        raise TrainingError(
            f"{folder}: the weights are quantised; `expertmesh convert` makes plain ones"
        )
    sizes = _sizes(folder, config)
    return Origin(folder, identity, sizes, _tokenizer(folder, sizes.vocab_size))


def _sizes(folder: Path, config: dict[str, Any]) -> ModelSettings:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = {**config, "rope_theta": rope.get("rope_theta", config.get("rope_theta", 1e6))}
    try:
        return ModelSettings.model_validate(
            {name: given.get(name) for name in ModelSettings.model_fields}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise TrainingError(
            f"{folder / 'config.json'}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        ) from error


def _tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise TrainingError(f"{path}: is missing; training needs the model's own tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises nothing more specific
        raise TrainingError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise TrainingError(f"{folder}: the tokenizer must have a bos and an eos token")
    if len(tokenizer) > vocab_size:
        raise TrainingError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, and the model {vocab_size}"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TrainingError(f"{path}: must be a tokenizer of the library tokenizers")
    return tokenizer
