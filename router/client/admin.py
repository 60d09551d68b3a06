"""The calls of the Admin service, for both clients.

The methods of both clients have the same arguments and results; those of :class:`AsyncAdminClient`
are coroutines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, cast

from cluster import reports
from cluster.reports import ChangeReport, ClusterStatus, LoadStatus, RebalanceReport, UsageReport
from cluster.spec import ModelKernel
from router.client.session import CHANGE_TIMEOUT_S, INFO_TIMEOUT_S, Answer, Call, Session
from router.protos import admin_pb2

Arguments = ParamSpec("Arguments")


class AdminClient(ABC):
    """The methods of :class:`router.client.Client` that call the Admin service."""

    _session: Session

    @abstractmethod
    def _ask(self, call: Call[Answer]) -> Answer:
        """Make a call once and return its answer."""

    def status(self) -> ClusterStatus:
        """Return the processes of the cluster, and the experts of each actor."""
        request = admin_pb2.GetStatusRequest()
        return self._ask(self._session.administer("GetStatus", request, INFO_TIMEOUT_S, _report_of))

    def load(self) -> LoadStatus:
        """Return the recent load of experts and devices, and the last rebalancings."""
        request = admin_pb2.GetLoadRequest()
        return self._ask(self._session.administer("GetLoad", request, INFO_TIMEOUT_S, _report_of))

    def usage(self) -> UsageReport:
        """Return what the keys of each name have used at all gateways that run."""
        request = admin_pb2.GetUsageRequest()
        return self._ask(self._session.administer("GetUsage", request, INFO_TIMEOUT_S, _report_of))

    def rebalance(self, dry_run: bool = False) -> RebalanceReport:
        """Move and copy experts to follow the load; with ``dry_run``, only report the changes.

        Returns when the changes are done. Raises :class:`UnavailableError` while experts are
        missing.
        """
        request = admin_pb2.RebalanceRequest(dry_run=dry_run)
        return self._ask(
            self._session.administer("Rebalance", request, CHANGE_TIMEOUT_S, _report_of)
        )

    def scale(self, actors: int, pool: str = "", dry_run: bool = False) -> ChangeReport:
        """Bring a pool to a number of actors; with ``dry_run``, only report the changes.

        Returns when the experts are spread over the actors, or while an actor waits for a device.
        Raises :class:`InvalidRequestError` where the number is out of bounds or the experts do not
        fit.
        """
        request = admin_pb2.ScaleRequest(actors=actors, pool=pool, dry_run=dry_run)
        return self._ask(self._session.administer("Scale", request, CHANGE_TIMEOUT_S, _report_of))

    def drain(self, target: str, dry_run: bool = False) -> ChangeReport:
        """Empty and end an actor, or all actors of a node, given by its id or the id's beginning.

        Raises as :meth:`scale` does.
        """
        request = admin_pb2.DrainRequest(target=target, dry_run=dry_run)
        return self._ask(self._session.administer("Drain", request, CHANGE_TIMEOUT_S, _report_of))

    def set_copies(
        self, model: str, layer: int, expert: int, copies: int, dry_run: bool = False
    ) -> ChangeReport:
        """Bring one expert to a number of copies, until a rebalancing changes it again.

        Raises as :meth:`scale` does.
        """
        request = admin_pb2.SetCopiesRequest(
            model=model, layer=layer, expert=expert, copies=copies, dry_run=dry_run
        )
        return self._ask(
            self._session.administer("SetCopies", request, CHANGE_TIMEOUT_S, _report_of)
        )


def _as_coroutine(
    method: Callable[Concatenate[AdminClient, Arguments], Answer],
) -> Callable[Concatenate[AsyncAdminClient, Arguments], Coroutine[Any, Any, Answer]]:
    """Return a method for the asynchronous client: it returns what that client's ``_ask`` does."""
    return cast(Any, method)


class AsyncAdminClient(ABC):
    """The methods of :class:`router.client.AsyncClient` that call the Admin service."""

    _session: Session

    @abstractmethod
    async def _ask(self, call: Call[Answer]) -> Answer:
        """Make a call once and return its answer."""

    status = _as_coroutine(AdminClient.status)
    load = _as_coroutine(AdminClient.load)
    usage = _as_coroutine(AdminClient.usage)
    rebalance = _as_coroutine(AdminClient.rebalance)
    scale = _as_coroutine(AdminClient.scale)
    drain = _as_coroutine(AdminClient.drain)
    set_copies = _as_coroutine(AdminClient.set_copies)


def _report_of(message: Any) -> Any:
    """Return a message, with all messages in it, as the class that has the same fields."""
    values = {
        field.name: tuple(_report_of(item) if field.message_type else item for item in value)
        if field.is_repeated
        else value
        for field in message.DESCRIPTOR.fields
        for value in [getattr(message, field.name)]
    }
    return _CLASSES[message.DESCRIPTOR.name](**values)


_CLASSES: dict[str, Callable[..., Any]] = {
    "GetStatusReply": reports.ClusterStatus,
    "ActorStatus": reports.ActorStatus,
    "ExpertKey": lambda **key: tuple(key.values()),
    "LoadingStatus": reports.LoadingStatus,
    "FailingActor": reports.FailingActor,
    "ProcessStatus": reports.ProcessStatus,
    "ModelKernel": ModelKernel,
    "KernelCount": reports.KernelCount,
    "KernelStatus": reports.KernelStatus,
    "GetLoadReply": reports.LoadStatus,
    "DeviceStatus": reports.DeviceStatus,
    "ExpertLoad": reports.ExpertLoad,
    "GetUsageReply": reports.UsageReport,
    "KeyUsage": reports.KeyUsage,
    "RebalanceReply": reports.RebalanceReport,
    "ChangeReply": reports.ChangeReport,
    "Move": reports.Move,
}
"""By the name of a message of ``admin.proto``."""
