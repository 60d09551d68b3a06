"""A replica's client of the controller, its copy of the placement, and its readiness."""
