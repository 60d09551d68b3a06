"""Checks and makes the folder of a run, and writes the checkpoint into it at the end."""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerFast

from workshop.train.report import RECORD_FILE, Record, model_card
from workshop.train.settings import TrainingError, TrainingFailedError
from workshop.train.state import STATE_FILE
from workshop.train.trainer import Trainer

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
