"""Makes the reports of ``cluster.reports`` from the replies of the Admin service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster import reports
from cluster.spec import ModelKernel


def report_of(message: Any) -> Any:
    """Return a message, with all messages in it, as the class that has the same fields."""
    values = {
        field.name: tuple(report_of(item) if field.message_type else item for item in value)
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
