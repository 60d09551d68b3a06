"""The garbage collector while large libraries are imported, torch that is there, turns."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest

from router.serve.process import collector_paused, torch_hidden


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_rests_and_is_as_it_was_again(was_enabled: bool) -> None:
    try:
        (gc.enable if was_enabled else gc.disable)()
        with suppress(ImportError), collector_paused():
            assert not gc.isenabled()
            raise ImportError("no such library")
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()


def test_torch_that_is_there_stays() -> None:
    import torch

    with torch_hidden():
        assert sys.modules["torch"] is torch
    assert sys.modules["torch"] is torch


TURNS_ARE_TAKEN = """
import json, os, sys, threading
from router.serve.process import take_turns

before, after = threading.Barrier(3), threading.Barrier(3)
told = {}

def told_of(name):
    before.wait()
    after.wait()
    told[name] = os.sched_getscheduler(0)

def keeps():
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    told_of("kept")

threads = [threading.Thread(target=keeps), threading.Thread(target=told_of, args=("old",))]
for thread in threads:
    thread.start()
before.wait()
take_turns()
after.wait()
later = threading.Thread(target=lambda: told.update(new=os.sched_getscheduler(0)))
later.start()
for thread in (*threads, later):
    thread.join()
print(json.dumps(told | {"main": os.sched_getscheduler(0)}))
"""


def test_all_threads_take_turns_but_one_with_a_policy_of_its_own() -> None:
    said = subprocess.run(
        [sys.executable, "-c", TURNS_ARE_TAKEN], capture_output=True, timeout=300, check=True
    )
    batch = os.SCHED_BATCH
    expected = {"main": batch, "old": batch, "new": batch, "kept": os.SCHED_IDLE}
    assert json.loads(said.stdout) == expected
