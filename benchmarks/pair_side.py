"""One side of a pair: the code of its own checkout, driven over stdin and stdout.

    python -m benchmarks.pair_side decode|serve FOLDER

``benchmarks.pairs`` copies this file into each checkout and runs it there. It works with every
commit whose ``benchmarks.engine`` has ``measure``, ``run_module``, ``main`` and ``Bench.round``,
and whose ``benchmarks.serve`` has ``deployed``; it imports nothing else of the checkout.

A line of JSON on stdout says that the side is ready. ``decode`` then answers each line
``STREAMS TOKENS`` with a line once it has generated; ``serve`` tells its ports and serves. The end
of stdin ends the side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

ACTORS = 2


def replies() -> Any:
    """Return the file for replies; what else is printed in this process goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def reply(out: Any, message: dict[str, Any]) -> None:
    """Write one line."""
    out.write(json.dumps(message) + "\n")
    out.flush()


def start_decode(folder: Path) -> None:
    """Become the router's process, with the environment that the checkout gives a router."""
    from benchmarks import engine

    def become(module: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
        command = [sys.executable, "-m", "benchmarks.pair_side", "engine", *arguments]
        os.execve(sys.executable, command, {**os.environ, **environment})

    engine.run_module = become
    engine.measure(folder, "auto", ACTORS, ["32"], 32, 1)


def run_engine(arguments: list[str]) -> None:
    """Run the checkout's engine over its actors, a round for each line of stdin."""
    from benchmarks import engine

    out = replies()

    class Driven(engine.Bench):
        """Generates when it is told to."""

        def measure(self, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
            """Take rounds from stdin until its end, then end the process in good order."""
            reply(out, {"ready": True})
            for line in sys.stdin:
                streams, tokens = map(int, line.split())
                self.round(streams, tokens)
                reply(out, {"tokens": streams * tokens})
            raise SystemExit(0)

    engine.Bench = Driven  # type: ignore[misc]
    sys.argv[1:] = arguments
    engine.main()


def serve(folder: Path) -> None:
    """Serve the checkpoint until the end of stdin."""
    from benchmarks.serve import deployed

    out = replies()
    with deployed(folder, ACTORS) as ports:
        reply(out, {"http": ports.http, "grpc": ports.grpc})
        sys.stdin.read()


def main() -> None:
    """Run one side."""
    if sys.argv[1:2] == ["engine"]:  # the second half of start_decode
        run_engine(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", choices=("decode", "serve"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    {"decode": start_decode, "serve": serve}[options.benchmark](options.folder)


if __name__ == "__main__":
    main()
