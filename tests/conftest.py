"""The one cluster of a test session, and the order of the tests: quick ones first, faults last."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.cluster_fixture import ServedCluster, Shape, served_cluster

# A shell starts its background jobs deaf to Ctrl-C, and what tests start would be deaf too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Keys that tests write are private, and so is the token of their Rays, whatever this user's is.
os.umask(0o077)
if "RAY_AUTH_TOKEN_PATH" not in os.environ:
    token = Path(tempfile.mkdtemp(prefix="expertmesh-token-")) / "auth_token"
    token.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    atexit.register(shutil.rmtree, token.parent)
# A busy machine takes longer for an example than hypothesis allows.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
# To look for garbage among all that is imported takes as long as the imports.
gc.disable()

ORDER = ("world", "unit", "integration", "fault", "long")
"""The worlds come before anything has started a thread, since they replace the clock."""
LAST = ("other_weights", "mixtures", "place_that_ends")
"""Fixtures whose tests come last. The deployment of mixtures also brings the cluster's own weights
back."""
ALONE = ("integration", "fault", "long")
"""The tests that have a cluster: it is one worker's, and these come when no other work is left."""
COMMANDS = ("test_readme.py", "test_serve_run.py")
"""Their commands start a Ray of their own, so another worker runs them beside the cluster."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that break the cluster after those that look at a fresh one."""
    places = {folder: place for place, folder in enumerate(ORDER)}

    def place_of(item: pytest.Item) -> tuple[int, int]:
        used = getattr(item, "fixturenames", ())
        place = places.get(item.path.parent.name, places["unit"])
        return place, next((rank for rank, name in enumerate(LAST, 1) if name in used), 0)

    items.sort(key=place_of)


class _ByFile(LoadScopeScheduling):
    """Give each worker the tests of a file at a time, in the order of collection."""

    def _split_scope(self, nodeid: str) -> str:
        """Return the name of what one worker runs: a file, or all that has a cluster."""
        file = PurePath(nodeid.partition("::")[0])
        has_cluster = file.parent.name in ALONE and file.name not in COMMANDS
        return "cluster" if has_cluster else str(file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByFile | None:
    """Share the tests out, with ``-n``, so that at first two workers run what needs no cluster.

    With a ``--dist`` of its own, a run has the scheduler of that name.
    """
    if config.option.dist != "load":
        return None
    config.option.loadscopereorder = False
    return _ByFile(config, log)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Undo what a test sets of logging that plays a process of the cluster, as a world does."""
    logger = logging.getLogger("expertmesh")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(scope="session")
def served_session(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedCluster]:
    """Start the cluster for the first test that asks for it.

    Tests that need another shape give it as an indirect parameter, and get a cluster of their own
    after this one.
    """
    shape = getattr(request, "param", Shape())
    with served_cluster(tmp_path_factory.mktemp("checkpoints") / "random", shape) as cluster:
        yield cluster


@pytest.fixture
def served(served_session: ServedCluster) -> ServedCluster:
    """Give the cluster once it is whole, with what its arguments say."""
    served_session.restore()
    served_session.wait_whole()
    return served_session


def pytest_collection_finish() -> None:
    """Have garbage collected from now on, except for what lives to the end: tests and modules."""
    gc.freeze()
    gc.set_threshold(20_000)  # tests make many objects, and little garbage
    gc.enable()
