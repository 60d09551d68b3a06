"""Actors with and without the native code: their classes are reported, and the mix is announced."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts.compute.native_ffn import kernel_class
from tests.fault.programs import run

LIMIT_S = 280.0


@pytest.mark.timeout(300)
def test_status_and_log_say_which_kernels_are_mixed(tmp_path: Path) -> None:
    told = run("mixed_kernels", str(tmp_path), limit_s=LIMIT_S)
    native = kernel_class("float32")
    assert told["classes"]["native-0"] == told["classes"]["native-1"] == [native]
    [plain] = told["classes"]["plain-0"]
    assert plain.startswith("torch-")
    mixed = f"{native} on 2 actors, {plain} on 1"
    [kernels] = told["json"]
    assert (kernels["model"], kernels["mixed"]) == ("random", mixed)
    assert [(c["kernel_class"], c["processes"]) for c in kernels["actors"]] == [
        (native, 2),
        (plain, 1),
    ]
    assert [(c["kernel_class"], c["processes"]) for c in kernels["routers"]] == [
        (told["routers"][0], 1)
    ]
    assert f"random is mixed: {mixed}" in told["text"].splitlines()
    [line] = told["mixed"]
    assert f"the kernels of random are mixed: {mixed};" in line
    [line] = told["by_torch"]
    assert f"({plain}): the package was installed without its native code" in line
    assert told["wrong"] == 0  # in fp32 the classes differ in last bits, and these tokens do not
