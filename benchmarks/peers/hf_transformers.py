"""The adapter of transformers, which this project's own environment has."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers import side

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Transformers:
    """A Mixtral in one process; the format is a dtype and the way experts compute."""

    def __init__(self, task: side.Task) -> None:
        """Load the model to the task's device."""
        import torch
        import transformers

        from cluster.device import device_of

        dtype, experts = task.format.split()
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        torch.set_num_threads(task.threads)
        model = transformers.MixtralForCausalLM.from_pretrained(
            task.model, dtype=DTYPES[dtype], experts_implementation=experts
        )
        self._model = model.eval().to(device_of(task.device, 0, "--device"))

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> side.Tokens:
        """Return the greedy tokens of each prompt."""
        import torch

        ids = torch.tensor(prompts, device=self._model.device)
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
        )
        generated: side.Tokens = output[:, ids.shape[1] :].tolist()
        return generated


if __name__ == "__main__":
    side.main(Transformers)
