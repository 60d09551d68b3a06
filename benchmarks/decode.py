"""Decode speed of one router's engine and its actors, beside peers.

    python -m benchmarks.decode [--size 14M|111M|445M] [--peers FOLDER] [--prefill] [--passes N]
        [--json FILE] [--actors N] [--transport auto|ray|stream ...] [--avx2]

Makes a random bf16 Mixtral checkpoint and generates greedily with a router's engine and its expert
actors, and with each peer in a process of its own on all cores. The exit status is 1 when a peer
fails. ``benchmarks/README.md`` says how to install the peers, and what the tables mean.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import avx2, engine
from benchmarks.common import (
    CACHE_TOKENS,
    SIZES,
    Sizes,
    command,
    long_prompt,
    make_checkpoint,
    positive,
    progress,
    prompts,
    write_json,
)
from benchmarks.decode_report import OURS, PREFILL_PEER, merged, report, with_ratios
from benchmarks.peers.ask import PeerFailedError, ask
from benchmarks.peers.gguf_file import write_gguf
from benchmarks.peers.registry import Peer, bits_of, installed, missing
from benchmarks.peers.side import Task
from cluster.processor import processor_name

STREAMS = ("32", "1")
VALUE_BYTES = {"float32": 4, "bfloat16": 2}
"""Of a weight, by the dtype in which the router and its actors compute."""
TRANSPORTS = ("auto", "ray", "stream")
PREFILL_TOKENS = (512, 2048, 4000)

_LONG = {**SIZES, "max_position_embeddings": CACHE_TOKENS}
MODELS: dict[str, Sizes] = {
    "14M": {
        **_LONG,
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
    },
    "111M": _LONG,
    "445M": {**_LONG, "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2048},
}
"""Sizes by the number of parameters."""

Measure = Callable[[], dict[str, Any]]
"""Measures one side once."""
Key = tuple[str, str]
"""A side: a peer or :data:`OURS` with a transport, and the format of the weights."""


def run(options: argparse.Namespace, peers: Mapping[Peer, str]) -> dict[str, Any]:
    """Run the whole benchmark; returns the content of ``--json``.

    Each pass measures all sides, so that a machine that gets slower meanwhile slows all of them. A
    peer that fails is left out from then on.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        sides = {**_peer_sides(options, folder, peers), **_our_sides(options, folder)}
        taken: dict[Key, list[dict[str, Any]]] = {key: [] for key in sides}
        failed: dict[str, str] = {}
        with progress("decode", 1 + options.passes * len(sides)) as begin:
            begin("checkpoint")
            make_checkpoint(folder, sizes=MODELS[options.size])
            for number in range(options.passes):
                for key, measure in sides.items():
                    begin(f"pass {number + 1} of {options.passes}, {' '.join(key)}")
                    if key in taken:
                        try:
                            taken[key].append(measure())
                        except PeerFailedError as error:
                            failed[" ".join(key)] = str(error)
                            del taken[key]
    return with_ratios(
        {
            "processor": processor_name(),
            "avx2_alone": options.avx2,
            "size": options.size,
            "sizes": MODELS[options.size],
            "tokens": options.tokens,
            "actors": options.actors,
            "streams": list(STREAMS),
            "prefill": [str(length) for length in options.prefill],
            "sides": [
                {"program": program, "format": number_format, **merged(passes)}
                for (program, number_format), passes in taken.items()
            ],
            "missing": missing(peers),
            "failed": failed,
        }
    )


def _peer_sides(
    options: argparse.Namespace, folder: Path, peers: Mapping[Peer, str]
) -> dict[Key, Measure]:
    return {
        (peer.name, kind): partial(_measure_peer, options, folder, peer, python, kind)
        for peer, python in peers.items()
        for kind in peer.formats
    }


def _our_sides(options: argparse.Namespace, folder: Path) -> dict[Key, Measure]:
    return {
        (f"{OURS}, {transport}", dtype): partial(_measure_ours, options, folder, dtype, transport)
        for dtype in VALUE_BYTES
        for transport in dict.fromkeys(options.transport)
    }


def _measure_peer(
    options: argparse.Namespace, folder: Path, peer: Peer, python: str, number_format: str
) -> dict[str, Any]:
    """Measure a peer on all cores; a GGUF file exists only meanwhile."""
    vocab_size = MODELS[options.size]["vocab_size"]
    streams = tuple(map(int, STREAMS))
    lengths = options.prefill if peer.name == PREFILL_PEER else ()
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        model = folder
        if peer.gguf_architecture is not None:
            model = Path(name) / "model.gguf"
            write_gguf(folder, model, number_format, peer.gguf_architecture)
        task = Task(
            str(model),
            number_format,
            psutil.cpu_count() or 1,
            prompts(max(streams), vocab_size),
            streams,
            options.tokens,
            options.rounds,
            [long_prompt(length, vocab_size) for length in lengths],
            CACHE_TOKENS,
        )
        return {**ask(python, peer.module, task), "bits": bits_of(number_format)}


def _measure_ours(
    options: argparse.Namespace, folder: Path, dtype: str, transport: str
) -> dict[str, Any]:
    measured = engine.measure(
        folder,
        transport,
        options.actors,
        STREAMS,
        options.tokens,
        options.rounds,
        sizes=MODELS[options.size],
        dtype=dtype,
        prefill=options.prefill,
    )
    return {**measured, "bits": 8 * VALUE_BYTES[dtype], "version": ""}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns the exit status."""
    parser = command("decode", __doc__)
    parser.add_argument("--size", choices=tuple(MODELS), default="111M", help="parameters")
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="FOLDER",
        help="has a virtual environment for each peer, named after the peer",
    )
    lengths = ", ".join(f"{n:,}" for n in PREFILL_TOKENS)
    parser.add_argument(
        "--prefill",
        action="store_const",
        const=PREFILL_TOKENS,
        default=(),
        help=f"prompts of {lengths} tokens too",
    )
    parser.add_argument("--tokens", type=positive, default=32, help="of each stream")
    parser.add_argument("--rounds", type=positive, default=5, help="of each side in a pass")
    parser.add_argument("--passes", type=positive, default=1, help="over all sides")
    parser.add_argument("--actors", type=positive, default=2)
    parser.add_argument("--transport", nargs="+", choices=TRANSPORTS, default=["auto"])
    avx2.add_option(parser)
    options = parser.parse_args(argv)
    if options.avx2:
        avx2.use_alone(parser)
    try:
        peers = installed(options.peers)
    except ValueError as error:
        parser.error(str(error))
    result = run(options, peers)
    report(result)
    write_json("decode", result, options.json)
    return int(bool(result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
