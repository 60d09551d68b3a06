"""The entry point of the ``expertmesh`` command."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Run the command line; the entry point of the installed command."""
    # gRPC's own log lines would stand between ours, as when a server says goodbye.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        # Imported here, so that Ctrl-C during the imports shows no stack either.
        from router.cli.app import app

        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a model may write what its encoding has not
                stream.reconfigure(errors="replace")
        app()
    except KeyboardInterrupt:
        sys.exit(130)
