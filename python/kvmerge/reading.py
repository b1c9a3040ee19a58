"""Read prompts into the cache, except for what it holds already, and merge it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from .budget import TOLERANCE, Budget, shares_from
from .cache import KVCache
from .errors import ContextLengthError, DecodeError, MediaError, StateError, StoppedError
from .policies import Policy
from .progress import Listener, Meter
from .prompt import Media, Prompt
from .settings import Settings
from .turns import Turns

log = logging.getLogger("kvmerge")


class PromptReader:
    """Reads what a `Llama` is given into its cache.

    Parameters
    ----------
    cache : KVCache
        The cache.
    settings : Settings
        What is kept when it is merged, and when that is.
    turns : Turns
        Whether the model may still be used.
    listener : callable, optional
        Is told how far the reading is.

    Attributes
    ----------
    n_ctx : int
        The most tokens that there may be.
    n_batch : int
        The most tokens that are read at once.
    meter : Meter or None
        Counts what is read of the prompt at hand.
    cached_tokens : int
        Tokens of the last prompt that did not have to be read.
    """

    def __init__(
        self, cache: KVCache, settings: Settings, turns: Turns, listener: Listener | None
    ) -> None:
        self.n_ctx = 0
        self.n_batch = 1
        self.meter: Meter | None = None
        self.cached_tokens = 0
        self._cache = cache
        self._settings = settings
        self._turns = turns
        self._listener = listener
        self._context: Any = None
        self._batch: Any = None
        self._n_vocab = 0
        self._scores: npt.NDArray[np.single] | None = None
        # A prompt that was read and is to be answered.
        self._prompt: list[int] | None = None
        # The prompt that was read last, and the logits from which its answer began.
        self._end: tuple[list[int], npt.NDArray[np.single]] | None = None
        # What was held when no merge stayed within the tolerance.
        self._refused: int | None = None

    def open(
        self, context: Any, batch: Any, n_vocab: int, scores: npt.NDArray[np.single] | None
    ) -> None:
        """Take what computes.

        Parameters
        ----------
        context, batch : llama_cpp._internals.LlamaContext, LlamaBatch
            Those of llama-cpp-python.
        n_vocab : int
            Tokens of the vocabulary.
        scores : array, optional
            Where the logits of every token go, [n_ctx, n_vocab]; without it only those of the last
            one of a batch are computed.
        """
        self._context, self._batch, self._n_vocab, self._scores = context, batch, n_vocab, scores
        self.n_ctx = len(self._cache.ids)

    # Tokens.

    def eval(self, tokens: Sequence[int]) -> None:
        """Read text tokens, after those that are there; see `Llama.eval`."""
        cache = self._cache
        n_tokens = cache.n_tokens
        self._prompt = None
        if n_tokens + len(tokens) > self.n_ctx:
            raise ContextLengthError(
                f"{n_tokens + len(tokens)} tokens do not fit into n_ctx={self.n_ctx}: "
                "make n_ctx larger or the prompt shorter"
            )
        if not cache.trim(n_tokens):
            raise StateError(
                f"the cache cannot go back to token {n_tokens}, because it was merged since: "
                "call reset() and read everything again"
            )
        cache.note_foreign()
        for start in range(0, len(tokens), self.n_batch):
            batch = tokens[start : start + self.n_batch]
            self._decode(batch)
            if self.meter is not None:
                self.meter.read(len(batch))

    def _decode(self, batch: Sequence[int]) -> None:
        self._turns.check_open()
        cache, scores = self._cache, self._scores
        n = cache.n_tokens
        position = cache.position(n)
        self._batch.set_batch(batch=batch, n_past=position, logits_all=scores is not None)
        cache.has_logits = False
        try:
            self._context.decode(self._batch)
        except RuntimeError as error:
            cache.check_not_cleared(error)
            if cache.engine is not None:
                cache.engine.raise_problem()
            raise DecodeError(
                f"llama.cpp could not read {len(batch)} tokens at position {position}: {error}"
            ) from error
        if self._settings.kv_max_cells is not None:
            # Only where cells are short does reading merge.
            cache.note_merges()
        if scores is not None:
            logits = self._context.get_logits()
            shape = (len(batch) * self._n_vocab,)
            scores[n : n + len(batch), :].reshape(-1)[:] = np.ctypeslib.as_array(logits, shape)
        cache.append(batch, position + np.arange(len(batch) + 1))
        cache.has_logits = True

    # Prompts.

    def read(self, prompt: Prompt, *, merge: bool = True, answer: bool = True) -> None:
        """Read a prompt; see `Llama.read`."""
        cache, tokens = self._cache, prompt.tokens
        self.check_length(prompt, len(tokens))
        if not tokens:
            raise StateError("the prompt is empty")
        if prompt.segments[-1].media is not None:
            raise MediaError("the prompt ends with a picture or sound: text has to follow it")

        keep = cache.common_prefix(prompt, tokens)
        if keep == cache.n_tokens == len(tokens) and cache.has_logits:
            self.cached_tokens = keep
            if merge:
                self.merge()
        elif keep == len(tokens) and answer and self._return_to_end(tokens):
            self.cached_tokens = keep
        else:
            self._read_after(prompt, tokens, keep, merge, answer)
        self._prompt = tokens

    def _read_after(
        self, prompt: Prompt, tokens: list[int], shared: int, merge: bool, answer: bool
    ) -> None:
        """Read what comes after the tokens that the cache shares with a prompt."""
        # The logits of the last token are needed again.
        keep = shared - (shared == len(tokens) and answer)
        if any(token < 0 for token in tokens[keep:]) and len(prompt.segments) == 1:
            raise MediaError(
                "the pictures of this prompt are no longer in the cache: something else was read "
                "in the meantime, call create_chat_completion() again"
            )
        if merge:
            keep = self._with_queries(keep, len(tokens))
        keep = self._go_back(prompt, tokens, keep, shared)
        self.cached_tokens = keep

        cache = self._cache
        after = 0 if cache.engine is None else self._settings.merge_before
        last_media = max((span.end for span in prompt.spans()), default=0)
        split = max(len(tokens) - after, keep, last_media)
        cache.has_logits = False
        rest = [segment.media for segment in prompt.rest(keep) if segment.media is not None]
        with self.reporting(len(tokens) - keep, rest):
            self.read_range(prompt, keep, split)
            if split < len(tokens):
                if merge:
                    self.merge()
                self.read_range(prompt, split, len(tokens))
                self._note_end(tokens)
            else:
                self._note_end(tokens)
                if merge:
                    self.merge()

    def _with_queries(self, keep: int, n_tokens: int) -> int:
        """Return how many tokens to keep so that a first merge finds the queries that it looks at.

        A copy of a cache that was not merged brings few of them along: of the last tokens of the
        prompt, text that came from one is read again.
        """
        cache, policy = self._cache, self._settings.kv_merge
        if cache.engine is None or policy is None or cache.merges:
            return keep
        media = (span.end for span in cache.spans if span.end <= keep)
        start = max([0, n_tokens - policy.window, *media])
        return min(keep, start) if start < cache.n_restored else keep

    def _go_back(self, prompt: Prompt, tokens: list[int], keep: int, shared: int) -> int:
        """Keep the first tokens of the cache, or none; return how many."""
        cache = self._cache
        seen = cache.n_tokens
        if not cache.trim(keep):
            log.info(
                "reading all %d tokens of the prompt again: %s, and what comes before was merged",
                len(tokens),
                cache.difference(prompt, len(tokens), shared),
            )
            cache.clear()
            return 0
        if 0 < keep < seen:
            log.debug("keeping %d of %d tokens in the cache", keep, seen)
        return keep

    def read_range(self, prompt: Prompt, start: int, end: int) -> None:
        """Read the tokens from `start` up to `end`; media are read as a whole."""
        at = 0
        for segment in prompt.segments:
            first, last = max(start - at, 0), min(end - at, len(segment.ids))
            at += len(segment.ids)
            if first >= last:
                continue
            if segment.media is None:
                self.eval(segment.ids[first:last])
            else:
                self._read_media(segment.ids, segment.media)

    def _read_media(self, ids: list[int], media: Media) -> None:
        cache = self._cache
        n, position = cache.n_tokens, cache.next_position
        scope = nullcontext() if cache.engine is None else cache.engine.media(media.modality)
        self._prompt = None
        try:
            with scope:
                after = media.decode(position)
        except StoppedError:
            cache.trim(n)  # What was read of a picture is no use without the rest.
            raise
        except DecodeError as error:
            cache.check_not_cleared(error)
            raise
        positions = np.full(len(ids) + 1, position, np.int32)
        positions[-1] = after
        cache.note_merges()
        cache.append_media(ids, positions, media.digest, media.modality)

    def take_prompt(self, tokens: list[int]) -> bool:
        """Whether exactly these tokens were read as a prompt that is still to be answered.

        Whoever has read a prompt with pictures has it answered by llama-cpp-python's completion,
        which knows it as tokens only.  Once, it then begins from what was read: nothing is read
        again, and nothing is merged that was not to be.
        """
        prompt, self._prompt = self._prompt, None
        cache = self._cache
        return prompt == tokens and cache.has_logits and cache.tokens.tolist() == tokens

    def check_length(self, prompt: Prompt, n_tokens: int) -> None:
        """Raise if so many tokens of a prompt leave no room for an answer."""
        if n_tokens < self.n_ctx:
            return
        images = prompt.n_media_tokens("image")
        of_images = f" ({images} of them pictures)" if images else ""
        raise ContextLengthError(
            f"the prompt has {n_tokens} tokens{of_images}, and n_ctx={self.n_ctx} takes "
            f"{self.n_ctx - 1} with room for an answer: make n_ctx larger or the prompt shorter"
        )

    @contextmanager
    def reporting(self, n_tokens: int, media: Sequence[Media]) -> Iterator[Meter | None]:
        """Report how far the reading of so many tokens is, among them these pictures and sounds."""
        if self._listener is None:
            yield None
            return
        before, meter = self.meter, Meter(self._listener, n_tokens, media)
        self.meter = meter
        try:
            yield meter
        finally:
            self.meter = before
            meter.close()

    # The end of a prompt, which its answer begins from.

    def _note_end(self, tokens: list[int]) -> None:
        """Keep the logits from which an answer begins, where a merge is going to change them."""
        logits = self.last_logits() if self._cache.engine is not None else None
        self._end = None if logits is None else (tokens, logits.copy())

    def _return_to_end(self, tokens: list[int]) -> bool:
        """Go back to the end of the prompt that was read last; False if it was another.

        The same question then begins its answer as it did the first time.
        """
        if self._end is None or self._end[0] != tokens or not self._cache.trim(len(tokens)):
            return False
        logits = self.last_logits()
        if logits is None:
            return False
        logits[:] = self._end[1]
        self._cache.has_logits = True
        return True

    def last_logits(self) -> npt.NDArray[np.single] | None:
        """Return those that the next token is sampled from, where llama.cpp has them."""
        pointer = self._context.get_logits_ith(-1)
        return np.ctypeslib.as_array(pointer, shape=(self._n_vocab,)) if pointer else None

    # Merging.

    def merge(self) -> None:
        """Merge the cache when it holds more cells than the budget says."""
        cache, policy, budget = self._cache, self._settings.kv_merge, self._settings.kv_budget
        if cache.engine is None or policy is None:
            return
        # What stays as it is comes on top of a fraction; a number of cells is what was asked for.
        whole = 0 if budget.is_cells else self._whole_tokens()
        media = cache.n_media_tokens()

        def cells(choice: Budget) -> int:
            text = cache.n_tokens - media
            return whole + policy.kept_cells(choice, text, media - whole, len(cache.spans))

        held = cache.held()
        if budget.is_measured:
            self._merge_within(policy, cells, held)
        elif held[0] > cells(budget):
            cache.merge(cells(budget), held)

    def _merge_within(
        self, policy: Policy, cells: Callable[[Budget], int], held: tuple[int, int]
    ) -> None:
        """Merge to the smallest share whose error is within the tolerance, if there is one."""
        cache, of_media = self._cache, policy.budget_of == "media"
        # What was merged once is not merged further, however well that would fit.
        choices = shares_from(cache.merged_share(of_media=of_media))
        numbers = sorted({cells(choice) for choice in choices})
        if not numbers or held[0] <= numbers[0]:
            return
        # What did not fit is not tried again with every word that is added.
        read = cache.ids[: cache.n_tokens].tobytes()
        about = hash(tuple(span.digest for span in cache.spans) if of_media else read)
        if about != self._refused and not cache.merge_within(numbers, TOLERANCE, held):
            self._refused = about

    def _whole_tokens(self) -> int:
        """Return the tokens of the pictures that are not merged."""
        spans = [span for span in self._cache.spans if span.modality == "image"]
        kept = spans[max(0, len(spans) - self._settings.keep_last_images) :]
        return sum(span.end - span.start for span in kept)
