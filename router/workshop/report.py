"""Figures of a trained model, and the files that tell them: training.json and the model card.

L: sequence length, V: vocabulary size, E: experts.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from rich.table import Table
from torch import nn
from transformers import MixtralForCausalLM

from router.workshop.corpus import windows
from router.workshop.settings import TrainingConfig, TrainingError

EVALUATION_BATCH = 16


class Figures(BaseModel):
    """What a run achieved; perplexities are per token of the held-out text."""

    heldout_tokens: int
    heldout_perplexity: float
    unigram_perplexity: float
    expert_shares: list[list[float]]
    training_tokens: int
    distinct_training_tokens: int
    tokens_per_s: float
    training_s: float
    num_parameters: int


def unigram_perplexity(train: torch.Tensor, heldout: torch.Tensor, vocab_size: int) -> float:
    """Perplexity of held-out ids under the training counts, each plus one (V kinds of token)."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    log_probabilities = (counts / counts.sum()).log()
    return math.exp(-log_probabilities[heldout].mean().item())


def evaluate(
    model: MixtralForCausalLM, heldout: torch.Tensor, sequence_length: int
) -> tuple[int, float, list[list[float]]]:
    """Return (tokens scored, perplexity, share of assignments per layer [layers][E]).

    Scores whole windows of L tokens that do not overlap, each after bos. Raises TrainingError
    when the held-out stream has not one such window.
    """
    starts = torch.arange(0, len(heldout) - sequence_length + 1, sequence_length)
    if not len(starts):
        raise TrainingError(
            f"{len(heldout)} held-out tokens are fewer than sequence_length {sequence_length}; "
            "give more text or a smaller holdout_every_blocks"
        )
    layers = model.model.layers
    counts = torch.zeros(len(layers), model.config.num_local_experts, dtype=torch.int64)
    handles = [
        layer.mlp.gate.register_forward_hook(_counter(counts[layer_id]))
        for layer_id, layer in enumerate(layers)
    ]
    model.eval()
    nats = 0.0
    with torch.inference_mode():
        for batch in starts.split(EVALUATION_BATCH):
            inputs, targets = windows(heldout, batch, sequence_length, model.config.bos_token_id)
            logits = model(input_ids=inputs, use_cache=False).logits
            nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    for handle in handles:
        handle.remove()
    num_tokens = len(starts) * sequence_length
    shares = counts / counts.sum(dim=1, keepdim=True)
    return num_tokens, math.exp(nats / num_tokens), shares.tolist()


def shares_table(expert_shares: list[list[float]]) -> Table:
    """Lay out the share of assignments per layer and expert for a terminal."""
    table = Table(title="Share of held-out tokens' assignments, %")
    table.add_column("layer", justify="right")
    for expert_id in range(len(expert_shares[0])):
        table.add_column(f"expert {expert_id}", justify="right")
    for layer_id, row in enumerate(expert_shares):
        table.add_row(str(layer_id), *(f"{100 * share:.1f}" for share in row))
    return table


def training_json(config: TrainingConfig, files: dict[str, str], figures: Figures) -> str:
    """Return the text of training.json: configuration, hash of each text, figures."""
    record: dict[str, Any] = {
        "config": config.model_dump(),
        "text_sha256": files,
        "figures": figures.model_dump(),
    }
    return json.dumps(record, indent=2) + "\n"


def model_card(config: TrainingConfig, files: dict[str, str], figures: Figures) -> str:
    """Return the model card: what it is, how good it is, and the commands that make it again."""
    model, run = config.model, config.optimization
    hashes = "\n".join(f"- `{name}`: sha256 `{digest}`" for name, digest in files.items())
    shares = "\n".join(
        f"| {layer_id} | " + " | ".join(f"{100 * share:.1f}" for share in row) + " |"
        for layer_id, row in enumerate(figures.expert_shares)
    )
    experts = range(model.num_local_experts)
    return f"""# {config.card.name}

A small Mixtral-format Mixture-of-Experts language model, for trying and testing ExpertMesh.
It comes from a first, brief training on one CPU thread: it writes the style of its text, and it
knows nothing. It has not been tuned to follow instructions or to chat.

{figures.num_parameters:,} parameters in fp32: {model.num_hidden_layers} layers, \
{model.num_local_experts} experts each, {model.num_experts_per_tok} to a token; hidden size \
{model.hidden_size}, expert size {model.intermediate_size}, vocabulary {model.vocab_size} \
(byte-level BPE), tied embeddings. Trained on sequences of {run.sequence_length} tokens; text gets \
worse beyond that length.

## Text

{config.card.text.strip()}

{hashes}

## Figures

| On {figures.heldout_tokens:,} held-out tokens | Perplexity per token |
|---|---|
| this model | {figures.heldout_perplexity:.2f} |
| unigram counts of the training text | {figures.unigram_perplexity:.2f} |

Share of the held-out tokens' expert assignments, in %:

| Layer | {" | ".join(f"Expert {expert_id}" for expert_id in experts)} |
|---|{"---|" * len(experts)}
{shares}

{_recipe(config, list(files), figures)}"""


def _recipe(config: TrainingConfig, file_names: list[str], figures: Figures) -> str:
    run = config.optimization
    texts = " ".join(f"--text {name}" for name in file_names)
    gating = "noisy top-k gating" if config.gating.noisy else "top-k gating without noise"
    return f"""## Recipe

{run.steps} steps of {run.batch_size} sequences of {run.sequence_length} tokens: \
{figures.training_tokens:,} tokens seen, of {figures.distinct_training_tokens:,} in the text. \
AdamW, learning rate {run.learning_rate:g} after {run.warmup_steps} steps of warm-up, then along \
a cosine to {run.final_learning_rate:g}; {gating}, importance loss \
{config.gating.importance_weight:g}, load loss {config.gating.load_weight:g} (Shazeer et al. \
2017); seed {config.seed}. It took {figures.training_s / 60:.0f} minutes at \
{figures.tokens_per_s:,.0f} tokens/s. When serving, the gate is plain top-k.

```sh
{config.card.text_commands.strip()}
python -m router.workshop.train train.yaml {texts} --out {config.card.name}
```
"""


def _counter(counts: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def count(_gate: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        topk_ids = output[2]
        counts.add_(torch.bincount(topk_ids.flatten(), minlength=len(counts)))

    return count
