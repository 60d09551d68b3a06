"""ik_llama.cpp's adapter, by ``ik-llama-cpp-python``; see :mod:`benchmarks.peers.side`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np

from benchmarks.peers import batches, side


class IkLlamaCpp(batches.LlamaPeer):
    """A GGUF file in ik_llama.cpp, its matrices repacked for this processor while loading."""

    def __init__(self, task: side.Task) -> None:
        """Load it."""
        from ik_llama_cpp import _ctypes_api

        self.version = f"ik-llama-cpp-python {version('ik-llama-cpp-python')}"
        self.library = _ctypes_api
        parameters = self.library.llama_model_default_params()
        parameters.use_mmap = False  # repacked weights are no file's
        parameters.repack_tensors = True
        self.load(task, parameters)

    def set_cache(self, parameters: Any, task: side.Task) -> None:
        """Keep keys and values in fp16: without flash attention there is no other cache."""
        parameters.flash_attn = False  # with several sequences it aborts
        parameters.type_k = parameters.type_v = batches.GGML_F16

    def clear(self) -> None:
        """Forget all sequences."""
        self.library.llama_kv_cache_clear(self.context)

    def most_likely(self, logits: Any) -> int:
        """Return the token whose logit is the largest."""
        return int(np.ctypeslib.as_array(logits, (self.num_vocab,)).argmax())


if __name__ == "__main__":
    side.main(IkLlamaCpp)
