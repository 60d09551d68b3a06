"""What each process imports: no library that it never calls. One interpreter is asked all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from router.gateway.input.tokenizer import Tokenizer
from router.model.lean_transformers import UNUSED

HEAVY = {
    "router.client": ("torch", "ray", "transformers", "numpy", "router.gateway"),
    "router.config.deployment": ("torch", "ray", "transformers", "numpy"),
    "router.cli.app": ("torch", "ray", "transformers", "tokenizers", "numpy", "fastapi"),
    "workshop.folders.merge.command": ("ray", "pandas"),
    "router.ops.startup.preflight": ("torch", "transformers", "cluster.controller"),
    "router.serve.gateway": ("torch", "transformers", "cluster.controller.controller"),
    "router.serve.router": ("torch", "transformers", "cluster.controller.controller"),
    "router.app": ("torch", "transformers"),
    "router.serve.controller": ("torch", "transformers"),
}
"""What each module may not import, in an order in which none needs what a later one may not."""
TEXT = "In the beginning, again and again 42."
PROGRAM = """
import gc, importlib.util, json, os, sys, traceback

gc.disable()  # it would look for garbage among all that is imported

heavy, unused, text = json.loads(sys.argv[1])
MERGE = "workshop.folders.merge.command"

def heavy_of(*modules):
    told = {}
    for module in modules:
        importlib.import_module(module)
        told[module] = [name for name in heavy[module] if name in sys.modules]
    return told

def asked(question, *arguments):
    "Ask in a copy of this process, and wait: the copy's imports are not this one's."
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            os.write(writer, json.dumps(question(*arguments)).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(pid, 0)
    return json.loads(os.read(reader, 10_000))

def with_torch():
    import torch
    of_merge = asked(heavy_of, MERGE)
    import router.engine.replica, transformers.models.mixtral.modeling_mixtral
    found = [name for name in unused if name in sys.modules]
    import scipy.optimize, PIL.Image
    return of_merge, found

def a_gateways():
    from router.gateway.input.tokenizer import Tokenizer
    from router.serve.process import torch_hidden
    with torch_hidden():
        tokenizer = Tokenizer.load("deploy/models/mesh-tiny")
    loaded = [name for name in sys.modules if name.split(".")[0] == "torch"]
    ids = tokenizer.encode(text)
    chat = tokenizer._tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], chat_template="{{ messages[0].content }}!",
        tokenize=False,
    )
    may_come = importlib.util.find_spec("torch") is not None
    return [loaded, ids, tokenizer.decode(ids), chat, may_come]

first, later = (modules.split() for modules in (
    "router.client router.config.deployment router.cli.app",
    "router.ops.startup.preflight router.serve.gateway router.serve.router router.app "
    "router.serve.controller"))
told = heavy_of(*first)
of_merge, router = asked(with_torch)
import ray.serve
told |= of_merge | heavy_of(*later)
print(json.dumps({"heavy": told, "router": router, "gateway": a_gateways()}))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    given = json.dumps([HEAVY, UNUSED, TEXT])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, given], stdout=subprocess.PIPE, timeout=100, check=True
    )
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("module", HEAVY)
def test_what_must_start_soon_starts_without_heavy_imports(
    told: dict[str, Any], module: str
) -> None:
    assert told["heavy"][module] == []


def test_a_router_has_none_of_what_transformers_could_use_and_may_import_it_later(
    told: dict[str, Any],
) -> None:
    assert told["router"] == []


def test_a_gateway_loads_and_uses_tokenizers_without_torch_which_may_come_later(
    told: dict[str, Any],
) -> None:
    loaded, ids, text, chat, torch_may_come = told["gateway"]
    tokenizer = Tokenizer.load("deploy/models/mesh-tiny")  # in this process, which has torch
    assert loaded == []
    assert ids == tokenizer.encode(TEXT)
    assert (text, chat, torch_may_come) == (TEXT, "a!", True)
