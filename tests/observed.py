"""The dashboard that is shipped, as tests look at it."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

import deploy


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana would load it."""
    text = files(deploy).joinpath("dashboards", "expertmesh.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def panels() -> list[dict[str, Any]]:
    """Return the panels that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_names(expr: str) -> set[str]:
    """Return the names of the metrics in a PromQL expression."""
    return set(re.findall(r"\bexpertmesh_\w+", expr))
