"""README's mixture of SmolLM2: its commands as they stand, and a conversation with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.shipped import DEPLOYED, free_ports
from tests.readme import ROOT, blocks
from tests.serve_run import copy_with_ports, serve_run, wait_ready
from workshop.folders.card import RECORD_FILE, Record

README = ROOT / "README.md"
INSTALL = "pip install '.[gguf]' && "
"""The beginning of the commands that has been run before any test runs."""
SERVE = "expertmesh serve deploy/smol.yaml\n"
MADE_S, CHAT_S = 900.0, 120.0
EXACT = 1e-4
"""How far the mixture's perplexity may be from the dense model's, as a share of it."""
QUESTIONS = """\
What is the capital of France?
What language do people speak there?
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run README's commands before the last in a folder of their own; gives ``deploy``."""
    [block] = [b.text for b in blocks(README.read_text(encoding="utf-8")) if SERVE in b.text]
    command, is_served, after = block.partition(SERVE)
    assert is_served
    assert not after
    assert command.startswith(INSTALL)
    place = tmp_path_factory.mktemp("smol")
    (place / "deploy" / "models").mkdir(parents=True)
    shutil.copytree(ROOT / "docs", place / "docs")
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    subprocess.run(
        ["bash", "-ec", command.removeprefix(INSTALL)],
        cwd=place,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        timeout=MADE_S,
        check=True,
    )
    yield place / "deploy"
    shutil.rmtree(place)


@pytest.mark.timeout(MADE_S + 100)
def test_its_card_says_that_it_is_exact_and_what_fewer_parts_cost(folder: Path) -> None:
    text = (folder / "models" / "smol" / RECORD_FILE).read_text(encoding="utf-8")
    figures = Record.model_validate_json(text).figures
    assert figures is not None
    assert figures.perplexity_after == pytest.approx(figures.perplexity_before, rel=EXACT)
    by_active = sorted(figures.perplexity_by_active.items(), reverse=True)
    perplexities = [figures.perplexity_after, *[perplexity for _, perplexity in by_active]]
    assert len(by_active) >= 3
    assert perplexities == sorted(perplexities)
    assert figures.speeds is not None
    assert list(figures.speeds.tokens_per_s_by_active) == list(figures.perplexity_by_active)


@pytest.mark.timeout(MADE_S + 300)
def test_the_mixture_of_readme_holds_a_conversation(folder: Path) -> None:
    http_port, grpc_port = free_ports(2)
    file = copy_with_ports(folder, http_port, grpc_port, DEPLOYED.parent / "smol.yaml")
    # The file's path is one of the `deploy` that README's commands have written to.
    text = file.read_text()
    file.write_text(text.replace("path: models/smol", f"path: {folder / 'models' / 'smol'}"))
    log = folder / "log"
    with serve_run(file, log) as process:
        wait_ready(process, log, http_port)
        done = subprocess.run(
            [
                Path(sysconfig.get_path("scripts")) / "expertmesh",
                *("chat", "--address", f"127.0.0.1:{grpc_port}"),
                *("--seed", "3"),
            ],
            input=QUESTIONS,
            capture_output=True,
            text=True,
            timeout=CHAT_S,
            check=True,
        )
    assert done.stdout.startswith("The capital of France is Paris."), done.stdout
    assert "French" in done.stdout, done.stdout
