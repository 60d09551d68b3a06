"""The controller of actors that write down what they did."""

from __future__ import annotations

from benchmarks.devices import RecordingRemoteActor
from router.serve.controller import ControllerDeployment


class RecordingController(ControllerDeployment):
    """A controller of recording actors."""

    actor_class = RecordingRemoteActor
