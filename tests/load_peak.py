"""Loads checkpoints' experts in this process, and prints how much memory each took at most.

    python -m tests.load_peak FOLDER:DTYPE...

Prints JSON, for each argument: the bytes of the experts, and those that were resident at the peak,
beyond what the process had before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

from cluster.spec import ActorSpec, ExpertKey, ModelExperts, ModelSource
from experts import actor as actor_module
from experts.actor import ExpertActor
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.identity import identity_of

PROCESS = Path("/proc/self")


def resident(field: str) -> int:
    """Return ``VmRSS``, what is resident now, or ``VmHWM``, the most there was."""
    lines = (PROCESS / "status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def source_of(model: str, argument: str) -> ModelSource:
    """Return what an actor's specification says of FOLDER:DTYPE."""
    folder, _, dtype = argument.rpartition(":")
    checkpoint = open_checkpoint(Path(folder))
    experts = ModelExperts(model, checkpoint.shape.layers, checkpoint.shape.num_experts, 1)
    return ModelSource(folder, dtype, experts, identity_of(checkpoint))


def loaded(actor: ExpertActor, keys: list[ExpertKey]) -> dict[str, int]:
    """Load ``keys`` and tell what that took."""
    # What the first expert brings along besides itself: code, pools of threads.
    actor._load(1, keys[:1])
    actor._bank.release(keys[0])
    # A collection during the load would bring in code of every library, which no expert needs.
    gc.collect()
    # What it let go may lie in the heap yet, to be used or given back in the course of the load.
    ctypes.CDLL(None).malloc_trim(0)
    (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    actor._load(1, keys)
    return {"share": actor._bank.num_bytes, "peak": resident("VmHWM") - before}


def loaded_apart(actor: ExpertActor, keys: list[ExpertKey]) -> dict[str, int]:
    """Load ``keys`` in a copy of this process, whose heap has no holes of others' loading."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(loaded(actor, keys)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return dict(json.loads(told))


def main(arguments: list[str]) -> None:
    """Load and print."""
    actor_module.end_when_orphaned = lambda lease, app: None  # type: ignore[assignment]
    sources = tuple(source_of(str(i), argument) for i, argument in enumerate(arguments))
    actor = ExpertActor(ActorSpec("app", sources, 0.1, 0.0, 1, 1000), "a", 1, 1)
    print(json.dumps([loaded_apart(actor, source.experts.expert_keys()) for source in sources]))


if __name__ == "__main__":
    main(sys.argv[1:])
