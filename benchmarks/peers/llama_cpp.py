"""llama.cpp's adapter, by the wheel ``llama-cpp-py-sync``; see :mod:`benchmarks.peers.side`."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.peers import batches, side

FLASH_ATTENTION_OFF = 0


class LlamaCpp(batches.LlamaPeer):
    """A GGUF file in llama.cpp."""

    def __init__(self, task: side.Task) -> None:
        """Load it."""
        import llama_cpp_py_sync
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.version = f"llama-cpp-py-sync {llama_cpp_py_sync.__version__}"
        self.library, self._ffi = get_lib(), get_ffi()
        self.load(task, self.library.llama_model_default_params())

    def set_cache(self, parameters: Any, task: side.Task) -> None:
        """Keep keys and values in fp16, beside weights in fp32 in fp32."""
        cache_type = batches.GGML_F32 if task.format == "F32" else batches.GGML_F16
        parameters.type_k = parameters.type_v = cache_type
        parameters.flash_attn_type = FLASH_ATTENTION_OFF

    def clear(self) -> None:
        """Forget all sequences."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def most_likely(self, logits: Any) -> int:
        """Return the token whose logit is the largest."""
        values = self._ffi.buffer(logits, 4 * self.num_vocab)
        return int(np.frombuffer(values, np.float32).argmax())


if __name__ == "__main__":
    side.main(LlamaCpp)
