"""Folders that the workshop has made, of every family, on a real deployment as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster_fixture import ServedCluster, greedy
from tests.made_folders import PROMPTS, expected_tokens, make_folders, make_upcycled, served_beside
from tests.unit.workshop.folders.families import TRANSFORMERS

AT_ONCE = 2
"""Families that are deployed together; each has two models, with a router each."""


@pytest.mark.timeout(900)
def test_made_folders_are_served_with_transformers_tokens(
    served: ServedCluster, tmp_path: Path
) -> None:
    folders = make_folders(list(TRANSFORMERS), tmp_path) | make_upcycled(tmp_path)
    names = list(folders)
    for begin in range(0, len(names), 2 * AT_ONCE):
        some = {name: folders[name] for name in names[begin : begin + 2 * AT_ONCE]}
        with served_beside(served, some) as cluster:
            for name, folder in some.items():
                for prompt, count in PROMPTS:
                    sampling = greedy(count)
                    [reply] = cluster.client.generate(prompt, sampling, model=name, timeout_s=60)
                    assert reply.exact
                    assert reply.token_ids == expected_tokens(folder, prompt, count), name
