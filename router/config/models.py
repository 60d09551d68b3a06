"""One model of a deployment file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from experts.checkpoint.hub import parse_hub_id
from router.section import Section


class ModelConfig(Section):
    """One model to serve."""

    id: str = Field(
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$",
        description="The name that clients use.",
    )
    path: str = Field(
        min_length=1,
        description="A folder (absolute, or beside the file, where `serve run` does not look, or "
        "inside the installed `deploy` package), or a Hugging Face hub id: `owner/name`, or "
        "`owner/name@revision` with a commit, tag or branch.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of weights and computation. `auto` takes the checkpoint's, or "
        "a mixture's.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        description="Longest prompt plus output, in tokens. Without it, the model's own context.",
    )

    @field_validator("path")
    @classmethod
    def _has_a_revision_after_the_at(cls, path: str) -> str:
        parse_hub_id(path)  # raises
        return path
