"""The bundled mixtures served, beside one process and beside MLServer.

    python -m benchmarks.mixtures [--environment FOLDER] [--rounds 5] [--json FILE]

Serves `digits` and `diabetes` (gateway, a router each, two expert actors), and has the same
combined model served by MLServer with two workers: by gRPC with binary tensors, and by HTTP, where
MLServer has JSON alone. Each actor holds all experts, as each of MLServer's workers holds the whole
model. Two more ways are in this process: the mixture's own parts, and plain scikit-learn.

All ways are asked by turns with 1, 32 and 1,024 rows: by one client, which waits for each answer,
and by several at once. The clients share the cores with the servers. Before anything is measured,
all ways must give the same predictions.

Promise: by gRPC, p50 of one row is at most 1.5 times MLServer's, and rows/s of 1,024 are at least
MLServer's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from sklearn.datasets import load_diabetes, load_digits

from benchmarks import mlserver
from benchmarks.combined import combined
from benchmarks.common import (
    Verdict,
    machine,
    output_options,
    progress,
    show,
    show_verdicts,
    summary_ms,
    write_json,
)
from benchmarks.local_mixture import LocalMixture
from benchmarks.prediction_ways import Grpc, Http, Local, Question, Way, ask_at_once, ask_in_turn
from benchmarks.serve import served
from benchmarks.serve_clients import Ports
from experts.checkpoint.mixture import open_mixture

MODELS = Path(__file__).resolve().parents[1] / "deploy" / "models"
BATCHES = (1, 32, 1024)
FEWER = 8
"""Batches of the largest size are so many times fewer."""
WARM_UP = 5
OURS, THEIRS = "ExpertMesh, gRPC", "MLServer, gRPC"
OURS_HTTP, THEIRS_HTTP = "ExpertMesh, HTTP, binary", "MLServer, HTTP, JSON"
PARTS, PLAIN = "one process, the mixture", "one process, scikit-learn"
MOST_LATENCY, LEAST_RATE = 1.5, 1.0
RTOL = {"digits": 1e-5, "diabetes": 1e-9}
"""How close the ways' predictions must be; MLServer's arithmetic is scikit-learn's and numpy's."""


@dataclass(frozen=True, slots=True)
class Model:
    """A mixture: its rows, and the questions for it of each server."""

    name: str
    rows: np.ndarray
    ours: Question
    theirs: Question


@dataclass(slots=True)
class Samples:
    """Seconds of single questions, and rows per second of several at once, a round each."""

    durations_s: list[float] = field(default_factory=list)
    rows_per_s: list[float] = field(default_factory=list)


def models() -> list[Model]:
    """Return the two mixtures with the rows of their data."""
    images = load_digits().data.astype(np.uint8).reshape(-1, 8, 8)
    patients = load_diabetes(scaled=False).data
    return [
        Model(
            "digits",
            images,
            Question("digits", "pixels", "UINT8", "probabilities"),
            Question("digits", "pixels", "UINT8", "predict_proba"),
        ),
        Model(
            "diabetes",
            patients,
            Question("diabetes", "patient", "FP64", "progression"),
            Question("diabetes", "patient", "FP64", "predict"),
        ),
    ]


def batches(rows: np.ndarray, size: int, count: int, seed: int) -> list[np.ndarray]:
    """Return batches of rows, drawn from a seed with replacement."""
    rng = np.random.default_rng(seed)
    return [rows[rng.integers(0, len(rows), size)] for _ in range(count)]


@contextmanager
def ways(environment: Path, clients: int, begin: Callable[[str], None]) -> Iterator[dict[str, Way]]:
    """Start the servers, and yield all ways by name; ends everything afterwards."""
    from router.app import build

    digits, diabetes = (combined(MODELS / name) for name in ("digits", "diabetes"))
    estimators = {"digits": digits, "diabetes": diabetes}
    local = {name: LocalMixture(open_mixture(MODELS / name)) for name in estimators}
    args = {
        "models": [{"id": name, "path": str(MODELS / name)} for name in estimators],
        "experts": {"actors": 2, "min_copies": 2},
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        begin("MLServer")
        theirs = stack.enter_context(mlserver.running(environment, folder, estimators))
        begin("deployment")
        ours: Ports = stack.enter_context(served(build, args))
        found: dict[str, Way] = {
            OURS: Grpc(ours.grpc),
            THEIRS: Grpc(theirs.grpc_port),
            OURS_HTTP: Http(ours.http, clients, is_binary=True),
            THEIRS_HTTP: Http(theirs.http_port, clients, is_binary=False),
            PARTS: Local(
                {
                    "digits": lambda x: _output(local["digits"], "pixels", x, "probabilities"),
                    "diabetes": lambda x: _output(local["diabetes"], "patient", x, "progression"),
                }
            ),
            PLAIN: Local({"digits": digits.predict_proba, "diabetes": diabetes.predict}),
        }
        for way in found.values():
            stack.callback(way.close)
        yield found


def _output(local: LocalMixture, name: str, rows: np.ndarray, output: str) -> np.ndarray:
    return local.predict({name: rows}, [output])[output]


def question(model: Model, way: str) -> Question:
    """Return the question of a way for a model."""
    return model.theirs if way in (THEIRS, THEIRS_HTTP) else model.ours


def check_same(found: Mapping[str, Way], model: Model) -> None:
    """Raise ``RuntimeError`` where a way's predictions are not those of plain scikit-learn."""
    rows = model.rows[: BATCHES[-1]]
    expected = found[PLAIN].ask(model.ours, rows).reshape(len(rows), -1)
    for name, way in found.items():
        given = way.ask(question(model, name), rows).reshape(len(rows), -1)
        if not np.allclose(given, expected, RTOL[model.name], 1e-7):
            worst = np.abs(given - expected).max()
            raise RuntimeError(f"{name} predicts {model.name} otherwise, by up to {worst}")


def measure(
    found: Mapping[str, Way],
    given: Sequence[Model],
    requests: int,
    rounds: int,
    clients: int,
    begin: Callable[[str], None],
) -> dict[tuple[str, str, int], Samples]:
    """Ask all ways by turns, first and last by turns too; a first round does not count."""
    samples: dict[tuple[str, str, int], Samples] = {}
    order = list(found)
    for number in range(rounds + 1):
        begin("warm-up" if number == 0 else f"round {number} of {rounds}")
        for model in given:
            for size in BATCHES:
                count = max(2, requests // FEWER) if size == BATCHES[-1] else requests
                some = batches(model.rows, size, WARM_UP if number == 0 else count, number)
                for name in order:
                    sample = _ask(found[name], question(model, name), some, clients)
                    if number:
                        kept = samples.setdefault((model.name, name, size), Samples())
                        kept.durations_s += sample.durations_s
                        kept.rows_per_s += sample.rows_per_s
        order = [*order[1:], order[0]]
    return samples


def _ask(way: Way, asked: Question, some: Sequence[np.ndarray], clients: int) -> Samples:
    durations_s = ask_in_turn(way, asked, some, time.perf_counter)
    began_s = time.perf_counter()
    ask_at_once(way, asked, some, clients)
    num_rows = sum(map(len, some))
    return Samples(durations_s, [num_rows / (time.perf_counter() - began_s)])


def run(environment: Path, requests: int, rounds: int, clients: int) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    given = models()
    with progress("mixtures", 4 + rounds + 1) as begin:
        begin("MLServer's environment")
        mlserver.environment(environment)
        with ways(environment, clients, begin) as found:
            begin("comparing the predictions")
            for model in given:
                check_same(found, model)
            samples = measure(found, given, requests, rounds, clients, begin)
    figures: dict[str, Any] = {}
    for (model_name, way, size), sample in samples.items():
        figures.setdefault(model_name, {}).setdefault(str(size), {})[way] = {
            **summary_ms(sample.durations_s),
            "rows_per_s": statistics.median(sample.rows_per_s),
        }
    return {
        "benchmark": "mixtures",
        "machine": machine() | {"scikit-learn": sklearn.__version__},
        "mlserver": mlserver.REQUIREMENTS[0],
        "clients": clients,
        "actors": 2,
        "models": figures,
    }


def verdicts_of(result: Mapping[str, Any]) -> list[Verdict]:
    """Return the promises by gRPC, and what came of them."""
    found = []
    for name, sizes in result["models"].items():
        one, many = sizes[str(BATCHES[0])], sizes[str(BATCHES[-1])]
        latency = one[OURS]["p50_ms"] / one[THEIRS]["p50_ms"]
        rate = many[OURS]["rows_per_s"] / many[THEIRS]["rows_per_s"]
        found += [
            Verdict(
                f"{name}, p50 of one row, of MLServer's",
                f"{latency:.2f}",
                f"at most {MOST_LATENCY}",
                latency <= MOST_LATENCY,
            ),
            Verdict(
                f"{name}, rows/s of {BATCHES[-1]:,}, of MLServer's",
                f"{rate:.2f}",
                f"at least {LEAST_RATE}",
                rate >= LEAST_RATE,
            ),
        ]
    return found


def report(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    columns = ["way", *(f"{size} rows: p50 ms, p99 ms, rows/s" for size in BATCHES)]
    for name, sizes in result["models"].items():
        names = list(sizes[str(BATCHES[0])])
        rows = []
        for way in names:
            cells = []
            for size in BATCHES:
                values = sizes[str(size)][way]
                cells.append(
                    f"{values['p50_ms']:.2f}  {values['p99_ms']:.2f}  {values['rows_per_s']:,.0f}"
                )
            rows.append((way, *cells))
        show(f"{name}; rows/s with {result['clients']} clients", rows, columns)
    described = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    print(f"{described}; {result['mlserver']}, {mlserver.WORKERS} workers")
    show_verdicts("promises", verdicts_of(result))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixtures", description=__doc__)
    parser.add_argument(
        "--environment",
        type=Path,
        default=Path(tempfile.gettempdir()) / "expertmesh-mlserver",
        help="virtual environment with MLServer; made where it is not there, and kept",
    )
    parser.add_argument("--requests", type=int, default=200, help="of each size in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4, help="questions open at once")
    output_options(parser)
    options = parser.parse_args(argv)
    result = run(options.environment, options.requests, options.rounds, options.clients)
    report(result)
    missed = not all(verdict.is_kept for verdict in verdicts_of(result))
    write_json(result, options.json)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
