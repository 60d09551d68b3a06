"""Write the ``*_pb2.py`` and ``*_pb2_grpc.py`` beside each ``.proto`` (needs grpcio-tools).

Run ``python -m router.protos.generate`` after changing a ``.proto``. Generated code refuses a
runtime older than its generator, so the pinned grpcio-tools in pyproject.toml and the lower bounds
of grpcio and protobuf move together; ``tests/unit/router/test_protos.py`` checks both.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

_FOLDER = Path(__file__).resolve().parent
_ROOT = _FOLDER.parent.parent


def generate(out: Path) -> list[Path]:
    """Generate all stubs under ``out``, a folder that stands for the repository's root.

    Returns the files written. Raises ``RuntimeError`` when protoc refuses a ``.proto``.
    """
    sources = sorted(_FOLDER.glob("*.proto"))
    names = [str(source.relative_to(_ROOT)) for source in sources]
    command = ["protoc", f"-I{_ROOT}", f"--python_out={out}", f"--grpc_python_out={out}", *names]
    if protoc.main(command) != 0:
        raise RuntimeError("protoc failed; its message is above")
    stems = [out / source.relative_to(_ROOT).with_suffix("") for source in sources]
    return [Path(f"{stem}{end}") for stem in stems for end in ("_pb2.py", "_pb2_grpc.py")]


if __name__ == "__main__":
    for written in generate(_ROOT):
        sys.stdout.write(f"{written.relative_to(_ROOT)}\n")
