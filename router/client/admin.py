"""The calls of the Admin service, for both clients.

A function builds each call, and a method of each client makes it. The methods of both clients have
the same arguments and results; those of :class:`AsyncAdminClient` are coroutines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from cluster import reports
from cluster.reports import ChangeReport, ClusterStatus, LoadStatus, RebalanceReport
from router.client.session import CHANGE_TIMEOUT_S, INFO_TIMEOUT_S, Answer, Call, Session
from router.protos import admin_pb2


class AdminClient(ABC):
    """The methods of :class:`router.client.Client` that call the Admin service."""

    _session: Session

    @abstractmethod
    def _ask(self, call: Call[Answer]) -> Answer:
        """Make a call once and return its answer."""

    def status(self) -> ClusterStatus:
        """Return the processes of the cluster, and the experts of each actor."""
        return self._ask(_status(self._session))

    def load(self) -> LoadStatus:
        """Return the recent load of experts and devices, and the last rebalancings."""
        return self._ask(_load(self._session))

    def rebalance(self, dry_run: bool = False) -> RebalanceReport:
        """Move and copy experts to follow the load; with ``dry_run``, only report the changes.

        Returns when the changes are done. Raises :class:`UnavailableError` while experts are
        missing.
        """
        return self._ask(_rebalance(self._session, dry_run))

    def scale(self, actors: int, pool: str = "", dry_run: bool = False) -> ChangeReport:
        """Bring a pool to a number of actors; with ``dry_run``, only report the changes.

        Returns when the experts are spread over the actors, or while an actor waits for a device.
        Raises :class:`InvalidRequestError` where the number is out of bounds or the experts do not
        fit.
        """
        return self._ask(_scale(self._session, actors, pool, dry_run))

    def drain(self, target: str, dry_run: bool = False) -> ChangeReport:
        """Empty and end an actor, or all actors of a node, given by its id or the id's beginning.

        Raises as :meth:`scale` does.
        """
        return self._ask(_drain(self._session, target, dry_run))

    def set_copies(
        self, model: str, layer: int, expert: int, copies: int, dry_run: bool = False
    ) -> ChangeReport:
        """Bring one expert to a number of copies, until a rebalancing changes it again.

        Raises as :meth:`scale` does.
        """
        return self._ask(_set_copies(self._session, model, layer, expert, copies, dry_run))


class AsyncAdminClient(ABC):
    """The methods of :class:`router.client.AsyncClient` that call the Admin service."""

    _session: Session

    @abstractmethod
    async def _ask(self, call: Call[Answer]) -> Answer:
        """Make a call once and return its answer."""

    async def status(self) -> ClusterStatus:
        """See :meth:`AdminClient.status`."""
        return await self._ask(_status(self._session))

    async def load(self) -> LoadStatus:
        """See :meth:`AdminClient.load`."""
        return await self._ask(_load(self._session))

    async def rebalance(self, dry_run: bool = False) -> RebalanceReport:
        """See :meth:`AdminClient.rebalance`."""
        return await self._ask(_rebalance(self._session, dry_run))

    async def scale(self, actors: int, pool: str = "", dry_run: bool = False) -> ChangeReport:
        """See :meth:`AdminClient.scale`."""
        return await self._ask(_scale(self._session, actors, pool, dry_run))

    async def drain(self, target: str, dry_run: bool = False) -> ChangeReport:
        """See :meth:`AdminClient.drain`."""
        return await self._ask(_drain(self._session, target, dry_run))

    async def set_copies(
        self, model: str, layer: int, expert: int, copies: int, dry_run: bool = False
    ) -> ChangeReport:
        """See :meth:`AdminClient.set_copies`."""
        return await self._ask(_set_copies(self._session, model, layer, expert, copies, dry_run))


def _status(session: Session) -> Call[ClusterStatus]:
    request = admin_pb2.GetStatusRequest()
    return _call(session.admin.GetStatus, request, INFO_TIMEOUT_S)


def _load(session: Session) -> Call[LoadStatus]:
    request = admin_pb2.GetLoadRequest()
    return _call(session.admin.GetLoad, request, INFO_TIMEOUT_S)


def _rebalance(session: Session, dry_run: bool) -> Call[RebalanceReport]:
    request = admin_pb2.RebalanceRequest(dry_run=dry_run)
    return _call(session.admin.Rebalance, request, CHANGE_TIMEOUT_S)


def _scale(session: Session, actors: int, pool: str, dry_run: bool) -> Call[ChangeReport]:
    request = admin_pb2.ScaleRequest(actors=actors, pool=pool, dry_run=dry_run)
    return _call(session.admin.Scale, request, CHANGE_TIMEOUT_S)


def _drain(session: Session, target: str, dry_run: bool) -> Call[ChangeReport]:
    request = admin_pb2.DrainRequest(target=target, dry_run=dry_run)
    return _call(session.admin.Drain, request, CHANGE_TIMEOUT_S)


def _set_copies(
    session: Session, model: str, layer: int, expert: int, copies: int, dry_run: bool
) -> Call[ChangeReport]:
    request = admin_pb2.SetCopiesRequest(
        model=model, layer=layer, expert=expert, copies=copies, dry_run=dry_run
    )
    return _call(session.admin.SetCopies, request, CHANGE_TIMEOUT_S)


def _call(method: Callable[..., Any], request: Any, timeout_s: float) -> Call[Any]:
    """Return a call whose reply is read as a report."""
    return Call(method, request, timeout_s, _report_of)


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
    "ProcessStatus": reports.ProcessStatus,
    "GetLoadReply": reports.LoadStatus,
    "DeviceStatus": reports.DeviceStatus,
    "ExpertLoad": reports.ExpertLoad,
    "RebalanceReply": reports.RebalanceReport,
    "ChangeReply": reports.ChangeReport,
    "Move": reports.Move,
}
"""By the name of a message of ``admin.proto``."""
