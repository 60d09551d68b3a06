"""Turns texts into token ids: reads them, holds out blocks, trains a byte-level BPE tokenizer.

Two blank lines end a document. N: number of tokens, B: batch, L: sequence length.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from router.workshop.settings import TrainingError

BOS = "<s>"
EOS = "</s>"
BLOCK_CHARS = 4096

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


@dataclass(frozen=True)
class Corpus:
    """The documents of a run: for training, and held out by file name; hashes by file name too."""

    train_documents: list[str]
    heldout_documents: dict[str, list[str]]
    files: dict[str, str]


def read_corpus(paths: list[Path], holdout_every_blocks: int) -> Corpus:
    """Read UTF-8 texts and hold out every n-th block of about `BLOCK_CHARS` characters.

    Blocks end at line ends. Raises TrainingError for an unreadable or empty file, for a file too
    short to hold anything out, and for two files of the same name.
    """
    train: list[str] = []
    heldout: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    for path in paths:
        if path.name in files:
            raise TrainingError(
                f"{path}: another text is called {path.name} too; figures go by file name, so "
                "rename one of the texts"
            )
        text = _read_text(path)
        files[path.name] = hashlib.sha256(text.encode()).hexdigest()
        held: list[str] = []
        for index, block in enumerate(_blocks(text)):
            documents = held if index % holdout_every_blocks == holdout_every_blocks - 1 else train
            parts = re.split(r"\n{3,}", block.strip("\n"))
            documents.extend(part for part in parts if part.strip())
        if not held:
            raise TrainingError(
                f"{path}: the text is too short to hold any of it out: with holdout_every_blocks "
                f"{holdout_every_blocks} a file needs at least "
                f"{holdout_every_blocks * BLOCK_CHARS} characters, in lines"
            )
        heldout[path.name] = held
    return Corpus(train, heldout, files)


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


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise TrainingError(f"{path}: the text is empty; training needs at least one document")
    return text


def _blocks(text: str) -> list[str]:
    blocks: list[str] = []
    lines: list[str] = []
    size_chars = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size_chars += len(line)
        if size_chars >= BLOCK_CHARS:
            blocks.append("".join(lines))
            lines, size_chars = [], 0
    if lines:
        blocks.append("".join(lines))
    return blocks
