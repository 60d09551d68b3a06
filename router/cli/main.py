"""The entry point of the ``expertmesh`` command."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Run the command line."""
    # gRPC writes log lines to the terminal too, as when a server closes a connection.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        # Imported here, so that Ctrl-C during the imports prints no stack either.
        from router.cli.app import app

        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # not every encoding has every character
                stream.reconfigure(errors="replace")
        app()
    except KeyboardInterrupt:
        sys.exit(130)
