"""The old import path of deployment files, for one release: ``router.ops.startup.preflight``."""

from router.ops.startup.preflight import (
    PowerOfTwoChoicesRequestRouter as PowerOfTwoChoicesRequestRouter,
)
