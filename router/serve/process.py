"""The start of a process of Serve: imports, garbage collector, logging, its place among others."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from cluster.errors import ExpertMeshError


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector from running while large libraries are imported.

    The imports make hundreds of thousands of objects that all stay. Collecting among them takes a
    fifth of the time in which torch and transformers are imported.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def torch_hidden() -> Iterator[None]:
    """Keep torch from being imported, in a process that computes nothing.

    transformers imports torch where it finds it, although tokenizers do not need it. Without torch
    a gateway starts two seconds sooner and takes 200 MB less. transformers keeps the answer of its
    first import. Where torch is imported already, nothing is hidden.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # import and find_spec see no torch
    try:
        yield
    finally:
        del sys.modules["torch"]


FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LOG_FORMAT_VARIABLE, JSON = "EXPERTMESH_LOG_FORMAT", "json"


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's time (UTC), level, logger, process and message, and its stack."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told = {"at": at, "level": record.levelname, "logger": record.name, "pid": record.process}
        told["message"] = record.getMessage()
        if record.exc_info:
            told["stack"] = self.formatException(record.exc_info)
        return json.dumps(told)


def setup_logging() -> None:
    """Send the ``expertmesh`` loggers to the process's original stderr, whatever Serve's level is.

    Serve may have replaced ``sys.stderr`` by a file; the terminal of ``serve run`` shows the
    original one alone.
    """
    root = logging.getLogger("expertmesh")
    if not root.handlers:
        handler = logging.StreamHandler(sys.__stderr__)
        is_json = os.environ.get(LOG_FORMAT_VARIABLE) == JSON
        handler.setFormatter(
            JsonFormatter() if is_json else logging.Formatter(FORMAT, datefmt="%Y-%m-%d %H:%M:%S")
        )
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False


@contextmanager
def failures_logged(name: str) -> Iterator[None]:
    """Log an exception that Serve would write to a file only, as one of ``name``'s start."""
    try:
        yield
    except Exception as error:
        stack = None if isinstance(error, ExpertMeshError) else error
        logging.getLogger("expertmesh").error("%s could not start: %s", name, error, exc_info=stack)
        raise


def take_turns() -> None:
    """Let no thread of this process interrupt another process the moment that it wakes.

    Gateways and controllers wake often, for little. Each time an expert actor that
    computes on the same core would stand still, and its router would wait for it. By
    ``SCHED_BATCH`` (sched(7)) a thread has the same share of the processor, but waits until the
    other's turn is over. Threads and processes that are started later have it from these. A policy
    that the process was started with stays, and so does every process that may not change its own.
    """
    if sys.platform != "linux":
        return
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread has ended, or the system forbids it
            thread_id = int(thread.name)
            if os.sched_getscheduler(thread_id) == os.SCHED_OTHER:
                os.sched_setscheduler(thread_id, os.SCHED_BATCH, os.sched_param(0))
