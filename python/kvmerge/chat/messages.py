"""The messages of a chat: what they may hold, and one form for what several services call it.

Nothing is left out silently: what is not known is refused by its name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import OptionError, did_you_mean

log = logging.getLogger("kvmerge")

MEDIA_TYPES = {
    "image_url": "image",
    "image": "image",
    "input_image": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "audio": "audio",
}
"""The types of parts that are pictures or sounds."""

_SOURCES = {
    "image_url": ("image_url",),
    "image": ("image", "source", "url", "path", "base64", "data"),
    "input_image": ("image_url",),
    "input_audio": ("input_audio",),
    "audio_url": ("audio_url",),
    "audio": ("audio", "source", "url", "path", "base64", "data"),
}
"""Where a part of each type says what to show."""

_TEXT_TYPES = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_ELSEWHERE = ("file_id", "file")
_MEDIA_KEYS = frozenset(
    "image_url image_urls image images image_path image_paths image_data input_image img photo "
    "photos picture pictures audio_url audio audios input_audio video video_url videos input_video "
    "file files file_id input_file document documents source media multi_modal_data attachments "
    "experimental_attachments".split()
)
"""Keys under which services hold media: never passed over."""

_DEPTH = 64


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return messages as a list of dictionaries whose contents are texts or lists of parts.

    Parameters
    ----------
    messages : iterable of dict
        In the form of OpenAI (chats and responses), Anthropic, Ollama or Hugging Face; text and
        pictures.

    Raises
    ------
    OptionError
        If there are none, or one holds what cannot be shown to a model.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not _is_iterable(messages):
        raise OptionError(
            f"messages must be a list of messages, such as [{{'role': 'user', 'content': 'Hi'}}], "
            f"not {type(messages).__name__}"
        )
    checked = [_message(message, number) for number, message in enumerate(messages, 1)]
    if not checked:
        raise OptionError("messages is empty: there is nothing to answer")
    return checked


def media_source(part: Mapping[str, Any]) -> Any:
    """Return what a part that is a picture or sound shows, or None if it does not say."""
    kind = str(part["type"])
    key = next((key for key in _SOURCES[kind] if part.get(key) is not None), None)
    source = None if key is None else part[key]
    is_base64 = kind == "input_audio" or key in ("base64", "data")
    if isinstance(source, Mapping):
        is_base64 = is_base64 or source.get("type") == "base64"
        key = next(
            (key for key in ("url", "data", "path", "base64") if source.get(key) is not None), None
        )
        source = None if key is None else source[key]
    if isinstance(source, Mapping):
        return None
    if is_base64 and isinstance(source, str) and source.lstrip()[:5].lower() != "data:":
        return f"data:;base64,{source}"
    return source


def joined(messages: list[dict[str, Any]], media: str = "") -> list[dict[str, Any]]:
    """Return messages whose contents are single texts, with `media` where a picture is."""

    def text(part: Mapping[str, Any]) -> str:
        return media if part["type"] in MEDIA_TYPES else str(part["text"])

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": "".join(map(text, message["content"]))}
        for message in messages
    ]


def warn_of_left_out(messages: list[dict[str, Any]], text: str, what: str) -> None:
    """Write to the log which messages a chat template leaves out of a prompt.

    Templates show some roles only, and say nothing of others. What assistants said is not looked
    at: many templates drop their reasoning on purpose.
    """
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            continue
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text") for part in content]
        shown = (str(part).strip() for part in parts if part)
        if not all(part in text or json.dumps(part)[1:-1] in text for part in shown):
            log.warning(
                "%s leaves out some of message %d (role %s): the model does not see it",
                what,
                number,
                _shown(message["role"]),
            )


def check_text(value: Any, where: str, depth: int = 0) -> None:
    """Check that all text in a value, however deep, can be written as UTF-8.

    Raises
    ------
    OptionError
        If some cannot.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise OptionError(
                f"{where} holds {value[error.start]!a} at character {error.start}, half of a "
                "surrogate pair, which is no text: decode it with errors='replace'"
            ) from error
    elif depth > _DEPTH:
        raise OptionError(f"{where} is nested more than {_DEPTH} deep")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            check_text(key, where, depth + 1)
            check_text(each, where, depth + 1)
    elif isinstance(value, (list, tuple)):
        for each in value:
            check_text(each, where, depth + 1)


def _message(message: Any, number: int) -> dict[str, Any]:
    where = f"message {number}"
    if callable(getattr(message, "model_dump", None)):  # a message of the OpenAI SDK
        message = message.model_dump(exclude_none=True)
    if not isinstance(message, Mapping):
        raise OptionError(
            f"{where} is of type {type(message).__name__}: it must be a dictionary with 'role' and "
            "'content'"
        )
    made = dict(message)
    role = made.get("role")
    if not isinstance(role, str) or not role:
        raise OptionError(f"{where} has the role {_shown(role)}: it must be a text such as 'user'")
    where = f"{where} ({_shown(role)})"
    pictures = _pictures(made.pop("images", None), where)
    check_text({key: value for key, value in made.items() if key != "content"}, where)
    for key in sorted(key for key in _MEDIA_KEYS & set(made) if not _is_nothing(made[key])):
        raise OptionError(
            f"{where} has {key!r} beside its content, which is not read: pictures are parts of the "
            "content, or base64 in 'images'"
        )
    calls = made.get("tool_calls")
    if not (_is_nothing(calls) or isinstance(calls, (list, tuple))):
        raise OptionError(f"{where} has 'tool_calls' of type {type(calls).__name__}: not a list")
    content = made.get("content")
    if content is None:
        calls = made.get("tool_calls"), made.get("function_call")
        if not pictures and all(map(_is_nothing, calls)):
            raise OptionError(f"{where} has no content: it must be a text or a list of parts")
        content = ""
    if isinstance(content, str):
        check_text(content, where)
        made["content"] = [*pictures, {"type": "text", "text": content}] if pictures else content
        return made
    if isinstance(content, (bytes, Mapping)) or not _is_iterable(content):
        raise OptionError(
            f"{where} has a content of type {type(content).__name__}: it must be a text or a list "
            "of parts"
        )
    parts = [_part(part, f"{where}, part {i}") for i, part in enumerate(content, 1)]
    made["content"] = [*pictures, *parts]
    return made


def _pictures(images: Any, where: str) -> list[dict[str, Any]]:
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        raise OptionError(
            f"{where} has 'images' of type {type(images).__name__}: it must be a list"
        )
    return [{"type": "image", "image": image} for image in images]


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    elif callable(getattr(part, "model_dump", None)):
        part = part.model_dump(exclude_none=True)
    if not isinstance(part, Mapping):
        raise OptionError(f"{where} is of type {type(part).__name__}: it must be a dictionary")
    made = dict(part)
    if "type" not in made:
        keys = ", ".join(_shown(key) for key in list(made)[:5]) or "nothing"
        raise OptionError(f"{where} has no 'type' (it has {keys}). {_accepted()}")
    kind = made["type"]
    if not isinstance(kind, str) or kind not in {*_TEXT_TYPES, *MEDIA_TYPES}:
        hint = did_you_mean(kind, [*_TEXT_TYPES, *MEDIA_TYPES]) if isinstance(kind, str) else ""
        raise OptionError(
            f"{where} is of the type {_shown(kind)}, which cannot be shown.{hint} {_accepted()}"
        )
    own = _SOURCES.get(kind, ())
    for key in sorted(key for key in _MEDIA_KEYS & set(made) - set(own) if made[key] is not None):
        raise OptionError(
            f"{where} is of the type {kind!r} and has {key!r} as well, which is not read there"
        )
    given = [key for key in own if made.get(key) is not None]
    if len(given) > 1:
        raise OptionError(
            f"{where} is of the type {kind!r} and has {given[0]!r} and {given[1]!r}: it is one "
            "picture or sound"
        )
    source = made[given[0]] if given else None
    if isinstance(source, Mapping):
        for key in _ELSEWHERE:
            if source.get(key) is not None:
                raise OptionError(
                    f"{where} names a file of another service ({key!r}), which is not here"
                )
    if kind in MEDIA_TYPES:
        return made
    text = made.get(_TEXT_TYPES[kind])
    if not isinstance(text, str):
        raise OptionError(
            f"{where} has {_TEXT_TYPES[kind]!r} of type {type(text).__name__}: it must be a text"
        )
    check_text(made, where)
    return {**made, "type": "text", "text": text}


def _is_iterable(value: object) -> bool:
    """Whether a value can be gone through; an array of no dimension only says that it can."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)


def _accepted() -> str:
    return "Accepted: " + ", ".join(repr(kind) for kind in (*_TEXT_TYPES, *MEDIA_TYPES))


def _shown(value: object) -> str:
    words = (
        ascii(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__
    )
    return words if len(words) <= 80 else words[:79] + "…"
