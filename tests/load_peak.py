"""Loads an actor's share in this process and prints how much memory it took at most.

    python -m tests.load_peak FOLDER:DTYPE...

Prints JSON: the bytes of the share (half of each checkpoint's experts) and those that were resident
at the peak, beyond what the process had before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cluster.placement import ExpertKey, ModelExperts
from cluster.spec import ActorSpec, ModelSource
from experts import actor as actor_module
from experts.actor import ExpertActor
from experts.checkpoint import open_checkpoint
from experts.identity import identity_of

PROCESS = Path("/proc/self")


def resident(field: str) -> int:
    """Return ``VmRSS``, what is resident now, or ``VmHWM``, the most there was."""
    lines = (PROCESS / "status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def main(arguments: list[str]) -> None:
    """Load and print."""
    actor_module.end_when_orphaned = lambda lease, app: None  # type: ignore[assignment]
    sources: list[ModelSource] = []
    keys: list[ExpertKey] = []
    for model, argument in zip("abc", arguments, strict=False):
        folder, _, dtype = argument.rpartition(":")
        checkpoint = open_checkpoint(Path(folder))
        shape = checkpoint.shape
        experts = ModelExperts(model, shape.layers, shape.num_experts, 1)
        sources.append(ModelSource(folder, dtype, experts, identity_of(checkpoint)))
        keys += [ExpertKey(model, i, e) for i in shape.layers for e in range(shape.num_experts)]
    actor = ExpertActor(ActorSpec("app", tuple(sources), 0.1, 0.0, 1, 1000), "a", 1, 1)
    # What the first expert brings along besides itself: code, pools of threads.
    actor._load(keys[:1])
    actor._bank.experts.clear()
    (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    actor._load(keys[::2])
    told = {"share": actor._bank.num_bytes, "peak": resident("VmHWM") - before}
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])
