"""Pruning and merging a folder of weights: time by phase, and memory.

    python -m benchmarks.workshop [--gigabytes 2] [--folder FOLDER] [--json FILE]

Makes a random bf16 Mixtral checkpoint in a temporary folder, and runs each command in a process of
its own. Promises: writing reads 100 MB of the source a second or more, and a process takes at most
the bytes of a layer and 500 MB at its peak.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    Verdict,
    begin_peak,
    machine,
    output_options,
    peak_mb,
    progress,
    save_tokenizer,
    show,
    show_verdicts,
    write_json,
)

if TYPE_CHECKING:
    from experts.checkpoint.checkpoint import Checkpoint
    from router.observability.progress import OnProgress

PROMISED_MB_S = 100.0
PROMISED_BEYOND_MB = 500.0
SEQUENCES = 16
"""Of 256 tokens, for calibration and held out; the peak does not depend on it."""
COMMANDS = ("prune by random", "prune by output", "merge into 4")
CONFIG: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}


def layer_bytes(config: dict[str, Any]) -> int:
    """Return the bytes of a layer's experts and attention in bf16."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    experts = config["num_local_experts"] * 3 * hidden * config["intermediate_size"]
    kv_size = config["num_key_value_heads"] * hidden // heads
    return int(2 * (experts + 2 * hidden * hidden + 2 * hidden * kv_size))


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Save a random checkpoint of about this size, a layer to a file; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from experts.families.mixtral import MIXTRAL

    config = {**CONFIG, "num_hidden_layers": max(1, round(gigabytes * 1e9 / layer_bytes(CONFIG)))}
    torch.manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    shapes = MIXTRAL.dense_tensors(config)
    parts = MIXTRAL.expert_parts(config, MIXTRAL.expert_shape(config))
    for name, shape in (shapes | {part.name: part.shape for part in parts}).items():
        scale = 1.0 if len(shape) == 1 else 1 / math.sqrt(shape[-1])
        layer = name.split(".")[2] if name.startswith("model.layers.") else "outer"
        tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * scale
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = tensor.bfloat16()
    for file, tensors in shards.items():
        save_file(tensors, folder / file, {"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_tokenizer(folder)
    return sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())


def write_text(file: Path, num_lines: int = 4000) -> None:
    """Write lines of numbers, for calibration and held out."""
    file.write_text("".join(f"line {n * 7919 % 99991} of text\n" for n in range(num_lines)))


def run_command(command: str, source: Path, dest: Path, text: Path) -> dict[str, Any]:
    """Run a command in this process; returns its seconds by phase and its peak in MB."""
    import os

    from workshop.folders.making import source_checkpoint

    begun = _merge if command == COMMANDS[2] else _prune
    start_mb = begin_peak(os.getpid())
    phases: dict[str, float] = {}
    phase, since_s = "reading", time.perf_counter()

    def on_progress(now: str, done: int, total: int) -> None:
        nonlocal phase, since_s
        now_s = time.perf_counter()
        phases[phase] = phases.get(phase, 0.0) + now_s - since_s
        phase, since_s = now, now_s

    started_at_s = time.perf_counter()
    checkpoint = source_checkpoint(str(source))
    begun(checkpoint, dest, [] if command == COMMANDS[0] else [text], on_progress)
    on_progress("done", 0, 0)
    whole_s = time.perf_counter() - started_at_s
    peak = peak_mb(os.getpid())
    return {"phases_s": phases, "whole_s": whole_s, "start_mb": start_mb, "peak_mb": peak}


def _prune(checkpoint: Checkpoint, dest: Path, texts: list[Path], on_progress: OnProgress) -> None:
    from workshop.folders.making import make_folder
    from workshop.folders.options import PruneOptions
    from workshop.folders.prune.command import Prune

    options = PruneOptions(8, by="output" if texts else "random", sequences=SEQUENCES)
    make_folder(Prune(checkpoint, options), dest, texts, on_progress)


def _merge(checkpoint: Checkpoint, dest: Path, texts: list[Path], on_progress: OnProgress) -> None:
    from workshop.folders.making import make_folder
    from workshop.folders.merge.command import Merge
    from workshop.folders.options import MergeOptions

    make_folder(Merge(checkpoint, MergeOptions(4, sequences=SEQUENCES)), dest, texts, on_progress)


def run(folder: Path, gigabytes: float) -> dict[str, Any]:
    """Run the whole benchmark in an empty folder; returns what ``--json`` writes."""
    source, text = folder / "source", folder / "text.txt"
    source.mkdir()
    with progress("workshop", 1 + len(COMMANDS)) as begin:
        begin("making the checkpoint")
        num_bytes = make_checkpoint(source, gigabytes)
        write_text(text)
        measured = {}
        for command in COMMANDS:
            begin(command)
            dest = folder / command.replace(" ", "-")
            words = ["--step", command, str(source), str(dest), str(text)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.workshop", *words],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            measured[command] = json.loads(done.stdout)
    return {
        "benchmark": "workshop",
        "machine": machine(),
        "sizes": {"num_bytes": num_bytes, "layer_bytes": layer_bytes(CONFIG)},
        "commands": measured,
    }


def write_rate(result: dict[str, Any], command: str) -> float:
    """Return the MB of the source that writing takes in a second."""
    seconds = result["commands"][command]["phases_s"]["writing"]
    return float(result["sizes"]["num_bytes"] / 1e6 / seconds)


def verdicts_of(result: dict[str, Any]) -> list[Verdict]:
    """Return what was promised, and what came of it."""
    most_mb = result["sizes"]["layer_bytes"] / 1e6 + PROMISED_BEYOND_MB
    verdicts = []
    for command, measured in result["commands"].items():
        rate, peak = write_rate(result, command), measured["peak_mb"]
        verdicts += [
            Verdict(
                f"{command}, writing, MB/s",
                f"{rate:.0f}",
                f"{PROMISED_MB_S:.0f}",
                rate >= PROMISED_MB_S,
            ),
            Verdict(f"{command}, peak, MB", f"{peak:.0f}", f"{most_mb:.0f}", peak <= most_mb),
        ]
    return verdicts


def report(result: dict[str, Any]) -> None:
    """Print the seconds of each phase, and the memory."""
    rows = [
        (
            command,
            f"{one['whole_s']:.1f}",
            ", ".join(f"{phase} {took:.1f}" for phase, took in one["phases_s"].items()),
            f"{write_rate(result, command):.0f}",
            f"{one['start_mb']:.0f}",
            f"{one['peak_mb']:.0f}",
        )
        for command, one in result["commands"].items()
    ]
    size = f"{result['sizes']['num_bytes'] / 1e9:.2f} GB"
    columns = ["command", "s", "s by phase", "writing, MB/s", "MB before", "peak, MB"]
    show(f"folders, a source of {size}", rows, columns)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.workshop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    output_options(parser)
    options = parser.parse_args(argv)
    if options.step is not None:
        command, *paths = options.step
        print(json.dumps(run_command(command, *map(Path, paths))))
        return 0
    with tempfile.TemporaryDirectory(prefix="expertmesh-workshop-", dir=options.folder) as name:
        result = run(Path(name), options.gigabytes)
    report(result)
    show_verdicts("promises", verdicts_of(result))
    write_json(result, options.json)
    return int(not all(verdict.is_kept for verdict in verdicts_of(result)))


if __name__ == "__main__":
    sys.exit(main())
