"""A training run, from texts to a checkpoint with its figures.

The same configuration and texts give the same weights, bit by bit, on one thread and one build of
torch. A resumed run gives them too, since each random number is a function of (seed, step).
The folder of a run is checked first, and gets the checkpoint at the end.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerFast

from workshop.evaluate.perplexity import together
from workshop.texts import Corpus, read_corpus
from workshop.train.corpus import encode_documents, score, train_tokenizer, unigram_nats
from workshop.train.gating import use_serving_gates
from workshop.train.origin import Origin
from workshop.train.report import (
    RECORD_FILE,
    Figures,
    OriginFigures,
    Record,
    SourceFigures,
    model_card,
    num_active_parameters,
    read_beside,
)
from workshop.train.settings import DenseSize, TrainingConfig, TrainingError, TrainingFailedError
from workshop.train.trainer import STATE_FILE, StepReport, Trainer, build_model


class StoppedError(Exception):
    """The watcher stopped a run; `steps_done` are saved."""

    def __init__(self, steps_done: int) -> None:
        super().__init__(steps_done)
        self.steps_done = steps_done


@dataclass(frozen=True)
class Watcher:
    """The callbacks of a run: at each phase, after each step, and to stop it between steps."""

    on_phase: Callable[[str], None] = lambda phase: None
    on_step: Callable[[StepReport], None] = lambda report: None
    should_stop: Callable[[], bool] = lambda: False


def train(
    config: TrainingConfig,
    text_paths: Sequence[Path],
    out: Path,
    *,
    resume: bool = False,
    dense: DenseSize | None = None,
    beside: Sequence[Path] = (),
    origin: Origin | None = None,
    watcher: Watcher | None = None,
) -> Record:
    """Train on the texts and leave a checkpoint, training.json and card in `out`.

    `dense` trains the configuration's dense model instead. `beside` are folders of finished dense
    runs to compare with. `origin` is a model of the configuration's sizes at which the run starts,
    with its tokenizer; without one a new model is trained. `resume` continues a run that ended
    early, from its last saved state. Raises ConfigError for wrong settings or texts, before the
    first step or at the evaluation; TrainingFailedError when the run fails; StoppedError when the
    watcher stops it.
    """
    watcher = watcher or Watcher()
    if dense and beside:
        raise TrainingError(
            "a dense run compares with no other runs; leave out --dense or --beside"
        )
    if origin is not None and (dense or beside):
        raise TrainingError(
            "a run that starts from a model has no dense runs; leave out --dense and --beside"
        )
    if dense:
        config = config.as_dense(dense)
    check_out(out, resume=resume)
    watcher.on_phase("reading")
    corpus = read_corpus(list(text_paths), config.holdout_every_blocks)
    figures_beside = read_beside(beside, config, corpus.files)
    if origin is None:
        tokenizer = train_tokenizer(corpus.train_documents, config.model.vocab_size)
        model = build_model(config.model, tokenizer, config.seed)
    else:
        tokenizer, model = origin.tokenizer, origin.model()
    tokens = encode_documents(tokenizer, corpus.train_documents)
    sequence_length = config.optimization.sequence_length
    if len(tokens) < sequence_length:
        raise TrainingError(
            f"{len(tokens)} training tokens are fewer than sequence_length {sequence_length}"
        )
    heldout = {
        name: encode_documents(tokenizer, documents)
        for name, documents in corpus.heldout_documents.items()
    }
    origin_figures = None
    if origin is not None:
        watcher.on_phase("evaluating --from")
        before = score(model, heldout, sequence_length)
        origin_figures = OriginFigures(
            name=origin.folder.resolve().name,
            identity=origin.identity,
            heldout_perplexity=together([*before.values()]).perplexity,
        )
    trainer = Trainer(config, model, tokens, _fingerprint(config, corpus, origin))
    if resume:
        trainer.load(out)
    make_out(out, trainer.num_parameters)
    watcher.on_phase("training")
    _run(trainer, out, watcher)
    watcher.on_phase("evaluating")
    record = Record(
        config=config,
        dense=dense,
        origin=origin_figures,
        text_sha256=corpus.files,
        figures=_figures(trainer, heldout),
        beside=figures_beside,
    )
    write_checkpoint(trainer, tokenizer, record, out)
    return record


def _run(trainer: Trainer, out: Path, watcher: Watcher) -> None:
    """Take the remaining steps; save the state after the last step too."""
    settings = trainer.config.optimization
    while trainer.steps_done < settings.steps:
        report = trainer.step()
        should_stop = watcher.should_stop()
        is_last = report.steps_done == settings.steps
        if should_stop or is_last or report.steps_done % settings.checkpoint_every_steps == 0:
            trainer.save(out)
        watcher.on_step(report)
        if should_stop:
            raise StoppedError(report.steps_done)


def _fingerprint(config: TrainingConfig, corpus: Corpus, origin: Origin | None) -> str:
    # Without the card: it changes no weight, so its text may change between stop and resume.
    parts: list[object] = [config.recipe(), corpus.files]
    if origin is not None:
        parts.append(origin.identity)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _figures(trainer: Trainer, heldout: dict[str, torch.Tensor]) -> Figures:
    config, settings = trainer.config, trainer.config.optimization
    use_serving_gates(trainer.model)
    tallies = score(trainer.model, heldout, settings.sequence_length)
    texts = {name: tally.figures() for name, tally in tallies.items()}
    whole = together([*tallies.values()])
    unigram = {
        name: unigram_nats(trainer.tokens, heldout[name][: text.tokens], config.model.vocab_size)
        for name, text in texts.items()
    }
    training_tokens = settings.steps * settings.batch_size * settings.sequence_length
    return Figures(
        heldout_tokens=whole.tokens,
        heldout_perplexity=whole.perplexity,
        unigram_perplexity=math.exp(sum(unigram.values()) / whole.tokens),
        sources={
            name: SourceFigures(
                heldout_tokens=text.tokens,
                perplexity=text.perplexity,
                unigram_perplexity=math.exp(unigram[name] / text.tokens),
            )
            for name, text in texts.items()
        },
        expert_shares=[layer.shares for layer in whole.experts],
        training_tokens=training_tokens,
        distinct_training_tokens=len(trainer.tokens),
        tokens_per_s=training_tokens / trainer.elapsed_s,
        training_s=trainer.elapsed_s,
        num_parameters=trainer.num_parameters,
        num_active_parameters=num_active_parameters(trainer.num_parameters, config.model),
    )


CARD_FILE = "README.md"
_STAGING = ".checkpoint.tmp"
_LEFTOVERS = {_STAGING, f".{STATE_FILE}.tmp"}
_BYTES_PER_PARAMETER = 4 * (2 * 3 + 1)
"""fp32 values: the old and the new training state (weight, two moments each); a checkpoint."""


def check_out(out: Path, *, resume: bool) -> None:
    """Raise TrainingError unless `out` holds a state to resume or, without `resume`, no files."""
    state = out / STATE_FILE
    if resume:
        if not state.exists():
            raise TrainingError(f"{state}: nothing to resume; leave --resume out to begin a run")
        return
    if not out.exists():
        return
    if not out.is_dir():
        raise TrainingError(f"{out}: is a file; --out must name a folder, new or empty")
    if state.exists():
        raise TrainingError(
            f"{state}: holds an unfinished run; give --resume, another --out, or delete it"
        )
    files = sorted(path.name for path in out.iterdir() if path.name not in _LEFTOVERS)
    if files:
        raise TrainingError(
            f"{out}: holds other files ({', '.join(files[:3])}); --out must be new or empty"
        )


def make_out(out: Path, num_parameters: int) -> None:
    """Make the folder; raise TrainingFailedError when that fails or the disk has no room."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(out).free
    except OSError as error:
        raise TrainingFailedError(
            f"{out}: cannot be made: {error.strerror}; name a folder that you can write to"
        ) from error
    needed_bytes = num_parameters * _BYTES_PER_PARAMETER
    if free_bytes < needed_bytes:
        raise TrainingFailedError(
            f"{out}: {free_bytes / 1e6:,.0f} MB are free on its disk, and training needs "
            f"{needed_bytes / 1e6:,.0f} MB; make room or name another --out"
        )


def write_checkpoint(
    trainer: Trainer, tokenizer: PreTrainedTokenizerFast, record: Record, out: Path
) -> None:
    """Write model, tokenizer, training.json and card into `out`, each file atomically.

    The training state is deleted last, so that an interrupted run can resume. Raises
    TrainingFailedError when a write fails; the state stays then.
    """
    staging = out / _STAGING
    try:
        _stage(trainer, tokenizer, record, staging)
        for path in sorted(staging.iterdir()):
            path.replace(out / path.name)
        (out / STATE_FILE).unlink()
    except OSError as error:
        raise TrainingFailedError(
            f"{out}: the checkpoint cannot be written: {error}; "
            "the training state is kept: make room, then give --resume"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _stage(
    trainer: Trainer, tokenizer: PreTrainedTokenizerFast, record: Record, staging: Path
) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    model = trainer.model
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.eos_token_id,
    )
    try:
        model.save_pretrained(staging)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(staging)
    (staging / CARD_FILE).write_text(model_card(record), encoding="utf-8")
    (staging / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
