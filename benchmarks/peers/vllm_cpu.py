"""vLLM's adapter; see :mod:`benchmarks.peers.side`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from benchmarks.peers import side

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Vllm:
    """A model in vLLM's engine, without a tokenizer."""

    def __init__(self, task: side.Task) -> None:
        """Load it on all cores, with room for all sequences at once.

        Prefix caching is off: each round has the prompts of the round before.
        """
        # vLLM leaves a core to its API server by default, which does not exist here.
        cores = sorted(os.sched_getaffinity(0))[: task.threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
        os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
        if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
            _use_avx2_alone()
        from vllm import LLM, SamplingParams, __version__

        self.version = f"vllm {__version__}"
        self._sampling = SamplingParams
        self._model = LLM(
            model=task.model,
            dtype=DTYPES[task.format],
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=task.context,
            max_num_seqs=len(task.prompts),
        )

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> side.Tokens:
        """Return the greedy tokens of each prompt."""
        sampling = self._sampling(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self._model.generate(requests, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def _use_avx2_alone() -> None:
    """Have vLLM choose its code as on a processor that ends at AVX2; it asks torch in Python."""
    import torch

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # another process would ask anew
    for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        getattr(torch.cpu, name)  # an AttributeError where torch has renamed it
        setattr(torch.cpu, name, lambda: False)


if __name__ == "__main__":
    side.main(Vllm)
