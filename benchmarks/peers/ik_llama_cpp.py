"""ik_llama.cpp's adapter, by ``ik-llama-cpp-python``; see :mod:`benchmarks.peers.side`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from benchmarks.peers import batches, side


class IkLlamaCpp:
    """A GGUF file in ik_llama.cpp, its matrices repacked for this processor while loading."""

    def __init__(self, task: side.Task) -> None:
        """Load it, with room for all sequences at once."""
        from ik_llama_cpp import _ctypes_api

        self.version = f"ik-llama-cpp-python {version('ik-llama-cpp-python')}"
        self._api: Any = _ctypes_api
        self._api.llama_backend_init()
        parameters = self._api.llama_model_default_params()
        parameters.use_mmap = False  # repacked weights are no file's
        parameters.repack_tensors = True
        self._model = self._api.llama_model_load_from_file(task.model.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"ik_llama.cpp cannot load {task.model}")
        vocab = self._api.llama_model_get_vocab(self._model)
        self._num_vocab = self._api.llama_vocab_n_tokens(vocab)
        self._context = self._api.llama_init_from_model(self._model, self._parameters(task))
        if not self._context:
            raise RuntimeError("ik_llama.cpp cannot make a context")
        self._batch = self._api.llama_batch_init(task.context, 0, 1)

    def _parameters(self, task: side.Task) -> Any:
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = task.context
        parameters.n_seq_max = len(task.prompts)
        parameters.n_threads = parameters.n_threads_batch = task.threads
        parameters.flash_attn = False  # with several sequences it aborts
        # Without flash attention there is no other cache, beside weights in fp32 too.
        parameters.type_k = parameters.type_v = batches.GGML_F16
        return parameters

    def clear(self) -> None:
        """Forget all sequences."""
        self._api.llama_kv_cache_clear(self._context)

    def step(self, rows: Sequence[batches.Row]) -> list[int]:
        """Compute a batch; returns the next tokens of the rows that want one."""
        batch = self._batch
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i] = row.token, row.position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row.sequence
            batch.logits[i] = row.wants_next
        batch.n_tokens = len(rows)
        if status := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._most_likely(i) for i, row in enumerate(rows) if row.wants_next]

    def _most_likely(self, row: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._num_vocab,)).argmax())

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> side.Tokens:
        """Return the greedy tokens of each prompt."""
        return batches.generate(self, prompts, tokens)


if __name__ == "__main__":
    side.main(IkLlamaCpp)
