"""What the command says of its results: the promised figures, and a document for the docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import Verdict, markdown
from benchmarks.failover import WINDOW_COLUMNS, window_rows
from benchmarks.gpu.kill import kept

MIN_RATIO = 0.9
IN_PLACE = "varlen"
"""The attention that reads the cache's pages in place."""
GROUPED = "grouped"
"""The products of all experts of a frame at once, in kernel classes of actors."""
NOT_MEASURED = "not measured"

PARITY = (
    ("greedy tokens equal to transformers' there, fp32, all families", "all"),
    ("distance of bf16 from fp32, of the allowed one, worst family", "at most 1"),
    ("families whose attention may read pages in place and does, bf16", "all"),
)
"""Figures and promises."""


def verdicts_of(result: Mapping[str, Any]) -> list[Verdict]:
    """Return what was promised, and what came of it; a figure that is missing is not kept."""
    return [
        *_parity_verdicts(result["parity"]),
        *_speed_verdicts(result["models"], result["card"] or {}),
        _kill_verdict(result["kill"]),
    ]


def _parity_verdicts(parity: Sequence[Mapping[str, Any]] | None) -> list[Verdict]:
    found = [(NOT_MEASURED, False)] * len(PARITY)
    if parity:
        equal, tokens = (sum(one[key] for one in parity) for key in ("equal_tokens", "tokens"))
        worst = max(one["distance"] / one["most_distance"] for one in parity)
        attentions = [one["attention"] for one in parity if one["may_read_pages"]]
        in_place, able = attentions.count(IN_PLACE), len(attentions)
        found = [
            (f"{equal} of {tokens}", equal == tokens),
            (f"{worst:.2f}", worst <= 1),
            (f"{in_place} of {able}", in_place == able),
        ]
    return [
        Verdict(figure, measured, promised, is_kept)
        for (figure, promised), (measured, is_kept) in zip(PARITY, found, strict=True)
    ]


def _speed_verdicts(models: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> list[Verdict]:
    largest = next((one for one in models if one["is_largest"]), None)
    is_grouped = card.get("has_grouped_kernel", True)
    wanted = f"{IN_PLACE}, {GROUPED}" if is_grouped else IN_PLACE
    streams, found = "the most", [(NOT_MEASURED, False)] * 3
    if largest is not None:
        runs = list(largest["actors"].values())
        most = max((one["ratio"] for run in runs for one in run["memory"].values()), default=None)
        ways = [", ".join(_ways(run)) for run in runs]
        streams, ratio = next(iter(largest["ratio"]["1"].items()))
        found = [
            (f"{ratio:.2f}", ratio >= MIN_RATIO),
            # The CPU has none.
            (NOT_MEASURED, False) if most is None else (f"{most:.2f}", most <= 1),
            ("; ".join(ways), all(way.startswith(wanted) for way in ways)),
        ]
    figures = (
        (
            f"the largest model at {streams} streams, experts in one process, of transformers "
            "grouped_mm",
            f"at least {MIN_RATIO}",
        ),
        ("the most memory of a process on the card, of its plan, largest model", "at most 1"),
        ("ways of the largest model's attention and experts", wanted),
    )
    return [
        Verdict(figure, measured, promised, is_kept)
        for (figure, promised), (measured, is_kept) in zip(figures, found, strict=True)
    ]


def _ways(run: Mapping[str, Any]) -> tuple[str, str]:
    """Return the attention of a run's router, and how its actors compute experts."""
    classes = run["kernel_classes"]
    is_grouped = bool(classes) and all(one.endswith(f" {GROUPED}") for one in classes)
    return run["attention"], GROUPED if is_grouped else " and ".join(classes)


def _kill_verdict(result: Mapping[str, Any] | None) -> Verdict:
    figure, promised = "requests that failed or had other tokens, with a kill of an actor", "0"
    if result is None:
        return Verdict(figure, NOT_MEASURED, promised, False)
    requests = sum(one["requests"] for one in result["windows"])
    failed = sum(sum(one["failures"].values()) for one in result["windows"])
    return Verdict(figure, f"{failed} of {requests}", promised, kept(dict(result)))


def document(result: Mapping[str, Any]) -> str:
    """Return the results in Markdown, for ``docs/performance.md``."""
    parts = [
        f"# On {result['card']['name']}" if result["card"] else "# On an unknown card",
        _conditions(result),
        "## Figures",
        markdown(
            ["Figure", "Measured", "Promised", ""],
            [
                (one.figure, one.measured, one.promised, "kept" if one.is_kept else "missed")
                for one in verdicts_of(result)
            ],
        ),
    ]
    if result["models"]:
        parts += ["## Tokens per second", *_speed(result["models"])]
    largest = next((one for one in result["models"] if one["is_largest"]), None)
    # The CPU has no memory to compare.
    if largest is not None and any(one["memory"] for one in largest["actors"].values()):
        parts += ["## Memory on the device against `expertmesh plan`", _memory(largest)]
    if result["kill"] is not None:
        parts += ["## An actor is killed under load", _kill(result["kill"])]
    if result["parity"]:
        parts += ["## Parity by family", _parity(result["parity"])]
    rows = [(one["name"], one["status"], one["took_s"]) for one in result["parts"]]
    parts += ["## Parts", markdown(["Part", "Ended", "s|.0f"], rows)]
    return "\n\n".join(parts) + "\n"


def _conditions(result: Mapping[str, Any]) -> str:
    card = result["card"]
    lines = [f"`benchmarks/gpu.sh`, {result['date']}."]
    if card:
        memory = f"{card.get('total_bytes', 0) / 1e9:.0f} GB, {card['free_bytes'] / 1e9:.0f} free"
        versions = ", ".join(f"{key} {value}" for key, value in card["machine"].items())
        native = "built" if card["native"] else "not built"
        lines += [
            f"{card['name']} ({card['device']}; {memory}), driver {card['driver']}, "
            f"{card['toolkit']}; {versions}; native code {native}.",
            "Mixtral models in bf16, all of whose values come from one pool of random ones; "
            "prompts of 16 tokens, 32 new tokens each, greedy, medians; transformers is one "
            "process with `grouped_mm` experts on the same card.",
        ]
    return " ".join(lines)


def _speed(models: Sequence[Mapping[str, Any]]) -> list[str]:
    rows, sizes = [], []
    for model in models:
        for n, theirs in model["transformers"].items():
            row = [model["model"], n, theirs["tokens_per_s"]]
            for count, one in model["actors"].items():
                rate, ratio = one["streams"][n]["tokens_per_s"], model["ratio"][count][n]
                row.append(f"{rate:.0f} ({ratio:.2f})")
            rows.append(row)
        shape = model["config"]
        sizes.append(
            f"- {model['model']}: hidden {shape['hidden_size']:,}, experts "
            f"{shape['num_local_experts']} of {shape['intermediate_size']:,}, vocabulary "
            f"{shape['vocab_size']:,}; {model['size']}."
        )
    counts = list(models[0]["actors"])
    actors = [f"ExpertMesh, {n} actor process{'es' if n != '1' else ''}" for n in counts]
    columns = ["Model", "Streams", "transformers|.0f", *actors]
    return [markdown(columns, rows), "\n".join(sizes)]


def _memory(largest: Mapping[str, Any]) -> str:
    keys = "peak_bytes", "reserved_bytes", "held_bytes", "planned_bytes"
    rows = [
        (count, process, *(memory[key] / 1e9 for key in keys), memory["ratio"])
        for count, one in largest["actors"].items()
        for process, memory in one["memory"].items()
    ]
    columns = ["Most, of tensors", "Most, kept by torch", "Plan, held", "Plan, with its work"]
    numbers = [*(f"{column}, GB|.2f" for column in columns), "Ratio|.2f"]
    return markdown(["Actors", "Process", *numbers], rows)


def _kill(result: Mapping[str, Any]) -> str:
    devices = ", ".join(result["devices"])
    told = f"{result['actors']} actors on {devices}, two copies of each expert."
    return f"{told}\n\n{markdown(WINDOW_COLUMNS, window_rows(result['windows']))}"


def _parity(parity: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            one["family"],
            f"{one['equal_tokens']} of {one['tokens']}",
            *(one[key] for key in ("distance", "oracle_distance", "most_distance", "attention")),
        )
        for one in parity
    ]
    columns = ["Family", "Equal tokens, fp32", "Distance, bf16|.4f", "Of transformers|.4f"]
    return markdown([*columns, "Allowed|.4f", "Attention, bf16"], rows)
