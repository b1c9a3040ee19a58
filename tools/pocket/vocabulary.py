"""Tokens of the pocket model.

The vocabulary holds all 256 bytes in the alphabet of GPT-2, the markers of the chat template, and
the words of the tasks.  A piece of text that is a word of the vocabulary is one token, every other
piece falls apart into its bytes, so any text can be tokenized.  `encode` gives the same tokens as
llama.cpp with ``tokenizer.ggml.pre = "llama-bpe"`` for ASCII text.
"""

from __future__ import annotations

import re
from functools import lru_cache

from pocket import tasks as t
from pocket.render import COLOURS, LETTERS, SHAPES

__all__ = [
    "ASSISTANT",
    "BEGIN",
    "CHAT_TEMPLATE",
    "END",
    "MEDIA_MARKER",
    "SIZE",
    "SYSTEM",
    "SYSTEM_TEXTS",
    "TOKENS",
    "USER",
    "WORDS",
    "decode",
    "encode",
]

SIZE = 640
BEGIN, END, USER, ASSISTANT, SYSTEM, TOOL = range(256, 262)
SPECIALS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")
MEDIA_MARKER = "<__media__>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|{{ message['role'] }}|>"
    "{%- if message['content'] is string -%}"
    "{{ message['content'] }}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}"
    "{%- else -%}<__media__>{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "Answer the question.",
    "Look at the pictures and answer briefly.",
)

_PIECES = re.compile(
    r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
    r"|[^\r\nA-Za-z0-9]?[A-Za-z]+"
    r"|[0-9]{1,3}"
    r"| ?[^\sA-Za-z0-9]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_alphabet() -> list[str]:
    """The printable character that GPT-2 writes for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in plain}
    extra = 0
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + extra)
            extra += 1
    return [table[b] for b in range(256)]


_BYTES = _byte_alphabet()


def _texts() -> list[str]:
    """Texts that hold every word of the tasks."""
    result = [
        *SYSTEM_TEXTS,
        "Picture 1:",
        "The code of the long box is 1.",
        "The long box is in the kitchen.",
        "Anna went to the kitchen on Monday.",
        "It was cold in the kitchen on Monday. It was.",
        "A picture. The picture. Picture 1. Pictures. Text, text and no more of it.",
        "Anna saw a long box.",
        "Which letter is on the red circle?",
        "What shape is in picture 1?",
        "What colour is in picture 1?",
        "Which picture has the letter A?",
        "How many pictures show red?",
        "What is the code of the long box?",
        "List all letters in order.",
        "List all colours in order.",
        "List all shapes in order.",
        "Describe every picture.",
        "none so 0",
    ]
    told = (t.ADJECTIVES, t.NOUNS, t.PLACES, t.PEOPLE, t.DAYS, t.WEATHER)
    for group in (*told, tuple(COLOURS), SHAPES, LETTERS):
        for word in group:
            result += [word, " " + word]
    result += [str(n) for n in range(10, 33)]
    return result


def _tokens() -> list[str]:
    known = dict.fromkeys([*_BYTES, *SPECIALS])
    for text in _texts():
        for piece in _PIECES.findall(text):
            if any(ch.isalnum() for ch in piece):
                known.setdefault("".join(_BYTES[b] for b in piece.encode()))
    known.setdefault("\u0120(")
    for word in ("Code", "for", *t.DIGITS, "shows", "goes", "with"):
        known.setdefault(word)
        known.setdefault("\u0120" + word)
    result = list(known)
    if len(result) > SIZE:
        raise ValueError(f"{len(result)} tokens do not fit {SIZE}")
    return result + [f"<|unused_{i}|>" for i in range(SIZE - len(result))]


TOKENS = _tokens()
WORDS = [i for i, token in enumerate(TOKENS) if i > TOOL and not token.startswith("<|unused")] + [
    TOKENS.index(ch) for ch in "0123456789\u010a"
]
"""Tokens that the tasks are made of, without markers."""

_IDS = {token: i for i, token in enumerate(TOKENS)}
_BYTE_OF = {ch: b for b, ch in enumerate(_BYTES)}


@lru_cache(maxsize=65536)
def _encode(text: str) -> tuple[int, ...]:
    result: list[int] = []
    for piece in _PIECES.findall(text):
        spelled = "".join(_BYTES[b] for b in piece.encode())
        whole = _IDS.get(spelled)
        result += [whole] if whole is not None else [_IDS[ch] for ch in spelled]
    return tuple(result)


def encode(text: str) -> list[int]:
    """Return the tokens of ASCII text without markers."""
    return list(_encode(text))


def decode(ids: list[int]) -> str:
    """Return the text of tokens; markers are left out."""
    spelled = "".join(TOKENS[i] for i in ids if TOKENS[i] not in SPECIALS)
    return bytes(_BYTE_OF.get(ch, 63) for ch in spelled).decode("utf-8", errors="replace")
