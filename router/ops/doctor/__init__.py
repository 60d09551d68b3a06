"""Examines a machine and judges whether a deployment can start there."""
