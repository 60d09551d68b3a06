"""llama.cpp's adapter, by the wheel ``llama-cpp-py-sync``; see :mod:`benchmarks.peers.side`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers import batches, side

FLASH_ATTENTION_OFF = 0


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, task: side.Task) -> None:
        """Load it, with room for all sequences at once."""
        import llama_cpp_py_sync
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.version = f"llama-cpp-py-sync {llama_cpp_py_sync.__version__}"
        self._lib, self._ffi = lib, _ = get_lib(), get_ffi()
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(
            task.model.encode(), lib.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {task.model}")
        self._num_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._context = lib.llama_init_from_model(self._model, self._parameters(task))
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._batch = lib.llama_batch_init(task.context, 0, 1)

    def _parameters(self, task: side.Task) -> Any:
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = task.context
        parameters.n_seq_max = len(task.prompts)
        parameters.n_threads = parameters.n_threads_batch = task.threads
        cache_type = batches.GGML_F32 if task.format == "F32" else batches.GGML_F16
        parameters.type_k = parameters.type_v = cache_type
        parameters.flash_attn_type = FLASH_ATTENTION_OFF
        return parameters

    def clear(self) -> None:
        """Forget all sequences."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def step(self, rows: Sequence[batches.Row]) -> list[int]:
        """Compute a batch; returns the next tokens of the rows that want one."""
        batch = self._batch
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i] = row.token, row.position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row.sequence
            batch.logits[i] = row.wants_next
        batch.n_tokens = len(rows)
        if status := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._most_likely(i) for i, row in enumerate(rows) if row.wants_next]

    def _most_likely(self, row: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, row)
        values = self._ffi.buffer(logits, 4 * self._num_vocab)
        return int(np.frombuffer(values, np.float32).argmax())

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> side.Tokens:
        """Return the greedy tokens of each prompt."""
        return batches.generate(self, prompts, tokens)


if __name__ == "__main__":
    side.main(LlamaCpp)
