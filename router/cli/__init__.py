"""The ``expertmesh`` command; each of its commands is a module here."""

from router.cli.app import main

__all__ = ["main"]
