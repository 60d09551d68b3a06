"""Turns texts into token ids, by a tokenizer that it trains, and scores held-out ids.

N: number of tokens, B: batch, L: sequence length, V: vocabulary size.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

from workshop.evaluate.perplexity import Scored, TextTally
from workshop.train.settings import TrainingError

BOS = "<s>"
EOS = "</s>"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "Assistant: {{ message['content'] }}{{ eos_token }}\n"
    "{% else %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with bos, eos and a chat template.

    Any text round-trips, since all 256 bytes are in the vocabulary. Raises TrainingError when
    `vocab_size` is more than the text's distinct pairs allow, or less than the bytes need.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + 2
    if vocab_size < least:
        raise TrainingError(f"vocab_size {vocab_size} must be at least {least}: bytes, bos, eos")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise TrainingError(
            f"vocab_size {vocab_size} is more than the text yields; "
            f"at most {tokenizer.get_vocab_size()}"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Return the ids of all documents in a row, each followed by eos: int64 [N]."""
    ids: list[int] = []
    for encoded in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids.extend(encoded)
        ids.append(int(tokenizer.eos_token_id))
    return torch.tensor(ids, dtype=torch.int64)


def windows(
    tokens: torch.Tensor, starts: torch.Tensor, sequence_length: int, bos_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut inputs and next-token targets, both int64 [B, L], at `starts` [B] in `tokens` [N].

    Each input begins with bos, as a served prompt does.
    """
    targets = tokens[starts[:, None] + torch.arange(sequence_length)]
    bos = torch.full((len(starts), 1), bos_token_id, dtype=torch.int64)
    return torch.cat([bos, targets[:, :-1]], dim=1), targets


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
