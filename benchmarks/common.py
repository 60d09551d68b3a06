"""What the benchmarks share: a random checkpoint, percentiles, a table, and the JSON file."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

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


def make_checkpoint(folder: Path, dtype: str = "bfloat16", seed: int = 0) -> None:
    """Save a random Mixtral checkpoint of ``SIZES`` with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = MixtralConfig(**SIZES, bos_token_id=None, eos_token_id=0, pad_token_id=None)
    MixtralForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


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


def show(title: str, rows: Sequence[tuple[str, ...]], columns: Sequence[str]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_json(file: Path | None, result: dict[str, Any]) -> None:
    """Write the result where ``--json`` says."""
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
