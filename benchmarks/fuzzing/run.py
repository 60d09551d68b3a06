"""One target under one engine, in a process of its own; :mod:`benchmarks.fuzz` starts it.

    python -m benchmarks.fuzzing.run TARGET ENGINE SECONDS SEED FOLDER

What fails is written to FOLDER and ends the run with status 77, as libFuzzer has it.
"""

from __future__ import annotations

import hashlib
import random
import resource
import sys
import time
import traceback
from pathlib import Path

from benchmarks.fuzzing.mutate import MAX_BYTES, mutated

FOUND = 77
SLOW_S = 10
"""An input that takes longer is a finding."""
MAX_MB = 4096
"""So is one that makes the process this large."""
INSTRUMENTED = ["benchmarks.fuzzing", "cluster", "experts", "router"]


def by_mutation(name: str, seconds: float, seed: int, folder: Path) -> int:
    """Run mutations of the target's seeds; returns the exit status."""
    from benchmarks.fuzzing.targets import TARGETS

    target, source = TARGETS[name](), random.Random(seed)
    runs, end_s = 0, time.monotonic() + seconds
    while (started_s := time.monotonic()) < end_s:
        data = mutated(source, target.seeds)
        try:
            target.run(data)
            took_s = time.monotonic() - started_s
            assert took_s < SLOW_S, f"took {took_s:.1f} s"
        except BaseException:  # a panic of Rust's is no Exception
            traceback.print_exc()
            file = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
            file.write_bytes(data)
            return FOUND
        runs += 1
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    # The words of libFuzzer, so that both engines are read alike.
    print(f"stat::number_of_executed_units: {runs}", file=sys.stderr)
    print(f"stat::peak_rss_mb: {peak_mb:.0f}", file=sys.stderr)
    return 0 if peak_mb < MAX_MB else FOUND


def by_coverage(name: str, seconds: float, seed: int, folder: Path) -> None:
    """Run libFuzzer, by ``atheris``, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from benchmarks.fuzzing.targets import TARGETS
    target = TARGETS[name]()
    corpus = folder / f"corpus-{name}"
    corpus.mkdir(exist_ok=True)
    source = random.Random(seed)
    for place, data in enumerate(target.seeds):
        (corpus / f"seed-{place}").write_bytes(data)
    for place in range(200):  # what is odd by design, for libFuzzer to go on from
        (corpus / f"odd-{place}").write_bytes(mutated(source, target.seeds))
    flags = {
        "max_total_time": int(seconds),
        "seed": seed + 1,  # 0 would be a random one
        "max_len": MAX_BYTES,
        "timeout": SLOW_S,
        "rss_limit_mb": MAX_MB,
        "print_final_stats": 1,
        "artifact_prefix": f"{folder}/{name}-",
    }
    words = [f"-{flag}={value}" for flag, value in flags.items()]
    atheris.Setup([sys.argv[0], *words, str(corpus)], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    _, name_, engine, seconds_, seed_, folder_ = sys.argv
    if engine == "atheris":
        by_coverage(name_, float(seconds_), int(seed_), Path(folder_))
    else:
        sys.exit(by_mutation(name_, float(seconds_), int(seed_), Path(folder_)))
