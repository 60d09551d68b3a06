"""Train a small Mixtral-format model: `python -m router.workshop.train CONFIG --text F --out DIR`.

The same configuration and text give the same weights, bit by bit, on one thread and one build of
torch; also when the run is broken off and resumed, since every random number is a function of
(seed, step).
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from router.workshop.balance import use_serving_gates
from router.workshop.corpus import Corpus, encode_documents, read_corpus, train_tokenizer
from router.workshop.report import (
    Figures,
    evaluate,
    model_card,
    shares_table,
    training_json,
    unigram_perplexity,
)
from router.workshop.settings import TrainingConfig, TrainingError, load_config
from router.workshop.state import STATE_FILE
from router.workshop.trainer import StepReport, Trainer


def train(
    config: TrainingConfig,
    text_paths: list[Path],
    out: Path,
    *,
    resume: bool,
    on_step: Callable[[StepReport], None],
) -> Figures:
    """Train on the texts and leave a checkpoint, training.json and README.md in `out`.

    `on_step` hears of every step; what it raises ends the run, which `resume` continues from the
    last saved state. Raises TrainingError for texts that do not fit the configuration, for a
    state already there without `resume`, and for none with it.
    """
    if (out / STATE_FILE).exists() and not resume:
        raise TrainingError(
            f"{out / STATE_FILE}: holds an unfinished run; give --resume, another --out, "
            "or delete it"
        )
    corpus = read_corpus(text_paths, config.holdout_every_blocks)
    tokenizer = train_tokenizer(corpus.train_documents, config.model.vocab_size)
    tokens = encode_documents(tokenizer, corpus.train_documents)
    sequence_length = config.optimization.sequence_length
    if len(tokens) < sequence_length:
        raise TrainingError(
            f"{len(tokens)} training tokens are fewer than sequence_length {sequence_length}"
        )
    trainer = Trainer(config, tokenizer, tokens, _fingerprint(config, corpus))
    if resume:
        trainer.load(out)
    out.mkdir(parents=True, exist_ok=True)
    while trainer.steps_done < config.optimization.steps:
        report = trainer.step()
        if report.steps_done % config.optimization.checkpoint_every_steps == 0:
            trainer.save(out)
        on_step(report)
    heldout = encode_documents(tokenizer, corpus.heldout_documents)
    figures = _figures(trainer, heldout)
    _write_checkpoint(trainer, tokenizer, corpus, figures, out)
    (out / STATE_FILE).unlink(missing_ok=True)
    return figures


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG.yaml")],
    text: Annotated[list[Path], typer.Option(help="UTF-8 text; two blank lines end a document.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a broken-off run.")] = False,
) -> None:
    """Train a small Mixtral-format model from text, on one CPU thread."""
    torch.set_num_threads(1)
    console = Console()
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[tokens_per_s]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )
    try:
        config = load_config(config_path)
        with progress:
            steps = config.optimization.steps
            task = progress.add_task("training", total=steps, loss=math.nan, tokens_per_s=0.0)
            figures = train(
                config,
                text,
                out,
                resume=resume,
                on_step=lambda report: progress.update(
                    task,
                    completed=report.steps_done,
                    loss=report.loss,
                    tokens_per_s=report.tokens_per_s,
                ),
            )
    except TrainingError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    console.print(shares_table(figures.expert_shares))
    console.print(
        f"held-out perplexity {figures.heldout_perplexity:.2f}, "
        f"unigram {figures.unigram_perplexity:.2f}"
    )


def _fingerprint(config: TrainingConfig, corpus: Corpus) -> str:
    record = json.dumps([config.model_dump(), corpus.files], sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()


def _figures(trainer: Trainer, heldout: torch.Tensor) -> Figures:
    settings = trainer.config.optimization
    use_serving_gates(trainer.model)
    num_tokens, perplexity, shares = evaluate(trainer.model, heldout, settings.sequence_length)
    training_tokens = settings.steps * settings.batch_size * settings.sequence_length
    return Figures(
        heldout_tokens=num_tokens,
        heldout_perplexity=perplexity,
        unigram_perplexity=unigram_perplexity(
            trainer.tokens, heldout[:num_tokens], trainer.config.model.vocab_size
        ),
        expert_shares=shares,
        training_tokens=training_tokens,
        distinct_training_tokens=len(trainer.tokens),
        tokens_per_s=training_tokens / trainer.elapsed_s,
        training_s=trainer.elapsed_s,
        num_parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
    )


def _write_checkpoint(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    figures: Figures,
    out: Path,
) -> None:
    staging = out / ".checkpoint.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    model = trainer.model
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.eos_token_id,
    )
    model.save_pretrained(staging)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(staging)
    card = model_card(trainer.config, corpus.files, figures)
    (staging / "README.md").write_text(card, encoding="utf-8")
    record = training_json(trainer.config, corpus.files, figures)
    (staging / "training.json").write_text(record, encoding="utf-8")
    for path in sorted(staging.iterdir()):
        path.replace(out / path.name)
    staging.rmdir()


if __name__ == "__main__":
    typer.run(main)
