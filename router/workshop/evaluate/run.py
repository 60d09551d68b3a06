"""An evaluation: a folder or a served model, on texts and multiple-choice questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cluster.errors import CheckpointError, ConfigError
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.folder import language_model, open_folder
from router.client import Client
from router.gateway.tokenizer import Tokenizer
from router.workshop.evaluate.choices import (
    DELIMITER,
    ChoiceFigures,
    Continuation,
    Question,
    continuations,
    read_questions,
    score_choices,
)
from router.workshop.evaluate.local_model import FolderModel
from router.workshop.evaluate.perplexity import TextFigures, TextTally, together
from router.workshop.evaluate.scores import Ids, Scorer
from router.workshop.evaluate.served_model import ServedModel
from router.workshop.texts import Sequences, beginning, read_blocks

DEFAULT_LENGTH = 512
BLOCK_CHARS, AS_IT_IS = 1 << 16, ""
"""The characters of a text that are tokens at once, and how its line ends are read."""
Questions = Mapping[Path, Sequence[Question]]


@dataclass(frozen=True, slots=True)
class Task:
    """What is evaluated: texts and files of questions, at least one of both.

    ``length`` is that of a sequence of text in tokens; without it, it is :data:`DEFAULT_LENGTH` or
    the model's context where that is less.
    """

    texts: Sequence[Path]
    questions: Sequence[Path]
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """A served model: its gateway's address, its id or nothing, and a request's deadline.

    ``api_key`` is the key to show; by default the client's own.
    """

    address: str
    model: str
    timeout_s: float
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of a task, by file name; ``all_texts`` are those of all texts together."""

    model: str
    sequence_length: int
    all_texts: TextFigures | None
    texts: dict[str, TextFigures]
    questions: dict[str, ChoiceFigures]


OnProgress = Callable[[str, int, int], None]
"""Takes a file's name, how much of it is done since the last call, and how much it is: bytes of a
text, or questions."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A model before it is loaded."""

    name: str
    vocab_size: int
    context: int
    num_experts: int
    load: Callable[[int], Scorer]
    """Returns the model for prompts of at most so many tokens."""


def evaluate(folder: Path, task: Task, served: Served | None, on: OnProgress) -> Evaluation:
    """Evaluate the model in a folder, or a ``served`` one with the tokenizer of the folder.

    Everything but the texts is checked before the model is loaded. Raises ``ConfigError`` and
    :class:`CheckpointError` for what is wrong with files and options, and what the client raises.
    """
    _check_names([*task.texts, *task.questions])
    asked = {path: read_questions(path) for path in task.questions}
    if served is None:
        checkpoint = _checkpoint(folder)
        return _evaluate(task, asked, Tokenizer.load(str(folder)), _of_folder(checkpoint), on)
    tokenizer = Tokenizer.load(str(folder))
    with Client(served.address, api_key=served.api_key) as client:
        model = ServedModel(client, served.model, served.timeout_s)
        if sample := _sample(task, asked):
            model.check_tokenizer(tokenizer, sample, str(folder))
        return _evaluate(task, asked, tokenizer, _of_server(model), on)


def _evaluate(
    task: Task, asked: Questions, tokenizer: Tokenizer, target: _Target, on: OnProgress
) -> Evaluation:
    length = _length(task, target, tokenizer)
    choices = {
        path: continuations(questions, tokenizer, target.vocab_size, target.context)
        for path, questions in asked.items()
    }
    scorer = target.load(_longest(length if task.texts else 0, choices.values()))
    sequences = Sequences(tokenizer, target.vocab_size, length)
    tallies = {}
    for path in task.texts:
        cut = sequences.cut(_ids(path, tokenizer, on), str(path))
        tallies[path.name] = _tally(cut, scorer, target)
    return Evaluation(
        target.name,
        length,
        together(tallies.values(), target.num_experts) if tallies else None,
        {name: tally.figures() for name, tally in tallies.items()},
        {
            path.name: _choices(path, questions, choices[path], scorer, on)
            for path, questions in asked.items()
        },
    )


def _check_names(paths: Sequence[Path]) -> None:
    if not paths:
        raise ConfigError("give at least one --text or --choices")
    for number, path in enumerate(paths):
        if path.name in {other.name for other in paths[:number]}:
            raise ConfigError("figures go by file name, and another file has it too", str(path))


def _checkpoint(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError("is no folder", str(folder))
    return language_model(open_folder(folder))


def _sample(task: Task, asked: Questions) -> str:
    """Return some of what is evaluated."""
    if task.texts:
        return next(_blocks(task.texts[0]), "")
    question = asked[task.questions[0]][0]
    return question.context + DELIMITER + question.choices[0]


def _of_folder(checkpoint: Checkpoint) -> _Target:
    return _Target(
        str(checkpoint.folder),
        checkpoint.vocab_size,
        checkpoint.max_position_embeddings,
        checkpoint.shape.num_experts,
        partial(FolderModel, checkpoint),
    )


def _of_server(model: ServedModel) -> _Target:
    info = model.info
    return _Target(
        info.id, info.vocab_size, info.max_model_len, info.num_experts, lambda longest: model
    )


def _length(task: Task, target: _Target, tokenizer: Tokenizer) -> int:
    least, most = max(2, len(beginning(tokenizer)) + 1), target.context
    length = min(DEFAULT_LENGTH, most) if task.length is None else task.length
    if not least <= length <= most:
        raise ConfigError(f"given {length}, must be from {least} to {most}", "--sequence-length")
    return length


def _longest(length: int, choices: Iterable[list[list[Continuation]]]) -> int:
    lengths = (len(each.ids) for asked in choices for question in asked for each in question)
    return max(length, max(lengths, default=0))


def _blocks(path: Path) -> Iterator[str]:
    return read_blocks(path, BLOCK_CHARS, AS_IT_IS)


def _ids(path: Path, tokenizer: Tokenizer, on: OnProgress) -> Iterator[list[int]]:
    """Yield the ids of a text, a block at a time, as it is read."""
    size = path.stat().st_size if path.is_file() else 0
    for block in _blocks(path):
        yield tokenizer.encode(block, add_special_tokens=False)
        on(path.name, len(block.encode()), size)


def _tally(sequences: Iterable[Ids], scorer: Scorer, target: _Target) -> TextTally:
    tally = TextTally(target.num_experts)
    for scored in scorer.score(sequences):
        tally.add(scored)
    return tally


def _choices(
    path: Path,
    questions: Sequence[Question],
    asked: Sequence[Sequence[Continuation]],
    scorer: Scorer,
    on: OnProgress,
) -> ChoiceFigures:
    return score_choices(questions, asked, scorer, lambda: on(path.name, 1, len(questions)))
