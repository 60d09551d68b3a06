"""What Serve says of an application: whether it is to run, and whether gateways are to come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.serve.schema import ApplicationStatus, DeploymentStatus

from cluster.controller.application import app_is_wanted, is_replaced_later

RUNNING, DELETING = ApplicationStatus.RUNNING, ApplicationStatus.DELETING
HEALTHY, UPDATING = DeploymentStatus.HEALTHY, DeploymentStatus.UPDATING
FAILED = DeploymentStatus.DEPLOY_FAILED


def serve_says(
    patch: pytest.MonkeyPatch, status: ApplicationStatus | None, **deployments: DeploymentStatus
) -> None:
    """Let Serve have one application, or not run at all; ``_`` in a name stands for a hyphen."""
    told = SimpleNamespace(
        app_status=SimpleNamespace(status=status, message=""),
        deployment_statuses=[
            SimpleNamespace(name=name.replace("_", "-"), status=one, message="")
            for name, one in deployments.items()
        ],
    )

    def get_serve_status(app: str) -> SimpleNamespace:
        assert app == "mesh"
        return told

    client = None if status is None else SimpleNamespace(get_serve_status=get_serve_status)
    patch.setattr("ray.serve.context._get_global_client", lambda **_: client)


@pytest.mark.parametrize(
    ("status", "is_wanted"),
    [(RUNNING, True), (DELETING, False), (ApplicationStatus.NOT_STARTED, False), (None, False)],
)
def test_an_application_is_wanted_until_it_is_deleted(
    status: ApplicationStatus | None, is_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_says(monkeypatch, status)
    assert app_is_wanted("mesh") == is_wanted


@pytest.mark.parametrize(
    ("status", "deployments", "is_later"),
    [
        (RUNNING, {}, False),
        (RUNNING, {"Gateway_old": UPDATING}, False),  # its own end
        (RUNNING, {"Gateway_new": HEALTHY, "Gateway_old": UPDATING}, False),
        (RUNNING, {"Gateway_new": UPDATING, "Gateway_old": UPDATING}, True),
        (RUNNING, {"Gateway_new": FAILED}, True),  # nobody else answers yet
        (RUNNING, {"Gateway_new": HEALTHY, "Gateway_newer": UPDATING}, True),
        (RUNNING, {"Controller": UPDATING, "Router_tiny": UPDATING}, False),
        (DELETING, {"Gateway_new": UPDATING}, False),
        (None, {}, False),
    ],
)
def test_a_gateway_waits_for_successors_that_do_not_run_yet(
    status: ApplicationStatus | None,
    deployments: dict[str, DeploymentStatus],
    is_later: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve_says(monkeypatch, status, **deployments)
    assert is_replaced_later("mesh", "Gateway-old") == is_later
