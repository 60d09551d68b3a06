"""The garbage collector while large libraries are imported, torch where none is needed, turns."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from router.gateway.tokenizer import Tokenizer
from router.serve.process import collector_paused, torch_hidden


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_rests_and_is_as_it_was_again(was_enabled: bool) -> None:
    (gc.enable if was_enabled else gc.disable)()
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled() == was_enabled


def test_an_import_that_fails_does_not_leave_it_off() -> None:
    with pytest.raises(ImportError), collector_paused():
        raise ImportError("no such library")
    assert gc.isenabled()


GATEWAY_STARTS = """
import json, sys
import router.serve.gateway
from router.gateway.tokenizer import Tokenizer
from router.serve.process import torch_hidden

with torch_hidden():
    tokenizer = Tokenizer.load("deploy/models/mesh-tiny")
loaded = [name for name in sys.modules if name.split(".")[0] == "torch"]
ids = tokenizer.encode("In the beginning, again and again 42.")
text = tokenizer.decode(ids)
chat = tokenizer._tokenizer.apply_chat_template(
    [{"role": "user", "content": "a"}], chat_template="{{ messages[0].content }}!", tokenize=False
)
import torch
print(json.dumps([loaded, ids, text, chat, torch.ones(2).sum().item()]))
"""


def test_a_gateway_loads_and_uses_tokenizers_without_torch_which_may_come_later() -> None:
    said = subprocess.run(
        [sys.executable, "-c", GATEWAY_STARTS], capture_output=True, timeout=60, check=True
    )
    loaded, ids, text, chat, total = json.loads(said.stdout)
    tokenizer = Tokenizer.load("deploy/models/mesh-tiny")  # in this process, which has torch
    assert loaded == []
    assert ids == tokenizer.encode("In the beginning, again and again 42.")
    assert text == "In the beginning, again and again 42."
    assert (chat, total) == ("a!", 2.0)


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
        [sys.executable, "-c", TURNS_ARE_TAKEN], capture_output=True, timeout=60, check=True
    )
    batch = os.SCHED_BATCH
    expected = {"main": batch, "old": batch, "new": batch, "kept": os.SCHED_IDLE}
    assert json.loads(said.stdout) == expected
