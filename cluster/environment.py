"""The environment variables of every process that a deployment starts.

The C library, OpenMP, oneDNN, torch and Ray read them when a process starts, so that they are part
of what Ray is asked for. Serve's replicas and the expert actors inherit all other variables.
"""

from __future__ import annotations

SERVING_ENVIRONMENT = {
    # Ray sets nice 15 only once a worker has started. While one starts, as after a fault, it would
    # slow the processes that serve beside it.
    "RAY_worker_niceness": "0",
    # A heap per thread would keep memory that no other thread reuses, and grow for hours.
    "MALLOC_ARENA_MAX": "1",
    # Arguments and results up to this size travel inside the call. Ray's default of 100 KB is
    # less than a step's rows of a large model, and through the object store a call takes twice as
    # long.
    "RAY_max_direct_call_object_size": "1048576",
}
"""Of the controller, and part of the environment of all other processes."""

GATEWAY_ENVIRONMENT = {
    **SERVING_ENVIRONMENT,
    # A gateway hides torch from transformers, which would warn that there is none.
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}

# Each shape of a product costs 0.5 MB of code compiled by oneDNN and 0.5 MB of torch's description
# of it a thread. Both caches keep 1024 shapes by default, and prompts bring ever new numbers of
# rows.
_ONEDNN_SHAPES = "32"


def router_environment(threads: int) -> dict[str, str]:
    """Return the environment of a router with this number of compute threads."""
    return {
        **SERVING_ENVIRONMENT,
        "OMP_NUM_THREADS": str(threads),
        # The next layer of a prefill reuses the heap of the last one; fresh pages cost more than
        # the router's own work in a layer. 32 MB is glibc's limit for the first; the rows of 512
        # tokens of a large model are 8 MB.
        "MALLOC_MMAP_THRESHOLD_": "33554432",
        "MALLOC_TRIM_THRESHOLD_": "67108864",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": _ONEDNN_SHAPES,
        "LRU_CACHE_CAPACITY": "16",  # a decode step has five shapes
    }


def actor_environment(threads: int) -> dict[str, str]:
    """Return the environment of an expert actor with this number of compute threads."""
    return {
        **SERVING_ENVIRONMENT,
        # Threads that start after torch.set_num_threads obey the environment alone.
        "OMP_NUM_THREADS": str(threads),
        # Rearranged weights stay out of the heap; plain weights never lie in it.
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        # The next products reuse the heap of the last ones; fresh pages cost more.
        "MALLOC_TRIM_THRESHOLD_": "33554432",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": _ONEDNN_SHAPES,
        "LRU_CACHE_CAPACITY": "1",
    }
