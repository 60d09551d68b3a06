"""The calls by which Serve's commands start Serve, with a completed file in the file's place."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.serve import scripts
from ray.serve._private import api
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.schema import ServeDeploySchema

from router.ops.startup.completion import complete_sent_file, start_serve_with
from router.serve.options import HAPROXY, completed, serve_variables

SHORT = {
    "grpc_options": {"port": 91},
    "applications": [{"name": "a", "import_path": "router.app:build", "args": {}}],
}


def test_serve_is_started_by_the_completed_file(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    order: list[str] = []

    class Client:
        def deploy_apps(self, config: Any, _blocking: bool) -> str:
            assert not _blocking
            order.append("deploy")
            return f"deployed {config}"

    def serve_start(**options: Any) -> Client:
        started.append(options)
        order.append("start")
        return Client()

    monkeypatch.setattr(api, "serve_start", serve_start)
    document = completed(SHORT)
    start_serve_with(document, lambda: order.append("ray"), lambda: order.append("deployed"))
    # As ray.serve.scripts does with the same file, that it has read before.
    own = ServeDeploySchema.model_validate(SHORT)
    client = scripts._private_api.serve_start(
        http_options=own.http_options.model_dump(),
        proxy_location=own.proxy_location,
        grpc_options=gRPCOptions(**own.grpc_options.model_dump()),
        controller_options=own.controller_options,
    )
    assert client.deploy_apps("file", _blocking=False) == "deployed file"
    assert order == ["ray", "start", "deploy", "deployed"]
    [options] = started
    assert HTTPOptions.model_validate(options["http_options"]).host == "127.0.0.1"
    assert options["proxy_location"] == ProxyLocation.EveryNode
    assert options["grpc_options"].port == 91
    assert len(options["grpc_options"].grpc_servicer_func_callable) == 1
    variables = options["controller_options"].runtime_env["env_vars"]
    assert variables == serve_variables(document)


@pytest.mark.parametrize("has_haproxy", [True, False])
def test_what_is_sent_to_a_cluster_is_completed(
    has_haproxy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    def deploy_applications(client: Any, config: dict[str, Any]) -> None:
        sent.append((client, config))

    monkeypatch.setattr(ServeSubmissionClient, "deploy_applications", deploy_applications)
    complete_sent_file(has_haproxy)
    client = object.__new__(ServeSubmissionClient)
    config = ServeDeploySchema.model_validate(SHORT).model_dump(exclude_unset=True)
    client.deploy_applications(config)
    [(by, document)] = sent
    assert by is client
    assert document == completed(config, joins=True, has_haproxy=has_haproxy)
    assert (HAPROXY in serve_variables(document)) == has_haproxy
    again = ServeDeploySchema.model_validate(document)
    assert (again.http_options.host, again.grpc_options.port) == ("0.0.0.0", 91)
    assert again.grpc_options.grpc_servicer_functions
    assert again.controller_options is not None


def test_serves_command_makes_the_calls_that_are_taken_over() -> None:
    run = inspect.getsource(scripts.run.callback)
    assert "client = _private_api.serve_start(" in run
    assert "client.deploy_apps(config, _blocking=False)" in run
    assert "ServeSubmissionClient(address).deploy_applications(" in inspect.getsource(
        scripts.deploy.callback
    )
