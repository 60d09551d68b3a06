"""How many experts? Models of 2 to 32 experts, of equal active size, trained alike.

    python -m benchmarks.expert_count --text F [--text F ...] [--experts 2 4 8 16 32] [--seeds 3]
        [--steps 400] [--runs FOLDER] [--json FILE] [--plot FILE.svg]

Each token takes two experts, so only the total size differs; with two experts all are active, which
is the dense end. A run that is done is kept in ``--runs`` and not done again there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine, show
from cluster.errors import ExpertMeshError

EXPERTS_PER_TOKEN = 2
RECIPE: dict[str, Any] = {
    "holdout_every_blocks": 30,
    "model": {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
    },
    "optimization": {
        "sequence_length": 128,
        "batch_size": 12,
        "learning_rate": 0.004,
        "final_learning_rate": 0.0001,
        "warmup_steps": 50,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "checkpoint_every_steps": 1_000_000,
    },
    "card": {"name": "expert-count", "text": "", "text_commands": ""},
}


@dataclass(frozen=True, slots=True)
class Run:
    """One trained model: ``heldout_nats`` is its held-out loss per token."""

    num_experts: int
    seed: int
    heldout_nats: float
    num_parameters: int
    num_active_parameters: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The runs of one number of experts; ``gain_nats`` is against half as many, or none."""

    num_experts: int
    num_parameters: int
    num_active_parameters: int
    mean_nats: float
    lowest_nats: float
    highest_nats: float
    gain_nats: float | None


def settings_of(num_experts: int, seed: int, steps: int, recipe: Mapping[str, Any]) -> Any:
    """Return the training configuration of one run."""
    from router.workshop.settings import TrainingConfig

    has_choice = num_experts > recipe["model"]["num_experts_per_tok"]
    warmup_steps = min(recipe["optimization"]["warmup_steps"], steps - 1)
    return TrainingConfig.model_validate(
        {
            **recipe,
            "seed": seed,
            "model": {**recipe["model"], "num_local_experts": num_experts},
            # Noise costs a short run more than all that more experts give, so none has it.
            "gating": {
                "noisy": False,
                "importance_weight": 0.1 if has_choice else 0.0,
                "load_weight": 0.0,
            },
            "optimization": {
                **recipe["optimization"],
                "steps": steps,
                "warmup_steps": warmup_steps,
            },
        }
    )


class Bench:
    """The texts as tokens, once for all runs, and the runs that are done."""

    def __init__(self, texts: Sequence[Path], recipe: Mapping[str, Any], runs: Path | None) -> None:
        from router.workshop.corpus import encode_documents, train_tokenizer
        from router.workshop.texts import read_corpus

        self._recipe = recipe
        self._runs = runs
        corpus = read_corpus(list(texts), recipe["holdout_every_blocks"])
        self._tokenizer = train_tokenizer(corpus.train_documents, recipe["model"]["vocab_size"])
        self._tokens = encode_documents(self._tokenizer, corpus.train_documents)
        self._heldout = {
            name: encode_documents(self._tokenizer, documents)
            for name, documents in corpus.heldout_documents.items()
        }
        self.text_sha256 = corpus.files

    def run(self, num_experts: int, seed: int, steps: int, on_step: Callable[[int], None]) -> Run:
        """Train and score one model, or read what an earlier call has kept of it."""
        config = settings_of(num_experts, seed, steps, self._recipe)
        told = json.dumps([config.recipe(), self.text_sha256], sort_keys=True)
        kept = None
        if self._runs is not None:
            digest = hashlib.sha256(told.encode()).hexdigest()[:12]
            kept = self._runs / f"experts-{num_experts}-seed-{seed}-{digest}.json"
            if kept.exists():
                on_step(steps)
                return Run(**json.loads(kept.read_text(encoding="utf-8")))
        run = self._train(config, on_step)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_suffix(".tmp")
            temporary.write_text(json.dumps(asdict(run)) + "\n", encoding="utf-8")
            temporary.replace(kept)
        return run

    def _train(self, config: Any, on_step: Callable[[int], None]) -> Run:
        from router.workshop.evaluation import kinds_of_vocabulary, score
        from router.workshop.gating import use_serving_gates
        from router.workshop.report import num_active_parameters
        from router.workshop.trainer import Trainer, build_model

        model = build_model(config.model, self._tokenizer, config.seed)
        trainer = Trainer(config, model, self._tokens, "")
        steps = config.optimization.steps
        while trainer.steps_done < steps:
            on_step(trainer.step().steps_done)
        use_serving_gates(trainer.model)
        kinds = kinds_of_vocabulary(self._tokenizer, config.model.vocab_size)
        scores = score(trainer.model, self._heldout, kinds, config.optimization.sequence_length)
        step_tokens = config.optimization.batch_size * config.optimization.sequence_length
        num_parameters = trainer.num_parameters
        return Run(
            num_experts=config.model.num_local_experts,
            seed=config.seed,
            heldout_nats=sum(s.nats for s in scores.values())
            / sum(s.num_tokens for s in scores.values()),
            num_parameters=num_parameters,
            num_active_parameters=num_active_parameters(num_parameters, config.model),
            tokens_per_s=steps * step_tokens / trainer.elapsed_s,
        )


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Return one line per number of experts, fewest first."""
    summaries: list[Summary] = []
    for num_experts in sorted({run.num_experts for run in runs}):
        of_it = [run for run in runs if run.num_experts == num_experts]
        nats = [run.heldout_nats for run in of_it]
        half = next((s for s in summaries if 2 * s.num_experts == num_experts), None)
        mean = statistics.fmean(nats)
        summaries.append(
            Summary(
                num_experts,
                of_it[0].num_parameters,
                of_it[0].num_active_parameters,
                mean,
                min(nats),
                max(nats),
                half.mean_nats - mean if half else None,
            )
        )
    return summaries


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw held-out loss against total and active parameters: a dot a run, a line of means."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    summaries = summarize(runs)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, field in zip(axes, ("num_parameters", "num_active_parameters"), strict=True):
        sizes = [getattr(summary, field) / 1e6 for summary in summaries]
        means = [summary.mean_nats for summary in summaries]
        axis.plot(sizes, means, color="tab:blue", linewidth=1)
        axis.scatter(
            [getattr(run, field) / 1e6 for run in runs],
            [run.heldout_nats for run in runs],
            s=14,
            color="tab:orange",
            zorder=3,
        )
        for summary, size in zip(summaries, sizes, strict=True):
            axis.annotate(
                f"{summary.num_experts}",
                (size, summary.highest_nats),
                textcoords="offset points",
                xytext=(0, 5),
                ha="center",
            )
        axis.grid(alpha=0.3)
    axes[0].set_xscale("log")
    totals = [summary.num_parameters / 1e6 for summary in summaries]
    axes[0].set_xticks(totals, [f"{total:.2f}" for total in totals])
    axes[0].set_xticks([], minor=True)
    axes[0].margins(y=0.12)
    axes[0].set_xlabel("total parameters, millions")
    axes[1].set_xlabel("active parameters, millions")
    axes[1].set_xlim(0, 1.5 * max(run.num_active_parameters for run in runs) / 1e6)
    axes[0].set_ylabel("held-out loss, nats per token")
    figure.suptitle("Number of experts (two to a token); a dot a seed")
    figure.savefig(path, metadata={"Date": None})


def show_runs(runs: Sequence[Run]) -> None:
    """Print the table."""
    rows = [
        (
            str(s.num_experts),
            f"{s.num_parameters:,}",
            f"{s.num_active_parameters:,}",
            f"{s.mean_nats:.4f}",
            f"{s.lowest_nats:.4f} to {s.highest_nats:.4f}",
            f"{math.exp(s.mean_nats):.2f}",
            "" if s.gain_nats is None else f"{s.gain_nats:+.4f}",
        )
        for s in summarize(runs)
    ]
    columns = ["experts", "parameters", "active", "loss, nats", "seeds", "perplexity", "gain"]
    show("held-out loss by number of experts", rows, columns)


def run_all(bench: Bench, options: argparse.Namespace) -> list[Run]:
    """Train every number of experts with every seed, under a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    # Seed by seed, so that what is done when it is broken off says something of every size.
    wanted = [(count, seed) for seed in range(options.seeds) for count in options.experts]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    runs = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(wanted) * options.steps)
        for done, (count, seed) in enumerate(wanted):
            bar.update(task, description=f"{count} experts, seed {seed}")

            def on_step(steps_done: int, before: int = done * options.steps) -> None:
                bar.update(task, completed=before + steps_done)

            runs.append(bench.run(count, seed, options.steps, on_step))
    return runs


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, action="append", required=True, metavar="F")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="keep what is done here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the result here")
    options = parser.parse_args(arguments)
    if min(options.experts) < EXPERTS_PER_TOKEN:
        parser.error(f"--experts must be at least {EXPERTS_PER_TOKEN}, which each token takes")
    if options.seeds < 1 or options.steps < 2:
        parser.error("--seeds must be at least 1, --steps at least 2")
    return options


def main(arguments: Sequence[str] | None = None, recipe: Mapping[str, Any] = RECIPE) -> int:
    """Run the benchmark; returns the exit status."""
    import torch

    options = parse(arguments)
    torch.set_num_threads(1)
    try:
        bench = Bench(options.text, recipe, options.runs)
        runs = run_all(bench, options)
    except ExpertMeshError as error:
        sys.stderr.write(f"expert_count: {error}\n")
        return 2
    show_runs(runs)
    if options.plot is not None:
        plot(runs, options.plot)
    if options.json is not None:
        result = {
            "benchmark": "expert_count",
            "machine": machine(),
            "recipe": {**recipe, "steps": options.steps},
            "text_sha256": bench.text_sha256,
            "runs": [asdict(run) for run in runs],
            "summary": [asdict(summary) for summary in summarize(runs)],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
