"""Faults put back one at a time, each a patch; :mod:`tests.world.mutants.find` looks for each."""
