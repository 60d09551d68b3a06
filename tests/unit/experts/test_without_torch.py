"""An expert actor on a CPU does without torch: it loads and computes experts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

import deploy
from cluster.native import native
from tests.checkpoints import save_mixtral
from tests.quantise import FP8_CONFIG, quantise

TIMEOUT_S = 60.0
MIXTURES = Path(deploy.__file__).parent / "models"
PROGRAM = """
import json, math, sys
from pathlib import Path

import experts.remote
from cluster.spec import ActorSpec, ExpertKey, ModelExperts, ModelSource
from cluster.wire.frames import DTYPE_BYTES, DispatchFrame, RowsFrame, decode, encode
from experts import actor as actor_module
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.identity import identity_of
from experts.checkpoint.mixture import is_mixture, open_mixture

actor_module.end_when_orphaned = lambda lease, app: None
sources = []
for argument in sys.argv[1:]:
    folder, _, dtype = argument.rpartition(":")
    opened = (open_mixture if is_mixture(Path(folder)) else open_checkpoint)(Path(folder))
    experts = ModelExperts(argument, (0,), 1, 1)
    sources.append(ModelSource(folder, dtype, experts, identity_of(opened)))
actor = actor_module.ExpertActor(ActorSpec("app", tuple(sources), 0.1, 0.0, 1, 1000), "a", 1, 1)
keys = [ExpertKey(source.experts.model, 0, 0) for source in sources]
actor._load(1, keys)
for key, source in zip(keys, sources, strict=True):
    shape = tuple(abs(axis) for axis in actor._bank.experts[key].row_shape)
    rows = bytes(3 * math.prod(shape) * DTYPE_BYTES[source.dtype])
    frame = DispatchFrame(1, key.model, 0, (0,), (3,), 3, shape, source.dtype, rows, 30.0)
    for count in (1, 2):  # alone, and merged
        for answer in actor.compute_all([b"".join(encode(frame))] * count):
            assert isinstance(decode(b"".join(answer)), RowsFrame), key
print(json.dumps([name for name in ("torch", "transformers") if name in sys.modules]))
"""
"""Loads FOLDER:DTYPE, computes frames, and prints which of the two large libraries it imported."""


def imported(*arguments: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_experts_of_language_models_need_torch_only_without_native_code(tmp_path: Path) -> None:
    plain, narrow, fp8 = (tmp_path / name for name in ("plain", "narrow", "fp8"))
    save_mixtral(plain)
    save_mixtral(narrow, torch.bfloat16)
    quantise(plain, fp8, FP8_CONFIG, lambda name: ".experts." in name)
    dtypes = ("float32", "bfloat16", "float16")
    found = imported(*(f"{f}:{dtype}" for f in (plain, narrow, fp8) for dtype in dtypes))
    assert found == (["torch"] if native is None else [])


def test_torchs_architectures_in_mixtures_are_computed_without_torch() -> None:
    assert imported(*(f"{MIXTURES / name}:float64" for name in ("hierarchy", "sequences"))) == []
