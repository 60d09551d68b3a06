"""The habits of the tree: short files, packages that import nothing by themselves."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from tests.readme import blocks

ROOT = Path(__file__).parents[2]
MAX_LINES, MAX_ENTRIES = 400, 20
REACHED = {
    ("cluster", "expertmesh", "experts", "router"): 57_400,
    ("workshop",): 14_200,
    ("benchmarks",): 9_890,
    ("tests",): 93_700,
}
"""The lines of Python that each may have. Raised by a stated number, when something asks for it."""
GENERATED = re.compile(r"(_pb2|_pb2_grpc|/client/sync)\.py$")
FIRST_SCREEN = 40
"""Lines of a document that a reader sees first."""
CLOCKS = ("time.monotonic", "time.perf_counter")
INSTANTS = ("_now_s", "_deadline_s", "_until_s", "_since_s", "_at_s")
PUBLIC = {
    "router/client/__init__.py": "users import the client from there",
    "expertmesh/__init__.py": "users import all else from there, lazily",
}
"""Packages whose ``__init__`` hands names on, and why."""


def product_files(suffix: str) -> list[Path]:
    """Return the product's files of one suffix but the generated ones."""
    found = [
        file
        for package in (
            "cluster",
            "expertmesh",
            "experts",
            "native",
            "router",
            "workshop",
            "deploy",
        )
        for file in sorted((ROOT / package).rglob(f"*{suffix}"))
        if not GENERATED.search(str(file))
    ]
    assert found, suffix
    return found


@functools.cache
def python_nodes() -> dict[Path, list[ast.AST]]:
    """Return the assignments and asserts of each of the product's Python files."""
    return {
        file: [
            node
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Assign | ast.Assert)
        ]
        for file in product_files(".py")
    }


@pytest.mark.parametrize("suffix", [".py", ".c", ".h"])
def test_no_file_is_long(suffix: str) -> None:
    lines = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in product_files(suffix)
    }
    assert {file: count for file, count in lines.items() if count > MAX_LINES} == {}


def test_no_folder_has_many_entries() -> None:
    """Of the product's code: a model's folder in ``deploy/`` has as many files as it has."""
    files = [
        file for suffix in (".py", ".c", ".h", ".yaml", ".proto") for file in product_files(suffix)
    ]
    entries: dict[Path, set[str]] = defaultdict(set)
    for file in files:
        below = file.relative_to(ROOT)
        for folder in below.parents[:-1]:
            entries[folder].add(below.relative_to(folder).parts[0])
    assert {folder: len(of) for folder, of in entries.items() if len(of) > MAX_ENTRIES} == {}


@pytest.mark.parametrize("folders", REACHED)
def test_the_lines_of_python_grow_only_by_intent(folders: tuple[str, ...]) -> None:
    files = [
        file
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
        if not GENERATED.search(str(file))
    ]
    count = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    most = REACHED[folders]
    assert 0.95 * most < count <= most, f"{count} lines; set what was reached in REACHED"


def is_clock(value: ast.expr) -> bool:
    """Return whether an expression is the time of a monotonic clock, or that and a duration."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return is_clock(value.left) or is_clock(value.right)
    return isinstance(value, ast.Call) and ast.unparse(value.func) in CLOCKS


def test_names_of_instants_differ_from_names_of_durations() -> None:
    found = 0
    wrong = set()
    for file, nodes in python_nodes().items():
        for node in nodes:
            if not isinstance(node, ast.Assign) or not is_clock(node.value):
                continue
            for target in node.targets:
                holder = target.value if isinstance(target, ast.Subscript) else target
                name = ast.unparse(holder).rpartition(".")[2].lstrip("_")
                found += 1
                if not f"_{name}".endswith(INSTANTS):
                    wrong.add(f"{file.relative_to(ROOT)}: {name}")
    assert wrong == set()
    assert found > 50, "the clocks have other names"


def narrows_a_type(test: ast.expr) -> bool:
    """Return whether an assert tells mypy a type: ``x is not None``, isinstance or its negation."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test = test.operand
    if isinstance(test, ast.Call):
        return ast.unparse(test.func) == "isinstance"
    return isinstance(test, ast.Compare) and ast.unparse(test).endswith(" is not None")


def test_asserts_of_the_product_only_narrow_types() -> None:
    """What `python -O` leaves out checks nothing; ruff refuses asserts where input is read."""
    found = 0
    wrong = set()
    for file, nodes in python_nodes().items():
        for node in nodes:
            if isinstance(node, ast.Assert):
                found += 1
                if not narrows_a_type(node.test):
                    wrong.add(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.test)}")
    assert wrong == set()
    assert found > 20, "asserts have another form"


def test_a_packages_init_is_a_docstring_alone() -> None:
    """So a gateway, a controller or a client that imports one module gets no other with it."""
    busy = set()
    for file in product_files("__init__.py"):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        is_docstring = len(body) == 1 and isinstance(body[0], ast.Expr)
        if not is_docstring:
            busy.add(str(file.relative_to(ROOT)))
    assert busy == set(PUBLIC)


def test_the_readmes_first_screen_has_the_two_commands_and_ci_runs_its_tests() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    screen = "".join(readme.splitlines(keepends=True)[:FIRST_SCREEN])
    serves, tests = [block.text.strip() for block in blocks(screen) if block.language == "sh"]
    assert serves.endswith("pip install .\nexpertmesh serve")
    assert "pytest" in tests
    assert f'"{tests}"' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_pre_commit_runs_the_linters_of_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = [line.strip() for line in ci.splitlines()]
    linters = lines[lines.index("python -m tests.lock --installed") + 1 :]
    linters = linters[: linters.index("}")]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    assert entries == [line.removesuffix(" .") for line in linters if line]
