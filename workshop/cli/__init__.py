"""The commands of the workshop, which ``expertmesh`` finds by entry points."""
