"""One context that reads a prompt once and answers from it many times."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp
import numpy as np

from ..budget import Budget
from ..cache import Snapshot
from ..chat.messages import check_messages
from ..errors import KVMergeError
from ..llama import Llama
from ..media.part import find_media
from ..policies import Auto, Policy
from ..prompt import Prompt, Segment
from .methods import FLOW_ROWS, WINDOW, Method
from .samples import Asked, Passage

_OTHER_QUESTION = "?"


class Reader:
    """A model with a cache of one type, from which all methods answer.

    The engine observes for every method at once: it also adds up the attention of all queries,
    for those who score by it.

    Parameters
    ----------
    model : Path
        The model.
    mmproj : Path or None
        Its vision part; None to ask about texts alone.
    cache_type : str
        Type of K and V.
    n_ctx : int
        Context length.
    threads : int
        Threads to compute with.
    image_merge, image_min_tokens : optional
        How many tokens of a picture are read, as in `Llama`.
    """

    def __init__(
        self,
        model: Path,
        mmproj: Path | None,
        *,
        cache_type: str,
        n_ctx: int,
        threads: int,
        image_merge: float | None = None,
        image_min_tokens: int | None = None,
    ) -> None:
        self._llama = Llama(
            model,
            mmproj=mmproj,
            kv_merge=Policy(score="all", window=WINDOW, flow_rows=FLOW_ROWS),
            n_ctx=n_ctx,
            n_threads=threads,
            n_threads_batch=threads,
            type_k=cache_type,
            type_v=cache_type,
            flash_attn=True,
            verbose=False,
            image_merge=image_merge,
            image_min_tokens=image_min_tokens,
        )
        self._sees = mmproj is not None
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._llama.model)
        self._live = ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.close()
        self._llama.close()

    # Prompts.

    def prompt(self, asked: Asked) -> Prompt:
        """Return a chat as `create_chat_completion` reads it; valid until `forget_prompts`.

        A passage is read as it stands: its text and its question are a segment each.
        """
        if isinstance(asked, Passage):
            text = self._llama.tokenize(asked.text.encode())
            question = self._llama.tokenize(asked.question.encode(), add_bos=False)
            return Prompt([Segment(text), Segment(question)])
        handler: Any = self._llama.chat_handler
        messages = check_messages(asked)
        text = handler.text(self._llama, messages, {})
        return self._live.enter_context(handler.prompt(text, find_media(messages)))

    def forget_prompts(self) -> None:
        """Free the media of all prompts."""
        self._live.close()

    def question_start(self, asked: Asked, tokens: Sequence[int]) -> int:
        """Return how many tokens come before what the last message of a chat says, or a passage."""
        if isinstance(asked, Passage):
            return len(self.prompt(asked).segments[0].ids)
        other = self.prompt([*asked[:-1], {**asked[-1], "content": _OTHER_QUESTION}])
        return common_prefix([tokens, other.tokens])

    # Reading.

    def reset(self) -> None:
        """Forget what was read."""
        self._llama.reset()

    def read(self, prompt: Prompt, start: int, end: int) -> None:
        """Read the tokens of a prompt from `start` up to `end`, after those that were read."""
        self._llama.reader.check_length(prompt, len(prompt.tokens))
        self._llama.reader.read_range(prompt, start, end)

    def snapshot(self) -> Snapshot:
        """Return all that was read, to come back to it."""
        return self._llama.kv_cache.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot."""
        self._llama.kv_cache.restore(snapshot)

    # Merging and answering.

    def merge(self, method: Method, budget: float, *, of_pictures: bool = False) -> bool:
        """Merge what was read down to a fraction of its tokens; False if that is all of it.

        With `of_pictures` every method gets as many cells as all text and that fraction of the
        pictures take, and does with them what it likes.

        A model without a vision part shrinks its text, also with a policy that would leave text
        alone: as a cap makes it do.
        """
        llama, policy = self._llama, method.policy
        if policy is None:
            return False
        assert llama.engine is not None
        media = sum(span.end - span.start for span in llama.media_spans)
        if self._sees:
            counting = Auto() if of_pictures else policy
            cells = counting.kept_cells(
                Budget(budget), llama.n_tokens - media, media, len(llama.media_spans)
            )
        else:
            cells = Budget(budget).cells(llama.n_tokens, policy.always_kept)
        if cells >= llama.engine.n_cells():
            return False
        try:
            llama.engine.use(policy)
            llama.engine.merge(cells)
        except KVMergeError as error:
            raise type(error)(f"{method.name}, budget {budget:g}: {error}") from error
        return True

    def held(self) -> tuple[float, int]:
        """Return the cells that are held, as the mean over the layers, and their bytes."""
        cache = self._llama.kv_cache
        cache.note_merges()
        n_bytes = cache.held()[1]
        return n_bytes / cache.bytes_per_cell, n_bytes

    def generate(self, max_tokens: int) -> str:
        """Return the greedy answer to what was read."""
        llama = self._llama
        answer: list[int] = []
        while len(answer) < max_tokens and llama.n_tokens < llama.n_ctx():
            logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            token = int(np.ctypeslib.as_array(logits, (llama.n_vocab(),)).argmax())
            if llama_cpp.llama_vocab_is_eog(self._vocabulary, token):
                break
            answer.append(token)
            llama.eval([token])
        return llama.detokenize(answer).decode("utf-8", "replace").strip()


def common_prefix(lists: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens that all lists begin with."""
    n = 0
    for tokens in zip(*lists, strict=False):
        if len(set(tokens)) > 1:
            break
        n += 1
    return n
