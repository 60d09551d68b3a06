"""Turns the documents of texts into token ids, by a byte-level BPE tokenizer that it trains.

N: number of tokens, B: batch, L: sequence length.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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
