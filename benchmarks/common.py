"""What the benchmarks share: a random checkpoint, percentiles, tables, the JSON file."""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import platform
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    import torch

MODEL = "bench"
PROMPT_TOKENS = 16
CACHE_TOKENS = 8192
PROMISED_MB = {"router": 550.0, "actor": 200.0}
"""The project's own bounds on memory beyond weights and cache."""
FILE_WIDTH = 160

SIZES: dict[str, int] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
}
Sizes = Mapping[str, int]


def make_checkpoint(
    folder: Path, dtype: str = "bfloat16", seed: int = 0, sizes: Sizes = SIZES
) -> None:
    """Save a random Mixtral checkpoint of these sizes with a byte-level tokenizer."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = MixtralConfig(**sizes, bos_token_id=None, eos_token_id=0, pad_token_id=None)
    MixtralForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer of 257 tokens, the first of which ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def prompts(streams: int, vocab_size: int = SIZES["vocab_size"]) -> list[list[int]]:
    """Return the streams' prompts, all different."""
    return [
        [1 + (31 * stream + 7 * i) % (vocab_size - 1) for i in range(PROMPT_TOKENS)]
        for stream in range(streams)
    ]


def long_prompt(num_tokens: int, vocab_size: int) -> list[int]:
    """Return a prompt of ``num_tokens`` tokens."""
    return [1 + (7 * i + i * i) % (vocab_size - 1) for i in range(num_tokens)]


def expert_mb(count: int, sizes: Sizes = SIZES, value_bytes: int = 2) -> float:
    """Return the MB of the weights of ``count`` experts, ``value_bytes`` a weight."""
    return count * 3 * sizes["hidden_size"] * sizes["intermediate_size"] * value_bytes / 1e6


def dense_mb(folder: Path, sizes: Sizes = SIZES, value_bytes: int = 2) -> float:
    """Return the MB of a bf16 checkpoint's weights without its experts, ``value_bytes`` each."""
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    experts = expert_mb(sizes["num_hidden_layers"] * sizes["num_local_experts"], sizes)
    return (whole - experts) * value_bytes / 2


def cache_mb(num_tokens: int, sizes: Sizes = SIZES, value_bytes: int = 2) -> float:
    """Return the MB of the keys and values of ``num_tokens`` tokens, ``value_bytes`` each."""
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    values = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * head_dim
    return num_tokens * values * value_bytes / 1e6


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process of this host."""
    import psutil

    return float(psutil.Process(pid).memory_info().rss) / 1e6


def mapped_mb(tensor: torch.Tensor) -> float:
    """Return the MB of a tensor of this process that are resident; the kernel counts its pages."""
    page_bytes = mmap.PAGESIZE
    first = tensor.data_ptr() // page_bytes * page_bytes
    num_bytes = tensor.data_ptr() + tensor.nbytes - first
    pages = (ctypes.c_ubyte * -(-num_bytes // page_bytes))()
    arguments = ctypes.c_void_p(first), ctypes.c_size_t(num_bytes), pages
    if ctypes.CDLL(None, use_errno=True).mincore(*arguments):
        raise OSError(ctypes.get_errno(), "the kernel does not tell which pages are resident")
    return sum(page & 1 for page in pages) * page_bytes / 1e6


def memory_of(pid: int, weights_mb: float) -> dict[str, float]:
    """Return a process's memory: resident, of its weights, and the rest."""
    rss_mb = resident_mb(pid)
    return {"rss_mb": rss_mb, "weights_mb": weights_mb, "beyond_mb": rss_mb - weights_mb}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary_ms(values_s: Sequence[float]) -> dict[str, float]:
    """Return p50 and p99 of durations, in milliseconds."""
    return {
        "p50_ms": round(statistics.median(values_s) * 1e3, 3),
        "p99_ms": round(percentile(values_s, 0.99) * 1e3, 3),
        "count": len(values_s),
    }


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    import psutil
    import ray
    import torch
    import transformers

    return {
        "cpus": psutil.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "ray": ray.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def show(title: str, rows: Iterable[Sequence[object]], columns: Sequence[str]) -> None:
    """Print a table.

    A column may end in ``|`` and the format of its numbers, such as ``s|.1f``. ``None`` is an empty
    cell, and texts stay as they are.
    """
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column.partition("|")[0], justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*_cells(row, columns))
    console = Console()
    if not console.is_terminal:  # a file has no width, for which rich takes 80 columns
        console = Console(width=FILE_WIDTH)
    console.print(table)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown, with columns as :func:`show` has them."""
    header = [column.partition("|")[0] for column in columns]
    lines = [header, *(_cells(row, columns) for row in rows)]
    first, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, "|" + "---|" * len(header), *others])


def _cells(row: Sequence[object], columns: Sequence[str]) -> list[str]:
    specs = (column.partition("|")[2] for column in columns)
    return [
        value if isinstance(value, str) else "" if value is None else format(value, spec)
        for value, spec in zip(row, specs, strict=True)
    ]


def show_memory(memory: Mapping[str, Mapping[str, float]]) -> None:
    """Print what :func:`memory_of` gave for each process, and what is promised."""
    rows = [(name, *one.values()) for name, one in memory.items()]
    show("memory, MB", rows, ["process", "resident|.0f", "weights, cache|.0f", "beyond|.0f"])
    bounds = ", ".join(f"{part} <= {most:.0f} MB" for part, most in PROMISED_MB.items())
    print(f"Promised beyond weights and cache: {bounds}.")


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """Show a bar on stderr; the yielded function is told what begins, ``total`` times.

    ``None`` stands for a number that nobody knows.
    """
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        begun = 0

        def begin(what: str) -> None:
            nonlocal begun
            bar.update(task, description=f"{title}: {what}", completed=begun)
            begun += 1

        yield begin


@dataclass(frozen=True, slots=True)
class Verdict:
    """One figure: what it is, what was measured, what was promised, and whether it is kept."""

    figure: str
    measured: str
    promised: str
    is_kept: bool


def show_verdicts(title: str, verdicts: Sequence[Verdict]) -> int:
    """Print what was promised, and what came of it; returns the exit status."""
    rows = [
        (one.figure, one.measured, one.promised, "kept" if one.is_kept else "[red]missed[/red]")
        for one in verdicts
    ]
    show(title, rows, ["figure", "measured", "promised", ""])
    return int(not all(one.is_kept for one in verdicts))


def exit_on_sigterm() -> None:
    """Have SIGTERM end this process as Ctrl-C does, so that folders and processes go with it."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def positive(text: str) -> int:
    """Parse an option that is a positive number."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def command(name: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a benchmark's options, with what every benchmark has: ``--json``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    return parser


def write_json(name: str, result: Mapping[str, Any], file: Path | None) -> None:
    """Write a benchmark's result and its machine where ``--json`` says, if it says anything."""
    if file is not None:
        content = {"benchmark": name, "machine": machine(), **result}
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
