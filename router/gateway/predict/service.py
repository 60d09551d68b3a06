"""From a checked prediction to its reply, below HTTP and gRPC and above the routers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from typing import TypeVar

from cluster.errors import Code, DeadlineExceededError, InternalError
from experts.mixture.spec import output_shape
from router.config.deployment import GatewayConfig
from router.control.readiness import Readiness
from router.gateway.errors import public_error
from router.gateway.limits.charges import Charges
from router.gateway.limits.room import GRACE_S, Room
from router.gateway.metrics import Metrics
from router.gateway.predict.upstream import Predictions
from router.gateway.predict.validate import (
    VERSION,
    CheckedPrediction,
    PredictionValidator,
    expected_shape,
)
from router.gateway.service import Surface
from router.messages.prediction import MIXTURE_PLATFORM, PredictionReply
from router.messages.tensor_bytes import NUMPY_DTYPES
from router.observability import catalogue
from router.security.keys import Caller
from router.served import ServedMixture

SERVER_NAME = "expertmesh"
SERVER_VERSION = version("expertmesh")
EXTENSIONS = ("binary_tensor_data",)

Encoded = TypeVar("Encoded")
logger = logging.getLogger("expertmesh.gateway")


class PredictionService:
    """Sends checked predictions upstream, within the gateway's room and the request's deadline.

    HTTP and gRPC both use it, and check requests by its ``validator``.
    """

    def __init__(
        self,
        mixtures: Mapping[str, ServedMixture],
        limits: GatewayConfig,
        upstream: Predictions,
        metrics: Metrics,
        room: Room,
        charges: Charges,
        language_models: Collection[str] = (),
    ) -> None:
        """``mixtures`` are the served mixtures by id; ``language_models`` the ids of the others."""
        self.metrics = metrics
        self.limits = limits
        self.room = room
        self._charges = charges
        self.validator = PredictionValidator(mixtures, limits, language_models)
        self._upstream = upstream

    def ready(self) -> Readiness:
        """Return whether requests can be served, and if not, why."""
        return self._upstream.ready()

    def model_ready(self, model_id: str, model_version: str) -> bool:
        """Return whether every expert of a model has a live copy, language models too.

        Raises :class:`UnknownModelError` for a model or a version that is not served.
        """
        self.validator.check_known(model_id, model_version)
        return self._upstream.model_ready(model_id).is_ready

    async def predict(
        self,
        checked: CheckedPrediction,
        caller: Caller,
        surface: Surface,
        encode: Callable[[PredictionReply], Encoded],
    ) -> Encoded:
        """Return the reply as ``encode`` writes it for the client; a row costs the caller a token.

        Its outputs have the shapes and dtypes of the mixture's. Counts the outcome. Raises
        :class:`ExpertMeshError`; a cancellation ends the request upstream.
        """
        model_id, num_rows = checked.request.model, checked.request.num_rows
        with ExitStack() as taken:
            with self.metrics.refusals(surface):
                charge = taken.enter_context(self._charges.charge(caller, num_rows))
                taken.enter_context(self.room.places.share_of(model_id)).take(1)
            charge.use("rows", num_rows)
            started_at_s = time.monotonic()
            self.metrics.started(catalogue.PREDICTION_ROWS, model_id, num_rows)
            code: Code | None = None
            try:
                reply = await self._reply(checked.of(caller))
                encoded = encode(reply)
            except asyncio.CancelledError:
                code = Code.CANCELLED
                raise
            except Exception as error:
                code = public_error(error).code
                raise
            finally:
                self.metrics.ended(checked.request, surface, code, time.monotonic() - started_at_s)
            if not reply.exact:
                reason = checked.request.on_expert_loss
                self.metrics.count(catalogue.INEXACT_ROWS, model_id, reason, by=num_rows)
            return encoded

    async def _reply(self, checked: CheckedPrediction) -> PredictionReply:
        try:
            # GRACE_S past the deadline, so that the router's own error comes first.
            async with asyncio.timeout(checked.request.remaining_s() + GRACE_S):
                reply = await self._upstream.predict(checked.request)
        except TimeoutError:
            raise DeadlineExceededError("the request timed out before its last row") from None
        _check_reply(checked, reply)
        return reply


def _check_reply(checked: CheckedPrediction, reply: PredictionReply) -> None:
    """Raise ``InternalError`` where a router's arrays are not those of the mixture's outputs."""
    spec = checked.mixture.spec
    rows = checked.request.inputs[spec.rows_input.name]
    for output in checked.outputs():
        array = reply.outputs[output.name]
        shape = expected_shape(spec, output, rows)
        is_right = (
            array.dtype == NUMPY_DTYPES[output.datatype]
            if output.datatype in NUMPY_DTYPES
            else array.dtype.kind == "U"
        )
        if array.shape != shape or not is_right:
            logger.error(
                "the router of %s returned %s %s for the output %s, which should be %s %s",
                checked.mixture.id, array.dtype, array.shape, output.name, output.datatype, shape,
            )  # fmt: skip
            raise InternalError("the router failed")


def metadata_of(mixture: ServedMixture) -> dict[str, object]:
    """Return the protocol's description of a model: plain data, -1 for any length.

    The input that experts take comes first.
    """
    spec = mixture.spec
    inputs = sorted(spec.inputs, key=lambda given: given.name != spec.rows_input.name)
    return {
        "name": mixture.id,
        "versions": [VERSION],
        "platform": MIXTURE_PLATFORM,
        "inputs": [
            {"name": given.name, "datatype": given.datatype, "shape": [-1, *given.shape]}
            for given in inputs
        ],
        "outputs": [
            {
                "name": output.name,
                "datatype": output.datatype,
                "shape": [-1, *output_shape(spec, output)],
            }
            for output in spec.outputs
        ],
    }
