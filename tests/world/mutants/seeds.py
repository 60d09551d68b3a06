"""Runs seeds and prints, for each, a line of JSON: the seed, and the laws that it breaks."""

from __future__ import annotations

import gc
import json
import logging
import sys

from tests.world.weather import draw
from tests.world.world import run


def main(begin: int, end: int) -> None:
    """Run seeds from ``begin`` to before ``end``."""
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda raised: None  # threads that end with their world
    gc.freeze()
    for seed in range(begin, end):
        try:
            laws = [breach.law for breach in run(draw(seed)).breaches]
        except Exception as error:
            laws = [f"a world ends by itself ({type(error).__name__})"]
        print(json.dumps([seed, list(dict.fromkeys(laws))]), flush=True)
        gc.collect()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
