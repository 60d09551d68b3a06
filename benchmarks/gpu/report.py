"""What the command says of its results: the promised figures, and a document for the docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import Verdict
from benchmarks.gpu.kill import kept

LEAST_RATIO = 0.9
IN_PLACE = "varlen"
"""The attention that reads the cache's pages in place."""
GROUPED = "grouped"
"""The products of all experts of a frame at once, in kernel classes of actors."""
NOT_MEASURED = "not measured"

Row = Sequence[str]


def verdicts_of(result: Mapping[str, Any]) -> list[Verdict]:
    """Return what was promised, and what came of it; a figure that is missing is not kept."""
    return [
        *_parity_verdicts(result["parity"]),
        *_speed_verdicts(result["models"], result["card"] or {}),
        _kill_verdict(result["kill"]),
    ]


def _parity_verdicts(parity: Sequence[Mapping[str, Any]] | None) -> list[Verdict]:
    fp32 = "greedy tokens equal to transformers' there, fp32, all families"
    bf16 = "distance of bf16 from fp32, of the allowed one, worst family"
    attention = "families whose attention may read pages in place and does, bf16"
    if not parity:
        return [
            Verdict(fp32, NOT_MEASURED, "all", False),
            Verdict(bf16, NOT_MEASURED, "at most 1", False),
            Verdict(attention, NOT_MEASURED, "all", False),
        ]
    equal, tokens = (sum(one[key] for one in parity) for key in ("equal_tokens", "tokens"))
    worst = max(one["distance"] / one["most_distance"] for one in parity)
    attentions = [one["attention"] for one in parity if one["may_read_pages"]]
    in_place, able = attentions.count(IN_PLACE), len(attentions)
    return [
        Verdict(fp32, f"{equal} of {tokens}", "all", equal == tokens),
        Verdict(bf16, f"{worst:.2f}", "at most 1", worst <= 1),
        Verdict(attention, f"{in_place} of {able}", "all", in_place == able),
    ]


def _speed_verdicts(models: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> list[Verdict]:
    largest = next((one for one in models if one["is_largest"]), None)
    promised = f"at least {LEAST_RATIO}"
    speed = "the largest model at {} streams, experts in one process, of transformers grouped_mm"
    memory = "the most memory of a process on the card, of its plan, largest model"
    ways = "ways of the largest model's attention and experts"
    is_grouped = card.get("has_grouped_kernel", True)
    wanted = f"{IN_PLACE}, {GROUPED}" if is_grouped else IN_PLACE
    if largest is None:
        return [
            Verdict(speed.format("the most"), NOT_MEASURED, promised, False),
            Verdict(memory, NOT_MEASURED, "at most 1", False),
            Verdict(ways, NOT_MEASURED, wanted, False),
        ]
    processes = [one for run in largest["actors"].values() for one in run["memory"].values()]
    most = max((one["ratio"] for one in processes), default=None)  # the CPU has none
    found = [_ways(run) for run in largest["actors"].values()]
    are_fast = all(", ".join(way).startswith(wanted) for way in found)
    streams, ratio = next(iter(largest["ratio"]["1"].items()))
    return [
        Verdict(speed.format(streams), f"{ratio:.2f}", promised, ratio >= LEAST_RATIO),
        Verdict(
            memory,
            NOT_MEASURED if most is None else f"{most:.2f}",
            "at most 1",
            most is not None and most <= 1,
        ),
        Verdict(ways, "; ".join(map(", ".join, found)), wanted, are_fast),
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
        _table(
            ["Figure", "Measured", "Promised", ""],
            [
                [one.figure, one.measured, one.promised, "kept" if one.is_kept else "missed"]
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
    parts += ["## Parts", _parts(result["parts"])]
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
            row = [model["model"], n, f"{theirs['tokens_per_s']:.0f}"]
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
    return [_table(["Model", "Streams", "transformers", *actors], rows), "\n".join(sizes)]


def _memory(largest: Mapping[str, Any]) -> str:
    rows = []
    for count, one in largest["actors"].items():
        for process, memory in one["memory"].items():
            keys = "peak_bytes", "reserved_bytes", "held_bytes", "planned_bytes"
            sizes = (memory[key] / 1e9 for key in keys)
            rows.append(
                [count, process, *(f"{one:.2f}" for one in sizes), f"{memory['ratio']:.2f}"]
            )
    columns = ["Actors", "Process", "Most, of tensors, GB", "Most, kept by torch, GB"]
    return _table([*columns, "Plan, held, GB", "Plan, with its work, GB", "Ratio"], rows)


def _kill(result: Mapping[str, Any]) -> str:
    rows = []
    for one in result["windows"]:
        failures = ", ".join(f"{count} {reason}" for reason, count in one["failures"].items())
        back = "" if one["back_s"] is None else f"{one['back_s']:.1f}"
        gap = one["gap_s"]
        rows.append(
            [
                one["name"],
                f"{one['tokens_per_s']:.0f}",
                f"{gap['p50']:.3f}",
                f"{gap['longest']:.3f}",
                back,
                str(one["requests"]),
                failures or "0",
            ]
        )
    columns = ["", "Tokens/s", "Gap p50, s", "Longest gap, s", "Back after, s", "Requests"]
    devices = ", ".join(result["devices"])
    return f"{result['actors']} actors on {devices}, two copies of each expert.\n\n" + _table(
        [*columns, "Failed or wrong"], rows
    )


def _parity(parity: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            one["family"],
            f"{one['equal_tokens']} of {one['tokens']}",
            *(f"{one[key]:.4f}" for key in ("distance", "oracle_distance", "most_distance")),
            one["attention"],
        ]
        for one in parity
    ]
    columns = ["Family", "Equal tokens, fp32", "Distance, bf16", "Of transformers", "Allowed"]
    return _table([*columns, "Attention, bf16"], rows)


def _parts(parts: Sequence[Mapping[str, Any]]) -> str:
    rows = [[one["name"], one["status"], f"{one['took_s']:.0f}"] for one in parts]
    return _table(["Part", "Ended", "s"], rows)


def _table(columns: Row, rows: Sequence[Row]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
