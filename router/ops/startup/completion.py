"""Has ``serve run`` and ``serve deploy`` start Serve by a completed deployment file.

The commands read Serve's part of the file before they import anything of ours. They use it later:
``serve run`` to start Serve, ``serve deploy`` as the body of a request. This module replaces those
two functions of Ray. A later Ray that calls neither starts Serve by the file alone, and the builder
logs it (:mod:`router.serve.instance`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.serve._private import api
from ray.serve.config import gRPCOptions
from ray.serve.schema import ServeDeploySchema

from router.serve.options import completed


def start_serve_with(
    document: Mapping[str, Any], on_ray: Callable[[], None], on_deployed: Callable[[], None]
) -> None:
    """Have a later ``serve_start`` of this process take its options from a completed document.

    They replace the caller's, which are those of the same file before its completion. ``on_ray`` is
    called once this process is connected to its Ray, ``on_deployed`` once Serve has the file.
    """
    start = api.serve_start

    def serve_start(**given: Any) -> Any:
        on_ray()
        file = ServeDeploySchema.model_validate(document)
        options = {
            "http_options": file.http_options.model_dump(),
            "proxy_location": file.proxy_location,
            "grpc_options": gRPCOptions(**file.grpc_options.model_dump()),
            "controller_options": file.controller_options,
        }
        client = start(**given | options)
        deploy = client.deploy_apps

        def deploy_apps(*args: Any, **options: Any) -> Any:
            result = deploy(*args, **options)
            on_deployed()
            return result

        client.deploy_apps = deploy_apps
        return client

    api.serve_start = serve_start


def complete_sent_file(has_haproxy: bool) -> None:
    """Have a file that this process sends to a cluster's dashboard completed; see ``completed``."""
    send = ServeSubmissionClient.deploy_applications

    def deploy_applications(client: ServeSubmissionClient, config: dict[str, Any]) -> None:
        send(client, completed(config, joins=True, has_haproxy=has_haproxy))

    ServeSubmissionClient.deploy_applications = deploy_applications
