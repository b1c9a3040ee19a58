"""A message of an assistant at the end of a chat, which the answer goes on from.

Chat templates close every message.  A mark that no text contains by chance is put at the end of
the last one, and the prompt ends where the template has written the mark.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from ..errors import OptionError


class Continuation:
    """Where a prompt is to end.

    Parameters
    ----------
    messages : sequence of dict
        As `kvmerge.chat.messages.check_messages` returns them.

    Raises
    ------
    OptionError
        If the last message calls a tool, which has to answer first.
    """

    def __init__(self, messages: Sequence[dict[str, Any]]) -> None:
        last = messages[-1]
        self._mark = ""
        if last["role"] != "assistant":
            return
        if last.get("tool_calls") or last.get("function_call"):
            raise OptionError(
                f"message {len(messages)}, the last one, calls a tool: what the tool answers has "
                "to follow, as a message of the role 'tool'"
            )
        self._mark = f"[{secrets.token_hex(12)}]"

    def marked(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with the mark, where the last one is to be gone on from."""
        if not self._mark:
            return messages
        content = messages[-1]["content"]
        if isinstance(content, str):
            content += self._mark
        else:
            content = [*content, {"type": "text", "text": self._mark}]
        return [*messages[:-1], {**messages[-1], "content": content}]

    def cut(self, text: str) -> str:
        """Return a prompt up to the mark.

        Raises
        ------
        OptionError
            If the chat template does not write the last message.
        """
        if not self._mark:
            return text
        before, mark, _ = text.rpartition(self._mark)
        if not mark:
            raise OptionError(
                "the last message is of an assistant, and the chat template does not show it: it "
                "cannot be gone on from"
            )
        return before
