"""A step of the training loop, and the state on disk that a later run resumes from.

B: batch, L: sequence length, V: vocabulary size.
"""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from workshop.train.corpus import windows
from workshop.train.gating import use_training_gates
from workshop.train.settings import (
    ModelSettings,
    OptimizationSettings,
    TrainingConfig,
    TrainingError,
    TrainingFailedError,
)

ADAM_BETAS = (0.9, 0.95)
STATE_FILE = "training_state.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_COUNTERS = ("steps_done", "elapsed_s")


@dataclass(frozen=True)
class StepReport:
    """The outcome of a step: `loss` is the language-model loss in nats per token before the update.

    `overflow_share` is the share of the choices beyond the experts' capacity, over all layers.
    """

    steps_done: int
    loss: float
    tokens_per_s: float
    overflow_share: float


def learning_rate_at(step: int, settings: OptimizationSettings) -> float:
    """Return the rate of a step, from 0 on: a linear warm-up, then a cosine to the final rate."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    span = settings.learning_rate - settings.final_learning_rate
    return settings.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def build_model(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerFast, seed: int
) -> MixtralForCausalLM:
    """Return a new fp32 model; its weights are a function of the sizes and the seed."""
    config = MixtralConfig(
        **settings.model_dump(exclude={"rope_theta"}),
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixtralForCausalLM(config)


class Trainer:
    """The state of the training loop and its step; `save` and `load` keep the whole state."""

    def __init__(
        self,
        config: TrainingConfig,
        model: MixtralForCausalLM,
        tokens: torch.Tensor,
        fingerprint: str,
    ) -> None:
        self.config = config
        self.tokens = tokens
        self.fingerprint = fingerprint
        self.model = model
        self.generator = torch.Generator()
        self.gates = use_training_gates(self.model, config.gating, self.generator)
        self.optimizer = self._build_optimizer()
        self.steps_done = 0
        self.elapsed_s = 0.0

    @property
    def num_parameters(self) -> int:
        """The parameters of the model; in training, the weights of the noise are among them."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> StepReport:
        """Draw a batch, take an optimizer step, report it.

        Raises TrainingFailedError, and changes no weight, when the loss is not finite.
        """
        started_at_s = time.perf_counter()
        settings = self.config.optimization
        self.model.train()
        # The seed is a function of the step, so that a resumed run draws the same numbers.
        self.generator.manual_seed(self.config.seed * 1_000_003 + self.steps_done)
        last_start = len(self.tokens) - settings.sequence_length
        starts = torch.randint(last_start + 1, (settings.batch_size,), generator=self.generator)
        inputs, targets = windows(
            self.tokens, starts, settings.sequence_length, self.model.config.bos_token_id
        )
        logits = self.model(input_ids=inputs, use_cache=False).logits  # [B, L, V]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if not math.isfinite(loss.item()):
            raise TrainingFailedError(
                f"step {self.steps_done + 1}: the loss is {loss.item()}, so the run has diverged; "
                "begin anew with a lower learning_rate, more warmup_steps or a lower max_grad_norm"
            )
        balancing_loss = torch.stack([gate.balancing_loss for gate in self.gates]).sum()
        self.optimizer.zero_grad()
        (loss + balancing_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.steps_done, settings)
        self.optimizer.step()
        self.steps_done += 1
        step_s = time.perf_counter() - started_at_s
        self.elapsed_s += step_s
        overflow_share = sum(gate.overflow_share for gate in self.gates) / len(self.gates)
        return StepReport(self.steps_done, loss.item(), targets.numel() / step_s, overflow_share)

    def save(self, out: Path) -> None:
        """Write parameters, AdamW moments and counters into `out`, atomically.

        Raises TrainingFailedError when the write fails; the file of the last save stays then.
        """
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"parameter.{name}"] = parameter.detach()
            for moment in _MOMENTS:
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        counters = {name: getattr(self, name) for name in ("fingerprint", *_COUNTERS)}
        temporary = out / f".{STATE_FILE}.tmp"
        try:
            save_file(tensors, temporary, metadata={"training": json.dumps(counters)})
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(out / STATE_FILE)
        except (OSError, SafetensorError) as error:
            raise TrainingFailedError(
                f"{out / STATE_FILE}: the state of step {self.steps_done} cannot be written: "
                f"{error}; the state saved before it is kept: make room, then give --resume"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, out: Path) -> None:
        """Load the state in `out`, which must exist, bit by bit.

        Raises TrainingError for a file that is no state, and for a state of another configuration
        or text.
        """
        path = out / STATE_FILE
        try:
            with safe_open(path, framework="pt") as file:
                counters = json.loads((file.metadata() or {})["training"])
                if counters["fingerprint"] != self.fingerprint:
                    raise TrainingError(
                        f"{path}: was written with another configuration or text; "
                        "resume with those, or delete this file to begin anew"
                    )
                for name, parameter in self.model.named_parameters():
                    with torch.no_grad():
                        parameter.copy_(file.get_tensor(f"parameter.{name}"))
                    self.optimizer.state[parameter] = {
                        moment: file.get_tensor(f"{moment}.{name}") for moment in _MOMENTS
                    }
                for name in _COUNTERS:
                    setattr(self, name, counters[name])
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise TrainingError(f"{path}: is not a training state: {error}") from error

    def _build_optimizer(self) -> torch.optim.AdamW:
        parameters = list(self.model.parameters())
        groups = [
            {
                "params": [p for p in parameters if p.dim() >= 2],
                "weight_decay": self.config.optimization.weight_decay,
            },
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=self.config.optimization.learning_rate, betas=ADAM_BETAS, fused=True
        )
