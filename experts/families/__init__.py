"""The registry of model families: one small file each, found by the config's ``model_type``."""

from __future__ import annotations

from experts.families.base import ExpertShape, Family
from experts.families.mixtral import MIXTRAL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MIXTRAL,)}

__all__ = ["FAMILIES", "ExpertShape", "Family"]
