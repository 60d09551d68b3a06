"""The keys of a deployment file about who may use the deployment."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from router.section import Section


def with_open_word(schema: dict[str, Any]) -> None:
    """Let the JSON Schema of a key that has this section take the word `open`, too."""
    schema["anyOf"] = [{"const": "open"}, {"$ref": schema.pop("$ref")}]


class SecurityConfig(Section):
    """Who may use the deployment; `security: open` is short for `open: true`.

    Without keys everybody who reaches a port may use it, so that no host but loopback is allowed,
    unless the deployment is `open`.
    """

    keys_file: str | None = Field(
        default=None,
        min_length=1,
        description="A file of keys that `expertmesh keys new` makes, at the same path on every "
        "node with a gateway. Every request then needs a key. A change counts within seconds.",
    )
    open: bool = Field(
        default=False,
        description="Lets hosts that are not loopback do without keys: whoever reaches a port may "
        "use it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, given: Any) -> Any:
        if isinstance(given, str) and given != "open":
            raise ValueError("must be open, or a mapping")
        return {"open": True} if given == "open" else given

    @model_validator(mode="after")
    def _is_one(self) -> SecurityConfig:
        if self.open and self.keys_file is not None:
            raise ValueError("open cannot be given together with keys_file")
        return self

    @property
    def is_protected(self) -> bool:
        """Whether the deployment has keys, or is open on purpose."""
        return self.open or self.keys_file is not None
