"""What a Serve that was started by a file alone lacks, and when it may be told to be quiet."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.schema import LoggingConfig, ServeApplicationSchema

from router.serve.instance import grpc_address, logs_by_default, warn_and_quieten

OURS = ["router.gateway.grpc.service:add_services_to_server"]


@pytest.mark.parametrize(
    ("grpc", "location", "missing"),
    [
        ({}, ProxyLocation.EveryNode, ("0.0.0.0", 9000)),
        ({"port": 91}, ProxyLocation.HeadOnly, ("0.0.0.0", 91)),
        ({"port": 0}, ProxyLocation.EveryNode, None),
        ({"grpc_servicer_functions": OURS}, ProxyLocation.EveryNode, None),
        ({}, ProxyLocation.Disabled, None),
        ({}, None, ("0.0.0.0", 9000)),
    ],
)
def test_gateways_answer_grpc_where_serve_was_not_told_to(
    grpc: dict[str, Any], location: ProxyLocation | None, missing: tuple[str, int] | None
) -> None:
    assert grpc_address(gRPCOptions(**grpc), HTTPOptions(host="0.0.0.0"), location) == missing


def application(import_path: str = "router.app:build", **others: Any) -> ServeApplicationSchema:
    return ServeApplicationSchema(name="a", import_path=import_path, **others)


@pytest.mark.parametrize(
    ("applications", "log", "environment", "may_be"),
    [
        ([application()], LoggingConfig(), {}, True),
        ([application(), application()], LoggingConfig(), {}, True),
        ([application(), application("other:app")], LoggingConfig(), {}, False),
        ([application(logging_config={"log_level": "INFO"})], LoggingConfig(), {}, False),
        ([application()], LoggingConfig(log_level="DEBUG"), {}, False),
        ([application()], LoggingConfig(), {"RAY_SERVE_LOG_TO_STDERR": "1"}, False),
    ],
)
def test_serve_is_quietened_only_where_nobody_has_said_how_it_logs(
    applications: list[ServeApplicationSchema],
    log: LoggingConfig,
    environment: dict[str, str],
    may_be: bool,
) -> None:
    assert logs_by_default(applications, log, environment) == may_be


def test_outside_serves_own_task_nothing_is_done() -> None:
    warn_and_quieten()  # there is no Ray here, nor a Serve to be asked
