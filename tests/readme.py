"""The command blocks of README and ``docs/``: how they are run, and whether their output is true.

    python -m tests.readme [--write] [DOCUMENT ...]

Runs every block that can be run against one ``serve run deploy/cluster.yaml`` on ports of its own
and compares; with ``--write`` the real output takes the place of the shown one. Commands and their
output are ``console`` blocks; the output of a ``python`` block stands in the block that follows it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.environment import without_ray

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK_TIMEOUT_S, END_S = 300.0, 20.0
HTTP_PORT, GRPC_PORT = 8000, 9000
ELSEWHERE = {
    "pip install": "installs, as every run of the tests does before it",
    "python3 -m venv": "installs, as every run of the tests does before it",
    "ray start": "starts nodes of Ray; tests/long/test_two_machines.py runs them",
    "serve run": "starts a server of its own; tests/integration/test_serve_run.py has both ends",
    "expertmesh doctor": "tells of the machine; tests/integration/test_doctor.py runs it",
    "expertmesh deploy": "ends the server; tests/integration/test_readme.py runs it at its end",
    "docker build": "needs Docker; tests/unit/test_container.py reads what it builds",
    "docker run": "needs Docker; tests/integration/test_tracing.py reads the spans",
}
"""Beginnings of blocks that are not run here, and why."""
DOCUMENTS_ELSEWHERE = {
    "multi-node.md": "needs several machines; tests/fault/node_loss.py has four nodes",
    "mixtures.md": "needs a mixture of its own; tests/fault/test_mixtures.py runs it",
}
"""Documents whose blocks are not run here, and why."""
SLOW = frozenset({"workshop.md"})
"""Documents whose commands make models: ``tests/long/test_documents.py`` runs them."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STOPPED = "expertmesh: Serve was shut down: ending"
_MARK = "@@status "


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, and where the text begins in the document."""

    language: str
    text: str
    begin: int


@dataclass(frozen=True, slots=True)
class Step:
    """A command and the output that is shown, or that came, below it."""

    command: str
    output: str


def run_documents() -> list[Path]:
    """Return the documents whose blocks are run here."""
    return [document for document in DOCUMENTS if document.name not in DOCUMENTS_ELSEWHERE]


def check_document(document: Path, place: Place) -> None:
    """Raise :class:`AssertionError` where a block shows something else than what comes."""
    markdown = document.read_text(encoding="utf-8")
    after = rerun(markdown, place)
    for old, new in zip(blocks(markdown), blocks(after), strict=True):
        assert same(old.text, new.text), f"shown:\n{old.text}\ncame:\n{new.text}"


def blocks(markdown: str) -> list[Block]:
    """Return the fenced blocks in order."""
    return [Block(m[1], m[2], m.start(2)) for m in _FENCE.finditer(markdown)]


def blocks_without_output(markdown: str) -> list[Block]:
    """Return the blocks that can be run and yet would not be: no output of theirs is shown."""
    found = []
    for block, following in _with_following(markdown):
        if block.language == "sh" and reason_elsewhere(block) is None:
            found.append(block)
        if block.language == "python" and (following is None or following.language):
            found.append(block)
    return found


def _with_following(markdown: str) -> Iterator[tuple[Block, Block | None]]:
    all_blocks = blocks(markdown)
    return zip(all_blocks, [*all_blocks, None][1:], strict=True)


def steps(text: str) -> list[Step]:
    """Split a console block; a command goes on in the next line after a backslash."""
    found: list[Step] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("$ "):
            found.append(Step(line[2:], ""))
        elif found and not found[-1].output and found[-1].command.endswith("\\\n"):
            found[-1] = replace(found[-1], command=found[-1].command + line)
        elif found:
            found[-1] = replace(found[-1], output=found[-1].output + line)
        else:
            raise ValueError(f"a console block begins with a command, not with {line!r}")
    return [replace(step, command=step.command.rstrip("\n")) for step in found]


def shown(done: Iterable[Step]) -> str:
    """Return the text of a console block."""
    return "".join(f"$ {step.command}\n{step.output}" for step in done)


def reason_elsewhere(block: Block) -> str | None:
    """Return why a block is not run; ``None`` for one that is."""
    first = block.text.removeprefix("$ ")
    return next((why for begin, why in ELSEWHERE.items() if first.startswith(begin)), None)


def same(one: str, other: str) -> bool:
    """Tell whether two outputs say the same, but for numbers and ids, and a table's columns."""
    if "─" in one:
        return Counter(_plain(one).split()) == Counter(_plain(other).split())
    return _plain(one) == _plain(other)


def _plain(text: str) -> str:
    text = re.sub(r"[\u2500-\u257f]", " ", text)
    text = re.sub(r"\bem-[\w-]{43}(?![\w-])", "KEY", text)
    text = re.sub(r"\b[0-9a-f]{8,}(-[0-9a-f]+)*\b", "ID", text)
    text = re.sub(r"\d[\d.,:]*", "0", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


@dataclass(frozen=True, slots=True)
class Place:
    """Where blocks are run: the server's ports, and a folder with a copy of ``deploy``."""

    http_port: int
    grpc_port: int
    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    """What Serve's commands need to find this server, where it is not the machine's first."""

    def run(self, command: list[str], text: str) -> str:
        """Run a block's text, given on stdin or as an argument, and return all that it prints."""
        text = text.replace(f":{HTTP_PORT}", f":{self.http_port}")
        text = text.replace(f":{GRPC_PORT}", f":{self.grpc_port}")
        process = subprocess.Popen(
            [*command, text],
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that all of it can be ended
        )
        try:
            output, _ = process.communicate(timeout=BLOCK_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        output = output.replace(f":{self.http_port}", f":{HTTP_PORT}")
        return output.replace(f":{self.grpc_port}", f":{GRPC_PORT}")

    def _environment(self) -> Mapping[str, str]:
        kept = without_ray()
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{kept.get('PATH', '')}"
        address = f"127.0.0.1:{self.grpc_port}"
        own = {"PATH": path, "EXPERTMESH_ADDRESS": address, "COLUMNS": "100"}
        return {**kept, **own, **self.variables}


def run_console(block: Block, place: Place) -> str:
    """Run the commands in one shell; returns the block as it is with what came below each."""
    planned = steps(block.text)
    script = "".join(f"{step.command}\nprintf '\\n{_MARK}%d\\n' $?\n" for step in planned)
    outputs = re.split(rf"\n{_MARK}\d+\n", place.run(["bash", "-c"], script))[: len(planned)]
    done = [replace(step, output=_lined(out)) for step, out in zip(planned, outputs, strict=True)]
    return shown(done)


def run_python(block: Block, place: Place) -> str:
    """Run a snippet and return what it prints."""
    return _lined(place.run([sys.executable, "-c"], block.text))


def _lined(output: str) -> str:
    output = "".join(f"{line.rstrip()}\n" for line in output.splitlines())
    return "" if output == "\n" else output


@contextmanager
def serving(folder: Path) -> Iterator[Place]:
    """Run ``expertmesh serve`` of the shipped file, ready, with a copy of it in ``folder``."""
    import deploy
    from benchmarks.shipped import free_ports
    from tests.serve_run import copy_with_ports, expertmesh_serve, other_shell, ready_serve

    http_port, grpc_port = free_ports(2)
    work = folder / "work"
    shutil.copytree(Path(deploy.__file__).parent, work / "deploy", dirs_exist_ok=True)
    file, log = copy_with_ports(folder, http_port, grpc_port), folder / "log"
    with ready_serve(file, log, http_port, expertmesh_serve) as process:
        variables = {k: v for k, v in other_shell(log).items() if k != "RAY_AUTH_MODE"}
        yield Place(http_port, grpc_port, work, variables)
        why = "Serve was shut down" if STOPPED in log.read_text() else "SIGINT"
        if why == "SIGINT":
            process.send_signal(signal.SIGINT)
        process.wait(END_S)
    assert process.returncode == 0, log.read_text()
    assert f"expertmesh: {why}: ending" in log.read_text()
    assert "Traceback" not in log.read_text()


def rerun(markdown: str, place: Place) -> str:
    """Return the document with the real output of its blocks."""
    result, moved = markdown, 0
    for block, following in _with_following(markdown):
        target = block
        if reason_elsewhere(block) is not None:
            continue
        if block.language == "console":
            came = run_console(block, place)
        elif block.language == "python" and following and not following.language:
            target, came = following, run_python(block, place)
        else:
            continue
        begin = target.begin + moved
        result = result[:begin] + came + result[begin + len(target.text) :]
        moved += len(came) - len(target.text)
    return result


def main() -> int:
    """Parse the command line and run; returns 1 where another output came than is shown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("documents", nargs="*", type=Path, default=run_documents())
    parser.add_argument("--write", action="store_true", help="put the output into the documents")
    options = parser.parse_args()
    before = {document: document.read_text(encoding="utf-8") for document in options.documents}
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as place:
        after = {document: rerun(text, place) for document, text in before.items()}
    if options.write:
        for document, text in after.items():
            document.write_text(text, encoding="utf-8")
        return 0
    pairs = [
        (document, old, new)
        for document in before
        for old, new in zip(blocks(before[document]), blocks(after[document]), strict=True)
    ]
    differ = [(document, old, new) for document, old, new in pairs if not same(old.text, new.text)]
    for document, old, new in differ:
        print(f"--- {document} shows\n{old.text}--- came\n{new.text}")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
