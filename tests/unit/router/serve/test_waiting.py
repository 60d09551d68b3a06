"""What is logged of deployments whose replicas find no place."""

from __future__ import annotations

import asyncio
import logging
from unittest.mock import Mock

import pytest
from ray.serve.schema import ApplicationStatus, DeploymentStatus

from cluster.ray_private import AppStatus, DeploymentState
from router.serve import waiting
from router.serve.waiting import Notices, log_what_serve_says

WAITS = "has 1 replicas that have taken more than 30s\n to be scheduled"


def test_a_message_is_logged_at_once_and_then_ever_more_seldom() -> None:
    notices = Notices()
    logged = [now_s for now_s in range(0, 2000, 10) if notices.due({"Router-m": WAITS}, now_s)]
    assert logged == [0, 10, 20, 40, 80, 160, 320, 640, 960, 1280, 1600, 1920]


def test_each_message_waits_for_itself_and_a_later_one_is_new() -> None:
    notices, m, n = Notices(), {"Router-m": WAITS}, {"Router-n": "b"}
    assert notices.due({}, 0) == []
    assert notices.due(m, 5) == [
        "Router-m: has 1 replicas that have taken more than 30s to be scheduled"
    ]
    assert notices.due(m | n, 10) == ["Router-n: b"]
    assert notices.due(n, 12) == []
    assert len(notices.due(m | n, 14)) == 1  # m is new again
    assert notices.due({"Router-n": "c"}, 15) == ["Router-n: c"]


def test_only_deployments_that_are_not_healthy_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    healthy, updating = DeploymentStatus.HEALTHY, DeploymentStatus.UPDATING
    told = {
        "Gateway-1": DeploymentState(healthy, "had been slow"),
        "Controller": DeploymentState(updating),
        "Router-m": DeploymentState(updating, WAITS),
    }
    answers = [
        RuntimeError("no connection"),
        AppStatus(ApplicationStatus.DEPLOYING, "", told),
        AppStatus(ApplicationStatus.DEPLOY_FAILED, "Deploying failed:\nno folder", {}),
        None,
    ]
    app_status, failed = Mock(side_effect=[*answers, IndexError]), []
    monkeypatch.setattr(waiting, "app_status", app_status)
    monkeypatch.setattr(waiting, "PERIOD_S", 0.0)
    with caplog.at_level(logging.WARNING), pytest.raises(IndexError):
        asyncio.run(asyncio.wait_for(log_what_serve_says("a", failed.append), 10))
    app_status.assert_called_with("a")
    assert failed == ["", "Deploying failed: no folder", ""]
    assert [record.getMessage() for record in caplog.records] == [
        "Serve did not report the state of its deployments: no connection",
        "Router-m: has 1 replicas that have taken more than 30s to be scheduled",
        "the last deployment failed, the former one serves: Deploying failed: no folder",
    ]
