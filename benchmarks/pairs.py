"""Whether new code is slower than old: processor seconds per token, in alternating pairs.

    python -m benchmarks.pairs OLD [NEW] [--pairs 10] [--benchmarks decode serve] [--json FILE]

OLD and NEW (by default HEAD) name commits; ``benchmarks/README.md`` describes a pair. Tokens per
second on a shared machine move by a third from run to run; processor seconds of the same work by
turns move by a few percent. The exit status is 1 when a case has fewer than ten pairs, or the 90 %
interval of the median ratio new / old ends above 1.05.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil, comb
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from benchmarks.checkout import Commit, Side, check_out, commit_of, running, uncommitted
from benchmarks.common import (
    SIZES,
    command,
    exit_on_sigterm,
    make_checkpoint,
    positive,
    progress,
    show,
    write_json,
)
from benchmarks.processor_time import group_of, spent_between

MIN_PAIRS = 10
CONFIDENCE = 0.9
MAX_RATIO = 1.05
"""The upper end of the interval that still is "no slower"."""
TOKENS = 32
"""What a stream generates in a round."""
DECODE_STREAMS = {"decode, 32 streams": 32, "decode, 1 stream": 1}
SERVE, SERVE_CLIENTS = "serve, 32 clients", 32
TURNS = {"decode": 8, "serve": 4}
"""How often each side of a pair has its turn in a case; in ``serve`` in each way to ask."""
TURN_CPU_S = 0.6
"""A turn of ``decode`` is as many rounds as take this long at least, in processor seconds."""
EXPECTED_S = {"decode": 50.0, "serve": 130.0}
"""A pair on two cores beside little other work."""
SET_UP_S = 40.0

Verdict = Literal["no slower", "slower", "too few pairs"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a side: its work, its tokens, and the processor seconds of each process."""

    work: str
    tokens: int
    cpu_s: Mapping[str, float]

    def ms_per_token(self, process: str | None = None) -> float:
        """Return processor milliseconds per token, of all processes or of those of a name."""
        cpu_s = sum(self.cpu_s.values()) if process is None else self.cpu_s.get(process, 0.0)
        return cpu_s / self.tokens * 1e3


def ms_per_token(side: Sequence[Turn], process: str | None = None) -> float:
    """Return the median of a side's turns of each work, the mean of several works.

    By the median, a burst of other programs' work in one turn does not count.
    """
    by_work: dict[str, list[float]] = {}
    for turn in side:
        by_work.setdefault(turn.work, []).append(turn.ms_per_token(process))
    return statistics.fmean(map(statistics.median, by_work.values()))


@dataclass(frozen=True, slots=True)
class Pair:
    """One case measured once on both sides."""

    old: Sequence[Turn]
    new: Sequence[Turn]

    @property
    def ratio(self) -> float:
        """Processor seconds per token, new / old."""
        return ms_per_token(self.new) / ms_per_token(self.old)


@dataclass(frozen=True, slots=True)
class Summary:
    """What pairs say of one case; without a median or an interval where there are too few."""

    pairs: int
    median: float | None
    interval: tuple[float, float] | None
    verdict: Verdict


def coverage(pairs: int, rank: int) -> float:
    """Return how probably the median lies between the values ``rank``-th from below and above."""
    return 1 - 2 * sum(comb(pairs, i) for i in range(rank)) / 2**pairs


def median_interval(
    values: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Return the interval that holds the median of what the values are drawn from.

    Order statistics, interpolated between the two ranks around ``confidence`` (Hettmansperger and
    Sheather, Statistics & Probability Letters 4 (1986), 75-79): no assumption about the values'
    distribution, and no random numbers. ``None`` where the range of all values is too little, for
    0.9 with fewer than five.
    """
    ordered, n, rank = sorted(values), len(values), 0
    while rank < n // 2 and coverage(n, rank + 1) >= confidence:
        rank += 1
    if rank == 0:
        return None
    outer, inner = coverage(n, rank), coverage(n, rank + 1)
    excess = (outer - confidence) / (outer - inner)
    weight = (n - rank) * excess / (rank + (n - 2 * rank) * excess)
    return (
        (1 - weight) * ordered[rank - 1] + weight * ordered[rank],
        (1 - weight) * ordered[n - rank] + weight * ordered[n - rank - 1],
    )


def summarize(ratios: Sequence[float]) -> Summary:
    """Return median, interval and verdict of the ratios new / old of a case's pairs."""
    interval = median_interval(ratios)
    verdict: Verdict
    if interval is None or len(ratios) < MIN_PAIRS:
        verdict = "too few pairs"
    else:
        verdict = "no slower" if interval[1] <= MAX_RATIO else "slower"
    median = statistics.median(ratios) if ratios else None
    return Summary(len(ratios), median, interval, verdict)


def summary_of(pairs: Sequence[Pair]) -> Summary:
    """Return what a case's pairs say."""
    return summarize([pair.ratio for pair in pairs])


def by_turns(count: int, first: int) -> list[int]:
    """Return which side's turn it is, 0 or 1, ``count`` times each by turns.

    Both always find the caches as the other leaves them. Callers let sides be ``first`` equally
    often, so that a machine that gets slower treats them alike.
    """
    return [first, 1 - first] * count


def take_turn(side: Side, work: str, do: Callable[[], int]) -> Turn:
    """Return what a side's processes spend on some work; ``do`` does it and returns its tokens."""
    before = side.times()
    tokens = do()
    cpu_s: defaultdict[str, float] = defaultdict(float)
    for name, spent_s in spent_between(before, side.times()).items():
        cpu_s[group_of(name)] += spent_s
    return Turn(work, tokens, dict(cpu_s))


def measure_decode(
    sides: Sequence[Side], replies: Sequence[Mapping[str, Any]], first: int
) -> dict[str, Pair]:
    """Measure two engines, at 32 streams and at one by turns too."""

    def generate(side: Side, streams: int, rounds: int) -> int:
        return sum(side.generate(streams, TOKENS) for _ in range(rounds))

    rounds: dict[str, int] = {}
    for case, streams in DECODE_STREAMS.items():
        tried_s = 0.0
        for i in by_turns(1, first):
            generate(sides[i], streams, 1)  # connections come in the background
            turn = take_turn(sides[i], case, partial(generate, sides[i], streams, 1))
            tried_s += sum(turn.cpu_s.values())
        rounds[case] = ceil(TURN_CPU_S * len(sides) / tried_s)
    taken: dict[str, tuple[list[Turn], list[Turn]]] = {case: ([], []) for case in DECODE_STREAMS}
    for _ in range(TURNS["decode"]):
        for case, streams in DECODE_STREAMS.items():
            for i in by_turns(1, first):
                do = partial(generate, sides[i], streams, rounds[case])
                taken[case][i].append(take_turn(sides[i], case, do))
    return {case: Pair(*both) for case, both in taken.items()}


def measure_serve(
    sides: Sequence[Side], replies: Sequence[Mapping[str, Any]], first: int
) -> dict[str, Pair]:
    """Measure two deployments; in a turn all clients ask once in one way of ``benchmarks.serve``.

    The clients run in this process and are the same for both sides.
    """
    from benchmarks.serve_clients import WAYS, Ports

    taken: tuple[list[Turn], list[Turn]] = ([], [])
    with ExitStack() as clients:
        rounds = {
            way: [
                clients.enter_context(opened(Ports(**reply), SERVE_CLIENTS, TOKENS, is_stream))
                for reply in replies
            ]
            for way, (opened, is_stream) in WAYS.items()
        }
        for way, of_side in rounds.items():
            for i in by_turns(1, first):
                _serve_round(way, of_side[i])  # makes the connections
        for _ in range(TURNS["serve"]):
            for way, of_side in rounds.items():
                for i in by_turns(1, first):
                    do = partial(_serve_round, way, of_side[i])
                    taken[i].append(take_turn(sides[i], way, do))
    return {SERVE: Pair(*taken)}


def _serve_round(way: str, once: Callable[[], list[Any]]) -> int:
    """Have all clients ask once; raises ``RuntimeError`` where an answer lacks tokens."""
    answers = [timed.tokens for timed in once()]
    if any(tokens != TOKENS for tokens in answers):
        raise RuntimeError(f"{way}: an answer has not {TOKENS} tokens: {answers}")
    return sum(answers)


Measure = Callable[[Sequence[Side], Sequence[Mapping[str, Any]], int], dict[str, Pair]]
"""Measures two sides that run, given what each said and which begins; returns a pair a case."""
MEASURES: Mapping[str, Measure] = {"decode": measure_decode, "serve": measure_serve}


def run(
    measured: dict[str, list[Pair]],
    commits: tuple[Commit, Commit],
    pairs: int,
    benchmarks: Sequence[str],
    file: Path | None,
) -> None:
    """Run all pairs of old and new, and add each to its case; then ``file`` is written anew."""
    old, new = commits
    total = 3 + 2 * pairs * len(benchmarks)
    with tempfile.TemporaryDirectory() as name, progress("pairs", total) as begin:
        folder = Path(name)
        begin("checkpoint")
        model = folder / "model"
        make_checkpoint(model)
        begin(f"old, {old.hash[:10]}")
        checkouts = [check_out(old, folder / "old")]
        begin(f"new, {new.hash[:10]}")
        checkouts.append(check_out(new, folder / "new"))
        for pair in range(pairs):
            for benchmark in benchmarks:
                begin(f"pair {pair + 1}, {benchmark}: starting")
                order = by_turns(1, first=pair % 2)
                with running([checkouts[i] for i in order], benchmark, model) as (started, said):
                    sides, replies = [started[i] for i in order], [said[i] for i in order]
                    begin(f"pair {pair + 1}, {benchmark}")
                    cases = MEASURES[benchmark](sides, replies, order[0])
                    for side in sides:
                        side.check_code()
                for case, one in cases.items():
                    measured.setdefault(case, []).append(one)
            write_json("pairs", to_json(old, new, measured), file)


def to_json(old: Commit, new: Commit, measured: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    """Return what ``--json`` writes: all pairs, and what they say."""
    return {
        "sizes": SIZES,
        "tokens": TOKENS,
        "old": {"commit": old.hash, "subject": old.subject},
        "new": {"commit": new.hash, "subject": new.subject},
        "confidence": CONFIDENCE,
        "most_ratio": MAX_RATIO,
        "cases": {
            case: {
                **asdict(summary_of(pairs)),
                "pairs": [{"ratio": pair.ratio, **asdict(pair)} for pair in pairs],
            }
            for case, pairs in measured.items()
        },
    }


def report(measured: Mapping[str, Sequence[Pair]]) -> None:
    """Print the verdicts, and where the processor time went."""
    rows, parts = [], []
    for case, pairs in measured.items():
        summary = summary_of(pairs)
        color = "green" if summary.verdict == "no slower" else "red"
        rows.append(
            (
                case,
                summary.pairs,
                *_sides_ms(pairs, None),
                summary.median,
                *(summary.interval or (None, None)),
                f"[{color}]{summary.verdict}[/{color}]",
            )
        )
        names = {name for pair in pairs for turn in (*pair.old, *pair.new) for name in turn.cpu_s}
        parts += [(f"{case}: {name}", *_sides_ms(pairs, name)) for name in sorted(names)]
    columns = ["processor ms per token", "pairs"]
    numbers = [f"{name}|.3f" for name in ("old", "new", "new / old", "from", "to")]
    title = f"median and {CONFIDENCE:.0%} interval; at most {MAX_RATIO} is no slower"
    show(title, rows, [*columns, *numbers, ""])
    show("by process, medians", parts, [*columns[:1], *numbers[:2]])


def _sides_ms(pairs: Sequence[Pair], process: str | None) -> tuple[float, float]:
    old = statistics.median(ms_per_token(pair.old, process) for pair in pairs)
    return old, statistics.median(ms_per_token(pair.new, process) for pair in pairs)


def _commit(name: str) -> Commit:
    """Parse a commit's name when the command line is parsed, before the long run."""
    try:
        return commit_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs from the command line; returns the exit status."""
    parser = command("pairs", __doc__)
    parser.add_argument("old", type=_commit, metavar="OLD")
    parser.add_argument("new", type=_commit, metavar="NEW", nargs="?", default="HEAD")
    parser.add_argument("--pairs", type=positive, default=MIN_PAIRS, metavar="N")
    parser.add_argument("--benchmarks", nargs="+", choices=tuple(MEASURES), default=list(MEASURES))
    options = parser.parse_args(argv)
    benchmarks = list(dict.fromkeys(options.benchmarks))
    say = Console(stderr=True).print
    minutes = (SET_UP_S + options.pairs * sum(EXPECTED_S[one] for one in benchmarks)) / 60
    say(f"old: {options.old.hash[:10]} {options.old.subject}", markup=False)
    say(f"new: {options.new.hash[:10]} {options.new.subject}", markup=False)
    say(f"{options.pairs} pairs of {' and '.join(benchmarks)}: about {minutes:.0f} minutes")
    if changes := uncommitted():
        say(f"Not measured: {len(changes)} uncommitted changes", style="yellow")
    measured: dict[str, list[Pair]] = {}
    try:
        run(measured, (options.old, options.new), options.pairs, benchmarks, options.json)
    finally:  # a run that ends early has measured something, too
        report(measured)
    return int({summary_of(pairs).verdict for pairs in measured.values()} != {"no slower"})


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
