"""The environment variables of every process that a deployment starts.

The C library, OpenMP, oneDNN, torch and Ray read these variables when a process starts. So each
request to Ray for a process contains them. Serve's replicas and the expert actors inherit all other
variables.
"""

from __future__ import annotations

SERVING_ENVIRONMENT = {
    # A niceness of 15, Ray's default, comes only after a worker has started. A worker that starts
    # would slow the serving processes beside it.
    "RAY_worker_niceness": "0",
    # With a heap per thread, no thread reuses the memory of another, and memory grows for hours.
    "MALLOC_ARENA_MAX": "1",
    # Arguments and results up to this size travel inside the call. The rows of a large model's
    # step are larger than Ray's default of 100 KB. Through the object store a call takes twice as
    # long.
    "RAY_max_direct_call_object_size": "1048576",
}
"""The controller's environment, and a part of the environment of all other processes."""

GATEWAY_ENVIRONMENT = {
    **SERVING_ENVIRONMENT,
    # A gateway hides torch from transformers. transformers would warn that torch is missing.
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}

# For each shape of a matrix product, and in each thread, oneDNN caches 0.5 MB of compiled code and
# torch 0.5 MB of descriptors. Both caches keep 1024 shapes by default. Prompts bring ever new
# numbers of rows.
_ONEDNN_SHAPES = "32"


def router_environment(threads: int) -> dict[str, str]:
    """Return the environment of a router with this number of compute threads."""
    return {
        **SERVING_ENVIRONMENT,
        "OMP_NUM_THREADS": str(threads),
        # Each layer of a prefill reuses the heap of the layer before: fresh pages cost more than
        # the router's own work in a layer. The rows of 512 tokens of a large model are 8 MB. 32 MB
        # is glibc's largest threshold for mmap.
        "MALLOC_MMAP_THRESHOLD_": "33554432",
        "MALLOC_TRIM_THRESHOLD_": "67108864",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": _ONEDNN_SHAPES,
        "LRU_CACHE_CAPACITY": "16",  # a decode step has five shapes
    }


def actor_environment(threads: int) -> dict[str, str]:
    """Return the environment of an expert actor with this number of compute threads."""
    return {
        **SERVING_ENVIRONMENT,
        # For the products of numpy, of scikit-learn, and of torch where torch computes experts.
        "OMP_NUM_THREADS": str(threads),
        # Rearranged weights stay out of the heap. Plain weights have pages of their own.
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        # The next products reuse the heap of the products before: fresh pages cost more.
        "MALLOC_TRIM_THRESHOLD_": "33554432",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": _ONEDNN_SHAPES,
        "LRU_CACHE_CAPACITY": "1",
    }
