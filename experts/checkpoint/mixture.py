"""Opening the folder of a mixture: ``mixture.yaml`` and the files that it names.

Each file counts as one tensor of bytes, so that hashes, their cache and the readers of other nodes
are those of checkpoints. No file but ``mixture.yaml`` is read when a mixture is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.errors import CheckpointError, shown, shown_name
from experts.checkpoint.shard_file import Stamp, stamp_of_file
from experts.checkpoint.shards import TensorInfo
from experts.checkpoint.stored import RemoteFiles, Stored, read_range
from experts.mixture.parts import MIXTURE_FILE, OnnxExpert, ScoringGate
from experts.mixture.spec import MixtureSpec

MAX_SPEC_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Mixture(Stored):
    """An opened mixture; ``tensors`` are its files by their paths, as bytes."""

    spec: MixtureSpec

    def file(self, name: str) -> bytes:
        """Return a whole file, every byte of it verified where there are hashes.

        Raises :class:`CheckpointError` as :func:`experts.checkpoint.stored.read_into` does.
        """
        if self.remote is not None:
            return bytes(self.remote.tensor(name))
        return read_range(self, name, 0, self.tensors[name].num_bytes)


def is_mixture(folder: Path) -> bool:
    """Return whether a folder of this node is that of a mixture."""
    return (folder / MIXTURE_FILE).is_file()


def open_mixture(folder: Path) -> Mixture:
    """Read ``mixture.yaml`` and check that its files are there.

    Raises :class:`CheckpointError`, whose field is the file, for a wrong or too long
    ``mixture.yaml`` and for a file that is missing, empty or no file.
    """
    file = folder / MIXTURE_FILE
    if stamp_of_file(file).num_bytes > MAX_SPEC_BYTES:
        raise CheckpointError(f"has more than {MAX_SPEC_BYTES} bytes", str(file))
    stamps: dict[str, Stamp] = {}

    def sizes(names: tuple[str, ...]) -> dict[str, int]:
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(f"{MIXTURE_FILE} names a missing file", str(folder / name))
            stamps[name] = stamp_of_file(folder / name)
        return {name: stamp.num_bytes for name, stamp in stamps.items()}

    return replace(mixture_of(folder, file.read_bytes(), sizes), stamps=stamps)


def mixture_of(
    folder: Path,
    text: bytes,
    sizes: Callable[[tuple[str, ...]], Mapping[str, int]],
    remote: RemoteFiles | None = None,
) -> Mixture:
    """Check the text of a ``mixture.yaml``; ``sizes`` returns the bytes of the files that it names.

    Raises :class:`CheckpointError` as :func:`open_mixture` does.
    """
    spec = parse_spec(text, folder / MIXTURE_FILE)
    tensors: dict[str, TensorInfo] = {}
    for name, num_bytes in sizes(files_of(spec)).items():
        if not num_bytes:
            raise CheckpointError("the file is empty", str(folder / name))
        tensors[name] = TensorInfo(name, (num_bytes,), "U8", 0, num_bytes)
    # Experts are numbered by their order, which is not in the hash of a mapping.
    config = {**spec.model_dump(mode="json"), "expert_names": list(spec.expert_names)}
    return Mixture(folder, config, tensors, spec, remote=remote)


def files_of(spec: MixtureSpec) -> tuple[str, ...]:
    """Return the files that a mixture names, each once, sorted."""
    gates = (gate.file for gate in spec.gates.values() if isinstance(gate, ScoringGate))
    experts = (expert.file for expert in spec.experts.values())
    data = (n for e in spec.experts.values() if isinstance(e, OnnxExpert) for n in e.data)
    return tuple(sorted({*gates, *experts, *data}))


def parse_spec(text: bytes, file: Path) -> MixtureSpec:
    """Return the checked content of a ``mixture.yaml``.

    Raises :class:`CheckpointError`, whose field has the file and the key, for text that is no
    YAML, a duplicate key, an alias, and a wrong value.
    """
    try:
        content = _loaded(text)
    except Exception as error:  # PyYAML raises many types for a value that is not of its tag
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" in line {mark.line + 1}"
        reason = getattr(error, "problem", None) or type(error).__name__
        raise CheckpointError(f"is not YAML{place}: {reason}", str(file)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"must be a mapping (given: {shown(content)})", str(file))
    try:
        return MixtureSpec.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = _key_of(first["loc"], content, is_missing=first["type"] == "missing")
        message = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(message, f"{file}: {key}" if key else str(file)) from None


def _key_of(location: tuple[int | str, ...], content: Any, is_missing: bool) -> str:
    """Return the path of a key in ``mixture.yaml``, whose last part may be missing there.

    pydantic's location also has the names of the types that it tried, which no file has.
    """
    keys = []
    for place, part in enumerate(location):
        is_there = (isinstance(content, dict) and part in content) or (
            isinstance(content, list) and isinstance(part, int) and part < len(content)
        )
        if is_there:
            content = content[part]
        if is_there or (is_missing and place == len(location) - 1):
            keys.append(shown_name(str(part)))
    return ".".join(keys)


def _loaded(text: bytes) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases and without equal keys.

    By aliases a few bytes could become very many values. Of equal keys PyYAML keeps the last.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            mark: Any = event.start_mark
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor:.40} is not allowed", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r:.80} occurs twice",
                        key_node.start_mark,
                    )  # fmt: skip
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)
