"""Reading an ONNX model into one self-contained piece of bytes.

Operators outside ONNX's own domains are refused by name, as are tensors in files that the expert's
``data`` does not list. The bytes of listed files come verified from the mixture and replace the
references to them, so that onnxruntime gets one piece of memory and opens no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError, EncodeError

from cluster.errors import CheckpointError, shown, shown_name
from experts.checkpoint.mixture import Mixture
from experts.checkpoint.shards import listed_names
from experts.mixture.parts import OnnxExpert

MAX_MODEL_BYTES = (2 << 30) - 1
"""The most bytes of a model with its external data: a protobuf message has no more."""
DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
"""The domains of ONNX itself; the first two are one."""
_KEYS = frozenset({"location", "offset", "length", "checksum"})


def self_contained(mixture: Mixture, part: OnnxExpert, where: str) -> bytes:
    """Return an expert's model with all its tensors inside.

    Raises :class:`CheckpointError`, whose field is ``where`` or a key below it, for bytes that are
    no model, an operator of another domain, a tensor in a file that ``data`` does not list or
    beyond the end of one, a listed file that no tensor is in, and a model that is too long.
    """
    names = (part.file, *part.data)
    num_bytes = sum(mixture.tensors[name].num_bytes for name in names)
    if num_bytes > MAX_MODEL_BYTES:
        raise CheckpointError(
            f"has {num_bytes} bytes with its external data; at most {MAX_MODEL_BYTES}", where
        )
    model = onnx.ModelProto()
    data = mixture.file(part.file)
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise CheckpointError(f"is not an ONNX model: {error}", where) from None
    if not model.graph.node:
        raise CheckpointError("is not an ONNX model with a graph of operators", where)
    _check_operators(model, where)
    external = [
        tensor for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    unused = set(part.data)
    files: dict[str, bytes] = {}
    for tensor in external:
        name = _file_of(tensor, part, where)
        if name not in files:
            files[name] = mixture.file(name)
            unused.discard(name)
        _fill(tensor, files[name], name, where)
    if unused:
        raise CheckpointError(f"no tensor is in {listed_names(sorted(unused))}", f"{where}.data")
    if not external:
        return data
    try:
        return model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise CheckpointError(
            f"does not fit in one message of at most {MAX_MODEL_BYTES} bytes: {error}", where
        ) from None


def _check_operators(model: Any, where: str) -> None:
    """Check that every operator is ONNX's own or a function of the model."""
    functions = {(function.domain, function.name) for function in model.functions}
    foreign = {
        f"{node.domain}.{node.op_type}"
        for graph in _graphs(model)
        for node in graph.node
        if node.domain not in DOMAINS and (node.domain, node.op_type) not in functions
    }
    if foreign:
        raise CheckpointError(
            f"has operators outside ONNX: {listed_names(sorted(foreign))}; allowed are the "
            "domains ai.onnx and ai.onnx.ml",
            where,
        )


def _graphs(model: Any) -> Iterator[Any]:
    """Yield the model's graph, its functions, and the graphs inside the attributes of operators."""
    waiting = [model.graph, *model.functions]
    for training in model.training_info:
        waiting += [training.initialization, training.algorithm]
    while waiting:
        graph = waiting.pop()
        yield graph
        for attribute in _attributes([graph]):
            waiting.extend(attribute.graphs)
            if attribute.HasField("g"):
                waiting.append(attribute.g)


def _attributes(graphs: Iterable[Any]) -> Iterator[Any]:
    for graph in graphs:
        for node in graph.node:
            yield from node.attribute
        yield from getattr(graph, "attribute_proto", ())  # the defaults of a function


def _tensors(model: Any) -> Iterator[Any]:
    """Yield every tensor of a model."""
    for graph in _graphs(model):
        yield from getattr(graph, "initializer", ())
        sparse = list(getattr(graph, "sparse_initializer", ()))
        for attribute in _attributes([graph]):
            yield from attribute.tensors
            sparse += attribute.sparse_tensors
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                sparse.append(attribute.sparse_tensor)
        for tensor in sparse:
            yield from (tensor.values, tensor.indices)


def _file_of(tensor: Any, part: OnnxExpert, where: str) -> str:
    """Return the listed file that a tensor is in; its location is beside the model."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    name = str(PurePosixPath(part.file).parent / location)
    if not location or entries.keys() - _KEYS or name not in part.data:
        raise CheckpointError(
            f"tensor {shown_name(tensor.name)} is in the file {shown(location)}, which data does "
            "not list",
            f"{where}.data",
        )
    return name


def _fill(tensor: Any, data: bytes, name: str, where: str) -> None:
    """Replace a tensor's reference to a file by the bytes; raises :class:`CheckpointError`."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        begin = int(entries.get("offset", "0"))
        end = begin + int(entries["length"]) if "length" in entries else len(data)
    except ValueError:
        begin, end = -1, -1
    if not 0 <= begin <= end <= len(data):
        raise CheckpointError(
            f"tensor {shown_name(tensor.name)} is beyond the {len(data)} bytes of {name}",
            f"{where}.data",
        )
    tensor.raw_data = data[begin:end]
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]
