"""Grammars and JSON schemas that an answer has to follow, checked before they reach C.

A grammar that llama.cpp cannot read ends the process when the first token is sampled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar, json_schema_to_gbnf

from ..errors import OptionError
from ..native.log import caught

DEEPEST = 2000
"""llama.cpp refuses rules nested deeper, and those much deeper overflow its stack."""

_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#.*')


def check_schema(where: str, schema: Any) -> dict[str, Any]:
    """Return a JSON schema that an answer can be made to follow.

    llama-cpp-python makes any JSON of one that it cannot follow, and does not say so.

    Raises
    ------
    OptionError
        If it cannot.
    """
    if not isinstance(schema, Mapping):
        raise OptionError(
            f"{where}: its JSON schema is of type {type(schema).__name__}, not a dict"
        )
    try:
        json_schema_to_gbnf(json.dumps(schema))
    except Exception as error:  # It finds what is wrong in many ways.
        reason = str(error) or type(error).__name__
        raise OptionError(
            f"{where}: no answer can follow its JSON schema: {reason:.200}"
        ) from error
    return dict(schema)


def check_grammar(grammar: LlamaGrammar, vocab: Any) -> None:
    """Check that llama.cpp can read a grammar.

    Parameters
    ----------
    grammar : LlamaGrammar
        The grammar.
    vocab : pointer
        llama.cpp's vocabulary of the model.

    Raises
    ------
    OptionError
        If it cannot.
    """
    rules, root = grammar._grammar, grammar._root
    if not rules.strip():
        raise OptionError("the grammar is empty: it has no rules")
    if rules.count("(") > DEEPEST:
        brackets = re.sub(r"[^()]", "", _LITERAL.sub("", rules))
        depth = max(accumulate(1 if bracket == "(" else -1 for bracket in brackets), default=0)
        if depth > DEEPEST:
            raise OptionError(
                f"the grammar, or that of the JSON schema, is nested {depth} deep, where at most "
                f"{DEEPEST} can be: make numbers such as maxLength and maxItems smaller"
            )
    with caught() as errors:
        sampler = llama_cpp.llama_sampler_init_grammar(
            vocab, rules.encode("utf-8"), root.encode("utf-8")
        )
    if not sampler:
        raise OptionError(
            "the grammar, or that of the JSON schema, cannot be used: "
            f"{errors.reason or 'llama.cpp gave no reason'}"
        )
    llama_cpp.llama_sampler_free(sampler)
