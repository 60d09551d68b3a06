"""The mutation check: which faults it plants, and what it says of the tests that judge them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.mutation.__main__ import BASELINE, ROOT
from tests.mutation.operators import drawn, faults

CODE = """
def clamp(x: int | None = 3, most: int = 10) -> int:
    '''Return x, at most 10.'''
    logger.info("clamped", 1)
    assert x > 0
    if x < most and x is not None:
        return x
    return most
"""


def changes(code: str) -> list[str]:
    tree = ast.parse(code)
    return [fault.mutant(tree).change for fault in faults(tree)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            CODE,
            [
                "3 -> 4",
                "10 -> 11",
                "x < most and x is not None -> x < most or x is not None",
                "x < most -> x <= most",
                "x < most -> x >= most",
                "x is not None -> x is None",
                "return x -> return None",
                "return most -> return None",
            ],
        ),
        ("a = -b << 2", ["-b << 2 -> -b >> 2", "-b -> +b", "2 -> 3"]),
        ("a = b * c", ["b * c -> b // c", "b * c -> b / c"]),
        ("if not a: del b[0]", ["not a -> a", "del b[0] -> pass", "0 -> 1"]),
        ("while f(x): break", ["f(x) -> not f(x)", "break -> continue"]),
        (
            "self.x += True",
            ["self.x += True -> pass", "self.x += True -> self.x -= True", "True -> False"],
        ),
        ("self.x = y", ["self.x = y -> pass"]),
        ("x = y", []),
        ("raise ValueError(f'{a + 1}')", ["raise ValueError(f'{a + 1}') -> pass"]),
        ("@dataclass(slots=True)\nclass A: x: int | str", []),
    ],
)
def test_each_kind_of_code_has_its_faults(code: str, expected: list[str]) -> None:
    assert sorted(changes(code)) == sorted(expected)


def test_a_mutant_is_the_code_with_one_fault() -> None:
    whole = ast.unparse(ast.parse(CODE))
    mutants = drawn(CODE, "a.py", 1, 100)
    assert len({mutant.code for mutant in mutants} | {whole}) == len(changes(CODE)) + 1
    for mutant in mutants:
        changed = set(mutant.code.splitlines()) ^ set(whole.splitlines())
        assert len(changed) == 2
        assert mutant.line in (2, 6, 7, 8)


def test_the_seed_and_the_name_draw_the_mutants() -> None:
    drawings = [drawn(CODE, *given, 3) for given in [("a", 1), ("a", 1), ("a", 2), ("b", 1)]]
    assert all(len(mutants) == 3 for mutants in drawings)
    assert drawings[0] == drawings[1]
    assert drawings[0] not in drawings[2:]


def test_the_baselines_files_are_there() -> None:
    files = yaml.safe_load(BASELINE.read_text(encoding="utf-8"))["files"]
    for name, entry in files.items():
        assert (ROOT / name).is_file()
        assert all((ROOT / test).is_file() for test in entry["tests"])
        assert 0 < entry["found"] <= 1


def run_judge(folder: Path, expected: bool) -> subprocess.CompletedProcess[str]:
    """Judge a function by a test that expects ``expected`` of it."""
    code = "def is_small(x):\n    return x < 9\n"
    (folder / "product.py").write_text(code, encoding="utf-8")
    test = f"import product\n\ndef test():\n    assert product.is_small(3) is {expected}\n"
    (folder / "test_product.py").write_text(test, encoding="utf-8")
    call = "judge('product.py', 1, 99, ['test_product.py'])"
    return subprocess.run(
        [sys.executable, "-c", f"from tests.mutation.judge import judge; {call}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_mutants_are_judged_by_their_tests(tmp_path: Path) -> None:
    count, *verdicts = map(json.loads, run_judge(tmp_path, True).stdout.splitlines())
    assert count == len(verdicts)
    assert {verdict["change"]: verdict["outcome"] for verdict in verdicts} == {
        "return x < 9 -> return None": "killed",
        "x < 9 -> x >= 9": "killed",
        "x < 9 -> x <= 9": "survived",
        "9 -> 10": "survived",
    }


def test_tests_that_fail_without_a_fault_judge_nothing(tmp_path: Path) -> None:
    done = run_judge(tmp_path, False)
    assert done.returncode
    assert done.stdout == ""
    assert "its tests fail without a fault" in done.stderr
