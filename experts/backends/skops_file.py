"""Reading a fitted scikit-learn estimator from a skops file, without running code of the file.

skops writes a zip archive with ``schema.json``, which names the type of every object, and the
arrays. The schema is checked first: only the kinds of nodes in :data:`_LOADERS`, and only types
that skops trusts itself or that :data:`_TYPES` lists. There are no methods, and no functions but
ufuncs of numpy and scipy and the few pure ones of :data:`_TYPES`, which a ``FunctionTransformer``
or a ``functools.partial`` may have. No object is made and no module of the file imported before all
types were checked.

The checks are about types. A number inside an array that a library follows without a check is
another matter; :mod:`experts.backends.skops_arrays` checks those of trees and support vectors.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import sklearn
from sklearn.base import BaseEstimator
from skops.io import get_untrusted_types, loads

from cluster.errors import CheckpointError, shown, shown_name
from experts.backends.errors import described
from experts.backends.skops_splines import rename
from experts.checkpoint.shards import listed_names

MAX_SCHEMA_BYTES = 128 << 20
MAX_EXPANSION = 64
"""The most bytes that the archive unpacks to, for each of its own; beside 1 MiB."""
_OLDEST_PROTOCOL = 1
"""Of older files skops reads names of functions from elsewhere than from their types."""

_LOADERS = frozenset(
    f"{kind}Node"
    for kind in (
        "Object", "Dict", "Json", "NdArray", "List", "Set", "Tuple", "Type", "Slice", "Function",
        "Partial", "Tree", "Loss", "RandomState", "RandomGenerator", "MaskedArray", "DType",
    )
)  # fmt: skip
_DISTANCES = (
    "BrayCurtis", "Canberra", "Chebyshev", "Dice", "Euclidean", "Hamming", "Jaccard", "Manhattan",
    "Matching", "Minkowski", "RogersTanimoto", "RussellRao", "SokalMichener", "SokalSneath",
)  # fmt: skip
_KERNELS = (
    "CompoundKernel", "ConstantKernel", "DotProduct", "ExpSineSquared", "Exponentiation", "Matern",
    "PairwiseKernel", "Product", "RBF", "RationalQuadratic", "Sum", "WhiteKernel",
)  # fmt: skip
_TYPES = frozenset(
    {
        "experts.backends.skops_splines.SavedSpline",
        "functools.partial",
        "numpy.asarray",
        "numpy.dtype",
        "numpy.mean",
        "sklearn._loss.loss.HalfTweedieLoss",
        "sklearn._loss.loss.HalfTweedieLossIdentity",
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        "sklearn.calibration._TemperatureScaling",
        "sklearn.compose._column_transformer._RemainderColsList",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.gaussian_process._gpc._BinaryGaussianProcessClassifierLaplace",
        "sklearn.metrics._scorer._PassthroughScorer",
        "sklearn.multiclass._ConstantPredictor",
        "sklearn.neighbors._ball_tree.BallTree",
        "sklearn.neighbors._kd_tree.KDTree",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
        "sklearn.tree._tree.Tree",
        "sklearn.utils._bunch.Bunch",
        "sklearn.utils._metadata_requests.MetadataRequest",
        "sklearn.utils._metadata_requests.MethodMetadataRequest",
        "sklearn.utils.validation.check_array",
        *(f"sklearn.model_selection._split.{name}KFold" for name in ("", "Stratified")),
        *(f"sklearn.gaussian_process.kernels.{name}" for name in _KERNELS),
        *(
            f"sklearn.metrics._dist_metrics.{name}Distance{bits}"
            for name in _DISTANCES
            for bits in ("32", "64")
        ),
        *(
            f"sklearn.feature_selection._univariate_selection.{name}"
            for name in ("chi2", "f_classif", "f_regression", "r_regression")
        ),
        *(
            f"sklearn.feature_selection._mutual_info.mutual_info_{name}"
            for name in ("classif", "regression")
        ),
    }
)
"""Types and pure functions of fitted estimators beyond those that skops trusts itself."""
_BIT_GENERATORS = frozenset({"MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"})

logger = logging.getLogger("expertmesh.experts")


def read_estimator(data: bytes, where: str) -> tuple[BaseEstimator, int]:
    """Return the estimator in a skops file, and its bytes uncompressed.

    Raises :class:`CheckpointError`, whose field is ``where``, for a damaged file, for a kind of
    object or a type that is not allowed (naming it), and for anything but an estimator. An
    estimator of another version of scikit-learn is loaded, and a warning names both versions.
    """
    try:
        data, num_bytes = _checked(data, where)
        refused = sorted(set(get_untrusted_types(data=data)) - _TYPES)
        if refused:
            raise CheckpointError(f"has types that are not allowed: {listed_names(refused)}", where)
        estimator = loads(data, trusted=sorted(_TYPES))
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CheckpointError(f"is not a complete skops file: {error}", where) from None
    except Exception as error:  # skops, numpy and scikit-learn raise many types for wrong content
        raise CheckpointError(f"cannot be loaded: {described(error)}", where) from None
    if not isinstance(estimator, BaseEstimator):
        raise CheckpointError(f"contains {shown(estimator)}, not an estimator", where)
    return estimator, num_bytes


def _checked(data: bytes, where: str) -> tuple[bytes, int]:
    """Check all of a file but its types; returns it, splines renamed, and its unpacked bytes."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if sizes.get("schema.json", 0) > MAX_SCHEMA_BYTES:
            raise CheckpointError(f"has a schema.json of more than {MAX_SCHEMA_BYTES} bytes", where)
        schema = json.loads(archive.read("schema.json"))
    if not isinstance(schema, dict):
        raise CheckpointError("has a schema.json that is not an object", where)
    protocol = schema.get("protocol")
    if type(protocol) is not int or protocol < _OLDEST_PROTOCOL:
        raise CheckpointError(
            f"has skops protocol {shown(protocol)}; must be at least {_OLDEST_PROTOCOL}; save the "
            "estimator with a newer skops",
            where,
        )
    num_bytes = sizes["schema.json"]
    has_splines = False
    seen: set[tuple[Any, str]] = set()
    versions: set[str] = set()
    for node in _nodes(schema):
        has_splines |= rename(node)
        loader = node["__loader__"]
        if loader not in _LOADERS:
            name = f"{node.get('__module__')}.{node.get('__class__')}"
            raise CheckpointError(
                f"has an object that is not allowed: {shown_name(name)} ({shown(loader)})", where
            )
        if loader == "RandomGeneratorNode":
            _check_generator(node, where)
        if loader == "PartialNode" and node["content"]["func"]["__loader__"] != "FunctionNode":
            raise CheckpointError("has a functools.partial of no function", where)
        file, number = node.get("file"), node.get("__id__")
        if file is not None and (number is None or (number, file) not in seen):
            seen.add((number, file))
            num_bytes += sizes[file]
            if num_bytes > MAX_EXPANSION * len(data) + (1 << 20):
                raise CheckpointError(
                    f"unpacks to more than {MAX_EXPANSION} times its {len(data)} bytes", where
                )
        version = _version_in(node)
        if version is not None:
            versions.add(version)
    for version in sorted(versions - {sklearn.__version__}):
        _warn_of_version(version)
    if has_splines:
        data = _with_schema(data, schema, {file for _, file in seen})
    return data, num_bytes


def _with_schema(data: bytes, schema: dict[str, Any], files: set[str]) -> bytes:
    """Return a skops file with another schema and those of its files that it names."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        new.writestr("schema.json", json.dumps(schema))
        for file in files:
            new.writestr(file, old.read(file))
    return made.getvalue()


def _nodes(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every mapping of a schema that describes an object."""
    waiting: list[Any] = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "__loader__" in value:
                yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _check_generator(node: dict[str, Any], where: str) -> None:
    """Check the class that skops finds by its name in the state of a random generator."""
    name = json.loads(node["content"]["bit_generator"]["content"]["bit_generator"]["content"])
    if name not in _BIT_GENERATORS:
        raise CheckpointError(f"has types that are not allowed: numpy.random.{shown(name)}", where)


def _version_in(node: dict[str, Any]) -> str | None:
    """Return the version of scikit-learn in the state of an estimator, or ``None``."""
    content = node.get("content")
    version = content.get("_sklearn_version") if isinstance(content, dict) else None
    return str(json.loads(version["content"])) if isinstance(version, dict) else None


@functools.cache
def _warn_of_version(version: str) -> None:
    """Log once a process that files are of another version of scikit-learn."""
    logger.warning(
        "estimators were saved by scikit-learn %.40s and are loaded by %s: predictions may differ "
        "from those of their author; save them again with this version",
        version.encode("ascii", "replace").decode(),
        sklearn.__version__,
    )
