"""What every object of a request has in common: how it is read, and how a refusal names a field."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from cluster.errors import InvalidRequestError, shown, shown_name

Schema = dict[str, Any]
NULL: Schema = {"type": "null"}
Text = Annotated[str, Field(min_length=0), WithJsonSchema({"type": "string"})]
"""Any text. Its bound makes pydantic look for halves of surrogate pairs, which are no UTF-8."""
Filled = Annotated[str, Field(min_length=1)]
_REFUSED = "refused"
_MAPPING = "must be a mapping"
_NO_TEXT = {
    "dict_type": _MAPPING,
    "list_type": "must be a list",
    "model_attributes_type": _MAPPING,
    "model_type": _MAPPING,
}
"""By pydantic's types of errors. A text that is given instead may be a prompt's: it is not told."""
_SHOULD = re.compile(r"^\w+ should (.*?)( after validation.*)?$")
_KINDS: Mapping[type, str] = {str: "a string", list: "a list", dict: "a mapping"}


def wrong(value: object, allowed: str) -> str:
    """Return the message for a value that is not allowed."""
    return f"must be {allowed}; got {shown(value)}"


def integer(value: object, field: str, low: int, high: int) -> int:
    """Return ``value`` if it is an integer from ``low`` to ``high``, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(wrong(value, f"an integer from {low} to {high}"), field)
    return value


def text(value: object, field: str) -> str:
    """Return ``value`` if it is a text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InvalidRequestError(wrong(value, "a string"), field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"character {error.start} is half of a surrogate pair, not Unicode text", field
        ) from None
    return value


def either(*kinds: str) -> Discriminator:
    """Return what chooses a type by its tag: ``a text``, ``a list`` or ``a mapping``."""
    return Discriminator(
        lambda value: _KINDS.get(type(value)),
        custom_error_type="kind",
        custom_error_message=f"must be {' or '.join(kinds)}",
    )


def refused(told: str, name: str = "") -> PydanticCustomError:
    """Return what a validator raises to refuse a value, or its field ``name``."""
    name = name.encode(errors="backslashreplace").decode()  # pydantic takes no half of a pair
    return PydanticCustomError(_REFUSED, "{told}", {"told": told, "name": name})


def described(schema: Schema, cls: type[Part]) -> None:
    """Let an object's JSON schema say that ``null`` is a field that is not given."""
    if not cls.null_is_absent:
        return
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and NULL not in field.get("anyOf", ()):
            schema["properties"][name] = {"anyOf": [field, NULL]}
    schema["additionalProperties"] = NULL


class Part(BaseModel):
    """An object within a request; a field that it does not have is refused."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(),
        json_schema_extra=described,
    )  # fmt: skip
    null_is_absent: ClassVar[bool] = False
    names: ClassVar[frozenset[str]] = frozenset()
    """The fields as clients write them."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.names = frozenset(field.alias or name for name, field in cls.model_fields.items())

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        """Return the fields that are set; stops at the first that is unknown, of very many."""
        if not isinstance(value, dict):
            return value
        if cls.names.issuperset(value) and None not in value.values():
            return value  # of a conversation, nearly every message
        given = {}
        for name, each in value.items():
            if each is None and cls.null_is_absent:
                continue
            if name not in cls.names:
                cls._refuse(name, each)
            else:
                given[name] = each
        return given

    @classmethod
    def _refuse(cls, name: str, value: Any) -> None:
        raise refused(
            f"unknown field; allowed: {', '.join(sorted(cls.names))}", shown_name(name) or "''"
        )


class Nullable(Part):
    """An object in which ``null`` is a field that is not given."""

    null_is_absent: ClassVar[bool] = True


Kind = TypeVar("Kind", bound=Part)


def read(kind: type[Kind], body: Mapping[str, Any]) -> Kind:
    """Return a client's fields as an object; raises :class:`InvalidRequestError`."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0], body) from None


def _refusal(error: ErrorDetails, body: Mapping[str, Any]) -> InvalidRequestError:
    """Return pydantic's error by the client's own field, with what is given and what is allowed."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    unknown_in = given if kind == _REFUSED and context["name"] else None
    where = _path(error["loc"], body, kind == "missing", unknown_in)
    told = _NO_TEXT.get(kind) or _SHOULD.sub(r"must \1", error["msg"])
    if kind == _REFUSED:
        name = context["name"]
        path = f"{where}.{name}" if where and name else where or name
        return InvalidRequestError(context["told"], path)
    if tag := context.get("discriminator", "").strip("'"):
        where, given = f"{where}.{tag}", given.get(tag)
        told = f"must be one of {context.get('expected_tags')}"
    if kind in ("missing", "union_tag_not_found"):
        return InvalidRequestError("is missing", where)
    if kind == "string_unicode":
        text(given, where)
    seen = "a string" if kind in _NO_TEXT and isinstance(given, str) else shown(given)
    return InvalidRequestError(f"{told}; got {seen}", where)


def _path(
    location: Sequence[int | str], body: Any, is_missing: bool, unknown_in: object = None
) -> str:
    """Return a field's path; pydantic's location also has the names of types that it chose.

    It ends at the object that an unknown field is in, which may have a field named like its type.
    """
    path, parts = "", location[:-2] if "[key]" in location[-1:] else location
    for place, part in enumerate(parts):
        if body is unknown_in:
            break
        if isinstance(body, list) and isinstance(part, int):
            path, body = f"{path}[{part}]", body[part]
        elif isinstance(body, Mapping) and part in body:
            path, body = f"{path}.{part}" if path else str(part), body[part]
        elif is_missing and place == len(parts) - 1:
            path = f"{path}.{part}" if path else str(part)
    return path


@contextmanager
def renamed(path: Callable[[str], str]) -> Iterator[None]:
    """Name the field of a refusal as the client does, by ``path``."""
    try:
        yield
    except InvalidRequestError as error:
        raise type(error)(error.message, path(error.field)) from None
