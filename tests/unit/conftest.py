"""What unit tests share: a little text, and one thread for what must give the same bits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer.testing

from tests.unit.workshop.train.training_runs import write_grammar


@pytest.fixture(scope="session", autouse=True)
def commands_read_once() -> Iterator[None]:
    """Let typer read the parameters of some thirty commands once, not for each call of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.testing._get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="package", autouse=True)
def greetings_have_time() -> Iterator[None]:
    """Let a connection begin late: beside other work, a handshake may take over five seconds.

    In unit tests alone: a simulated world has its own time.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.transport.stream.connect.CONNECT_TIMEOUT_S", 60.0)
        patch.setattr("cluster.transport.stream.server.HELLO_TIMEOUT_S", 60.0)
        patch.setattr("router.messages.link.CONNECT_TIMEOUT_S", 60.0)
        patch.setattr("router.messages.link.HELLO_TIMEOUT_S", 60.0)
        yield


@pytest.fixture(scope="session")
def grammar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that a tiny model learns in a few steps."""
    return write_grammar(tmp_path_factory.mktemp("text") / "grammar.txt")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch use one thread, on which training is a function of its seed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
