"""What a caller adds to sampling: logits processors, and what they raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Processors:
    """Logits processors whose errors reach the caller.

    llama.cpp calls them through ctypes, which prints an exception and goes on as if there were
    none.  Here it is kept until the token has been sampled, and raised then.

    Parameters
    ----------
    processors : sequence of callable
        Each takes the tokens so far and their scores, and returns scores.
    """

    def __init__(self, processors: Sequence[Callable[[Any, Any], Any]]) -> None:
        self._processors = list(processors)
        self._raised: BaseException | None = None

    def __iter__(self) -> Any:
        return iter([self._call])

    def _call(self, tokens: Any, scores: Any) -> Any:
        try:
            for processor in self._processors:
                scores[:] = processor(tokens, scores)
        except BaseException as error:
            self._raised = error
            scores[:] = 0  # they may be half changed, and a token is chosen before this is raised
        return scores

    def check(self) -> None:
        """Raise what a processor has raised."""
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised


def bias(biases: dict[int, float]) -> Callable[[Any, Any], Any]:
    """Return a logits processor that adds to the scores of tokens."""

    def add(tokens: Any, scores: Any) -> Any:
        for token, value in biases.items():
            scores[token] += value
        return scores

    return add


def plain(value: Any) -> Any:
    """Return log probabilities with Python's numbers in the place of NumPy's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def with_bias(options: dict[str, Any]) -> dict[str, Any]:
    """Return options whose biases are a logits processor, where there are others too.

    llama-cpp-python drops all of them where both are given.
    """
    if not options.get("logit_bias") or not options.get("logits_processor"):
        return options
    processors = [*options["logits_processor"], bias(options["logit_bias"])]
    return {**options, "logit_bias": None, "logits_processor": processors}
