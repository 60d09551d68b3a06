"""The training state on disk: a safetensors file with the counters as JSON in its header.

A single file, so that tensors and counters are always of the same step.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from workshop.train.settings import TrainingError, TrainingFailedError

STATE_FILE = "training_state.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    *,
    steps_done: int,
    elapsed_s: float,
    fingerprint: str,
) -> None:
    """Write parameters, AdamW moments and counters atomically.

    Raises TrainingFailedError when the write fails; the file of the last save stays then.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"parameter.{name}"] = parameter.detach()
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    counters = {"steps_done": steps_done, "elapsed_s": elapsed_s, "fingerprint": fingerprint}
    temporary = out / f".{STATE_FILE}.tmp"
    try:
        save_file(tensors, temporary, metadata={"training": json.dumps(counters)})
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(out / STATE_FILE)
    except (OSError, SafetensorError) as error:
        raise TrainingFailedError(
            f"{out / STATE_FILE}: the state of step {steps_done} cannot be written: {error}; "
            "the state saved before it is kept: make room, then give --resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_state(
    out: Path, model: nn.Module, optimizer: torch.optim.AdamW, fingerprint: str
) -> tuple[int, float]:
    """Restore model and optimizer in place, bit by bit; return (steps_done, elapsed_s).

    The file must exist. Raises TrainingError for a file that is no state, and for a state of
    another configuration or text.
    """
    path = out / STATE_FILE
    try:
        with safe_open(path, framework="pt") as file:
            counters = json.loads((file.metadata() or {})["training"])
            if counters["fingerprint"] != fingerprint:
                raise TrainingError(
                    f"{path}: was written with another configuration or text; "
                    "resume with those, or delete this file to begin anew"
                )
            for name, parameter in model.named_parameters():
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(f"parameter.{name}"))
                optimizer.state[parameter] = {
                    moment: file.get_tensor(f"{moment}.{name}") for moment in _MOMENTS
                }
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise TrainingError(f"{path}: is not a training state: {error}") from error
    return counters["steps_done"], counters["elapsed_s"]
