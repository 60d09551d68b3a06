"""What a conversation is, below HTTP and gRPC: a list of messages, each with a role and a text."""

from __future__ import annotations

from cluster.errors import InvalidRequestError
from router.gateway import checks

ROLES = ("system", "developer", "user", "assistant")
MAX_MESSAGES = 4096


def check_messages(given: object, where: str) -> list[dict[str, str]]:
    """Return the messages as chat templates take them, ``{"role": …, "content": …}`` each.

    A content may be OpenAI's list of text parts, which are joined. Raises
    :class:`InvalidRequestError` that names the message and its part.
    """
    if not isinstance(given, list) or not given:
        raise InvalidRequestError(checks.wrong_kind(given, "a list of at least one message"), where)
    if len(given) > MAX_MESSAGES:
        raise InvalidRequestError(f"has {len(given)} messages; at most {MAX_MESSAGES}", where)
    return [_message(one, f"{where}[{place}]") for place, one in enumerate(given)]


def _message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        allowed = "a mapping with role and content"
        raise InvalidRequestError(checks.wrong_kind(message, allowed), where)
    given = {name: value for name, value in message.items() if value is not None}
    unknown = [name for name in given if name not in ("role", "content", "name")]
    if unknown:
        raise InvalidRequestError(
            "is not supported; allowed: role, content, name", f"{where}.{unknown[0]}"
        )
    role = given.get("role")
    if role not in ROLES:
        raise InvalidRequestError(checks.wrong(role, f"one of {', '.join(ROLES)}"), f"{where}.role")
    # Templates know OpenAI's newer name for a system message as little as models do.
    known_role = "system" if role == "developer" else str(role)
    return {"role": known_role, "content": _content(given.get("content"), f"{where}.content")}


def _content(content: object, where: str) -> str:
    if not isinstance(content, list):
        return checks.text(content, where)
    texts: list[str] = []
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) - {"type", "text"}:
            raise InvalidRequestError(
                checks.wrong_kind(part, 'a part {"type": "text", "text": …}'), f"{where}[{place}]"
            )
        texts.append(checks.text(part.get("text"), f"{where}[{place}].text"))
    return "".join(texts)
