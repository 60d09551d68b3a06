"""The memory of this host that processes may take."""

from __future__ import annotations

from pathlib import Path

import psutil

from cluster.memory import Memory, memory


def test_memory_is_the_machines_or_less() -> None:
    found, whole = memory(), psutil.virtual_memory()
    assert 0 < found.available_bytes <= found.total_bytes <= whole.total


def test_a_containers_limit_counts_and_file_cache_does_not(tmp_path: Path) -> None:
    without = memory(tmp_path)
    assert without.total_bytes == psutil.virtual_memory().total
    files = {
        "memory.max": "50000000\n",
        "memory.current": "30000000\n",
        "memory.stat": "anon 20000000\ninactive_file 10000000\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert memory(tmp_path) == Memory(50_000_000, 30_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory(tmp_path).total_bytes == without.total_bytes


def test_the_older_kind_of_container_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    files = {"limit_in_bytes": "1000", "usage_in_bytes": "1500"}
    for name, text in files.items():
        (tmp_path / "memory" / f"memory.{name}").write_text(text)
    (tmp_path / "memory" / "memory.stat").write_text("total_inactive_file 100")
    assert memory(tmp_path) == Memory(1000, 0)
