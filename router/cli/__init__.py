"""The ``expertmesh`` command; each of its commands is a module here."""
