"""The training state on disk: one safetensors file whose header carries the JSON part.

One file, so that tensors and counters can never be of two different steps.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from router.workshop.settings import TrainingError, TrainingFailedError

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
    """Write parameters, AdamW moments and counters atomically: the old file or the new one.

    Raises TrainingFailedError when the disk takes no more.
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
            "what was saved before it stays: make room, then give --resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_state(
    out: Path, model: nn.Module, optimizer: torch.optim.AdamW, fingerprint: str
) -> tuple[int, float]:
    """Restore model and optimizer in place, bit by bit; return (steps_done, elapsed_s).

    Raises TrainingError when there is no readable state, or it is of another configuration or
    text.
    """
    path = out / STATE_FILE
    if not path.exists():
        raise TrainingError(f"{path}: nothing to resume; leave --resume out to begin a run")
    try:
        with safe_open(path, framework="pt") as file:
            counters = json.loads((file.metadata() or {})["training"])
            if counters["fingerprint"] != fingerprint:
                raise TrainingError(
                    f"{path}: was written with another configuration or text; "
                    "resume with the same ones, or delete it to begin anew"
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
