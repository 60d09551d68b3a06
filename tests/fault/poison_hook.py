"""Makes the processes of a Ray end at poison: routers at a prompt, expert actors at a hidden state.

Ray runs :func:`arm` in each of its processes, as a ``worker_process_setup_hook``. Two variables of
the environment name files: ``POISON_ROWS`` has the hidden states, one after the other, and
``POISON_DEATHS`` gets a line for each process that ended.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ROUTER_POISON = [11, 7, 11, 13]
"""Tokens of a prompt at which a router's process ends, in its first step with them."""
ROWS, DEATHS = "POISON_ROWS", "POISON_DEATHS"
ROW_BYTES = 64 * 4
"""As :data:`tests.poison.ROW_BYTES`, which needs torch."""


class _Patches(MetaPathFinder):
    """Patches modules once they are imported; most processes never import them."""

    def __init__(self, patches: dict[str, Callable[[ModuleType], None]]) -> None:
        self._patches = patches

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return the module's own spec, with a loader that patches."""
        patch = self._patches.pop(fullname, None)
        spec = None if patch is None else find_spec(fullname)
        if patch is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def patched(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = patched  # type: ignore[method-assign]
        return spec


def arm() -> None:
    """Let this process end at poison."""
    patches = {"router.messages.request": _poison_requests, "experts.bank": _poison_rows}
    sys.meta_path.insert(0, _Patches(patches))


def _poison_requests(module: ModuleType) -> None:
    request_class = module.GenerationRequest
    from_wire = request_class.from_wire

    class Poisoned(request_class):  # type: ignore[misc, valid-type]
        """A request at which the process ends as soon as a step asks for its contract."""

        @property
        def on_expert_loss(self) -> str:
            if threading.current_thread().name == "engine":
                die("router")
            return "strict"

        @on_expert_loss.setter
        def on_expert_loss(self, value: str) -> None:
            pass

    def poisoned_from_wire(wire: dict[str, Any]) -> Any:
        request = from_wire(wire)
        if list(request.prompt_token_ids) != ROUTER_POISON:
            return request
        names = request_class.__dataclass_fields__
        return Poisoned(**{name: getattr(request, name) for name in names})

    request_class.from_wire = poisoned_from_wire


def _poison_rows(module: ModuleType) -> None:
    compute = module.ExpertBank.compute
    hold = module.NativeFastPath.hold

    def hold_for_python(fast_path: Any, key: Any, ffn: Any, tokens: Any) -> None:
        hold(fast_path, key, None, tokens)  # native code calls nothing that could be replaced

    module.NativeFastPath.hold = hold_for_python
    rows = Path(os.environ[ROWS]).read_bytes()
    poison = {rows[at : at + ROW_BYTES] for at in range(0, len(rows), ROW_BYTES)}

    def poisoned_compute(bank: Any, frames: Sequence[Any]) -> Any:
        for frame in frames:
            data = bytes(frame.rows)
            if poison & {data[at : at + ROW_BYTES] for at in range(0, len(data), ROW_BYTES)}:
                die("actor")
        return compute(bank, frames)

    module.ExpertBank.compute = poisoned_compute


def die(what: str) -> None:
    """End this process as a fault of its memory would."""
    with Path(os.environ[DEATHS]).open("a") as file:
        file.write(f"{what} {os.getpid()}\n")
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()
