"""The old import path of deployment files, for one release: ``router.gateway.grpc.service``."""

from router.gateway.grpc.service import add_services_to_server as add_services_to_server
