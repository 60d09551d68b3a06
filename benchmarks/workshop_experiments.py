"""The workshop's experiments: one expert a layer, importance against chance, and languages.

See the part ``experiments`` of ``benchmarks.workshop``. Each seed is a model that is trained from
scratch; what is done is kept by :mod:`benchmarks.workshop_steps`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import finish, machine, progress
from benchmarks.workshop_pictures import pictures
from benchmarks.workshop_steps import Recipe, Steps
from benchmarks.workshop_tables import figures_of, report
from cluster.errors import ExpertMeshError

if TYPE_CHECKING:
    from router.workshop.folders.importance import By

_TRAINING: dict[str, Any] = {
    "sequence_length": 128,
    "batch_size": 12,
    "steps": 900,
    "learning_rate": 0.004,
    "final_learning_rate": 0.0002,
    "warmup_steps": 50,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "checkpoint_every_steps": 100,
}
RECIPE = Recipe(
    model={
        "vocab_size": 4096,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
    },
    # Noise costs a short run more than it gives; see benchmarks.expert_count.
    gating={"noisy": False, "importance_weight": 0.1, "load_weight": 0.0},
    training=_TRAINING,
    continued={
        **_TRAINING,
        "steps": 150,
        "learning_rate": 0.002,
        "warmup_steps": 10,
    },
    calibration_rows=128,
    scored_rows=64,
    observed_rows=256,
    random_seeds=(0, 1, 2),
    shuffles=40,
    least_count=20,
)


def prunings(recipe: Recipe) -> list[tuple[int, By, int]]:
    """Return the number of experts, the importance and its seed of each pruned model."""
    num_experts = recipe.model["num_local_experts"]
    counts = sorted({1, *range(recipe.model["num_experts_per_tok"], num_experts)})
    ways: list[tuple[By, int]] = [("output", 0), ("weight", 0)]
    ways += [("random", seed) for seed in recipe.random_seeds]
    return [(count, by, seed) for count in counts for by, seed in ways]


def num_steps(recipe: Recipe) -> int:
    """Return how many steps :func:`run_seed` takes."""
    return 3 + 2 * len(prunings(recipe)) + 2 + 2 * 4


def run_seed(steps: Steps, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Run everything for one seed; returns its part of the result."""
    whole = steps.trained(seed)
    before, experts = {"whole": steps.nats(whole)}, steps.specialisation(whole)
    pruned: dict[tuple[int, By, int], Path] = {}
    counts: dict[str, dict[str, list[dict[str, float]]]] = {}
    for count, by, random_seed in prunings(recipe):
        made = pruned[count, by, random_seed] = steps.pruned(whole, count, by, random_seed)
        counts.setdefault(by, {}).setdefault(str(count), []).append(steps.nats(made))
    sources = {
        "whole": whole,
        "merged into one": steps.merged(whole),
        "pruned to one by output": pruned[1, "output", 0],
        "pruned to one at random": pruned[1, "random", recipe.random_seeds[0]],
    }
    before["merged into one"] = steps.nats(sources["merged into one"])
    before["pruned to one by output"] = counts["output"]["1"][0]
    before["pruned to one at random"] = counts["random"]["1"][0]
    continued = {name: steps.continued(source, seed) for name, source in sources.items()}
    return {
        "before": before,
        "after": {name: steps.nats(model) for name, model in continued.items()},
        "training": {"from scratch": _training(whole)}
        | {name: _training(model) for name, model in continued.items()},
        "counts": counts,
        "experts": experts,
    }


def _training(model: Path) -> dict[str, float]:
    from router.workshop.report import RECORD_FILE

    figures = json.loads((model / RECORD_FILE).read_text(encoding="utf-8"))["figures"]
    names = "num_parameters", "num_active_parameters", "training_tokens"
    return {name: figures[name] for name in names}


def run(
    folder: Path,
    texts: Mapping[str, Path],
    seeds: Sequence[int],
    recipe: Recipe,
    begin: Callable[[str], None],
) -> dict[str, Any]:
    """Run the experiments, or what of them is not done; returns what ``--json`` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(folder, texts, recipe, begin)
    return {
        "benchmark": "workshop experiments",
        "machine": machine(),
        "recipe": asdict(recipe),
        "text_sha256": steps.text_sha256,
        "seeds": {str(seed): run_seed(steps, recipe, seed) for seed in seeds},
    }


def text_option(words: str) -> tuple[str, Path]:
    """Return the language and the file of ``LANGUAGE=FILE``, for argparse."""
    language, sign, file = words.partition("=")
    if not (language and sign and file):
        raise argparse.ArgumentTypeError(f"{words!r} is not LANGUAGE=FILE")
    return language, Path(file)


def run_part(
    parser: argparse.ArgumentParser, options: argparse.Namespace, recipe: Recipe = RECIPE
) -> int:
    """Run the part ``experiments`` of the command line; returns the exit status."""
    import torch
    from transformers.utils import logging

    texts = dict(options.text or [])
    if options.folder is None:
        parser.error("experiments need --folder, which keeps what is done")
    if len(texts) < 2 or len(texts) < len(options.text):
        parser.error("experiments need --text LANGUAGE=FILE of two languages or more, each once")
    if len(set(options.seeds)) < len(options.seeds):
        parser.error("--seeds must differ")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        with progress("experiments", len(options.seeds) * num_steps(recipe)) as begin:
            result = run(options.folder, texts, options.seeds, recipe, begin)
    except ExpertMeshError as error:
        sys.stderr.write(f"workshop: {error}\n")
        return 2
    report(result)
    for name, picture in pictures(result).items():
        (options.folder / name).write_text(picture, encoding="utf-8")
    return finish(result, figures_of(result), options)
