"""Measures how well a model predicts held-out text, and how evenly it uses its experts.

The experts of a token are the experts at its input position.
L: sequence length, V: vocabulary size.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import MixtralForCausalLM

from workshop.evaluate.perplexity import TextTally
from workshop.evaluate.scores import Scored
from workshop.train.corpus import windows
from workshop.train.settings import TrainingError

EVALUATION_BATCH = 16


def unigram_nats(train: torch.Tensor, heldout: torch.Tensor, vocab_size: int) -> float:
    """Return the nats of held-out ids under the counts of the V training ids, each plus one."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    log_probabilities = (counts / counts.sum()).log()
    return -log_probabilities[heldout].sum().item()


def score(
    model: MixtralForCausalLM, heldout: Mapping[str, torch.Tensor], sequence_length: int
) -> dict[str, TextTally]:
    """Score each text's held-out ids in whole windows of L without overlap, each after bos.

    Raises TrainingError when a text is shorter than a window.
    """
    model.eval()
    tallies = {}
    for name, tokens in heldout.items():
        starts = torch.arange(0, len(tokens) - sequence_length + 1, sequence_length)
        if not len(starts):
            raise TrainingError(
                f"{name}: {len(tokens)} held-out tokens are fewer than sequence_length "
                f"{sequence_length}; give more text or a smaller holdout_every_blocks"
            )
        tallies[name] = TextTally(model.config.num_local_experts)
        for batch in starts.split(EVALUATION_BATCH):
            inputs, targets = windows(tokens, batch, sequence_length, model.config.bos_token_id)
            tallies[name].add(_scored(model, inputs, targets))
    return tallies


@torch.inference_mode()
def _scored(model: MixtralForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> Scored:
    chosen: list[np.ndarray] = []  # of the layers, in their order

    def keep(_gate: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        chosen.append(output[2].numpy())

    with ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.enter_context(layer.mlp.gate.register_forward_hook(keep))
        logits = model(input_ids=inputs, use_cache=False).logits
    logprobs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).flatten()
    return Scored(logprobs.numpy(), dict(enumerate(chosen)))
