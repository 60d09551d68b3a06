"""The names that people import."""

from __future__ import annotations

import subprocess
import sys

import cluster.errors
import expertmesh
import router.client
from workshop.estimators import estimators


def public(module: object) -> set[str]:
    return {name for name in dir(module) if name[0].isupper()} - {"TYPE_CHECKING", "Any"}


def test_each_name_is_that_of_its_module() -> None:
    modules = (router.client, estimators, cluster.errors)
    for name in public(expertmesh):
        [home] = [module for module in modules if hasattr(module, name)]
        assert getattr(expertmesh, name) is getattr(home, name)
    classes = {name for name in router.client.__all__ if not name.isupper()}
    assert classes | {*estimators.__all__} <= public(expertmesh)


def test_a_name_loads_its_module_and_no_other() -> None:
    program = """
import sys
import expertmesh
ours = {"cluster", "experts", "router", "workshop"}
assert not ours & {*sys.modules}, "the import loads"
from expertmesh import Client
assert "router.client" in sys.modules
assert not {"torch", "ray", "numpy", "workshop"} & {*sys.modules}
try:
    from expertmesh import Clint
except ImportError as error:
    assert "Clint" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
