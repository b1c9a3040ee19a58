"""One call at a time, streams that never lie, and processes that fork."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from kvmerge import Llama, pocket
from kvmerge.errors import ClosedError, KVMergeError, OptionError, StateError

LONG = {"temperature": 0, "max_tokens": 12, "logit_bias": {257: -100}}
FIRST = "The code of the old box is five six seven. What is the code of the old box?"
SECOND = "What is the code of the new door? The new door zero zero zero one two."


def make(merge: str | None = None, **options: Any) -> Llama:
    return Llama(
        pocket.model_path(), n_ctx=2048, n_threads=1, verbose=False, kv_merge=merge, **options
    )


def text(chunks: Any) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@pytest.fixture(params=[None, "mosaic"])
def llm(request: pytest.FixtureRequest) -> Any:
    with make(request.param) as llm:
        yield llm


def test_stream_after_another_question_raises(llm: Llama) -> None:
    stream = llm.create_completion(FIRST, stream=True, **LONG)
    next(stream)
    right = text([llm.create_completion(SECOND, **LONG)])
    with pytest.raises(StateError, match="before this stream ended"):
        next(stream)
    llm.reset()
    assert text([llm.create_completion(SECOND, **LONG)]) == right


def test_two_streams_in_turns_raise(llm: Llama) -> None:
    one = llm.create_completion(FIRST, stream=True, **LONG)
    two = llm.create_completion(SECOND, stream=True, **LONG)
    with pytest.raises(StateError):
        for _ in zip(one, two, strict=False):
            pass


def test_streams_one_after_the_other(llm: Llama) -> None:
    """A stream that has not begun when another question is asked answers its own question."""
    right = text(llm.create_completion(FIRST, stream=True, **LONG))
    llm.reset()
    one = llm.create_completion(FIRST, stream=True, **LONG)
    llm.create_completion(SECOND, **LONG)
    llm.reset()
    assert text(one) == right


def test_raw_generator_after_eval_raises(llm: Llama) -> None:
    tokens = llm.tokenize(FIRST.encode())
    generated = llm.generate(tokens, temp=0)
    next(generated)
    llm.eval(tokens[:3])
    with pytest.raises(StateError):
        next(generated)


def test_chat_stream_after_another_chat_raises(llm: Llama) -> None:
    chat = [{"role": "user", "content": FIRST}]
    stream = llm.create_chat_completion(chat, stream=True, **LONG)
    next(stream)
    next(stream)
    llm.create_chat_completion([{"role": "user", "content": SECOND}], **LONG)
    with pytest.raises(StateError):
        list(stream)


def test_looking_does_not_end_a_stream(llm: Llama) -> None:
    right = text(llm.create_completion(FIRST, stream=True, **LONG))
    llm.reset()
    stream = llm.create_completion(FIRST, stream=True, **LONG)
    got = text([next(stream)])
    llm.kv_stats()
    llm.tokenize(b"Hello")
    llm.save_state()
    assert got + text(stream) == right


def test_generate_with_tokens_that_are_sent(llm: Llama) -> None:
    """Without the logits of every token llama.cpp would end the process."""
    generated = llm.generate(llm.tokenize(FIRST.encode()), temp=0)
    next(generated)
    with pytest.raises(OptionError, match="logits_all"):
        generated.send(llm.tokenize(b" box", add_bos=False))


def test_generate_with_tokens_that_are_sent_and_all_logits() -> None:
    with make(logits_all=True) as llm:
        generated = llm.generate(llm.tokenize(FIRST.encode()), temp=0)
        next(generated)
        assert generated.send(llm.tokenize(b" box", add_bos=False)) >= 0
        generated.close()


def test_threads_share_a_model(llm: Llama) -> None:
    """Every answer is the one that a single thread gets; streams and whole answers mixed."""
    # They differ from the first word on: what one has merged is no beginning of the other.
    questions = [FIRST, SECOND]
    right = []
    for question in questions:
        llm.reset()
        right.append(text([llm.create_completion(question, **LONG)]))
    wrong: list[Any] = []

    def ask(i: int) -> None:
        try:
            for k in range(50):
                which = (i + k) % 2
                options = {**LONG, "stream": k % 3 == 0}
                answer = llm.create_completion(questions[which], **options)
                got = text(answer) if options["stream"] else text([answer])
                if got != right[which]:
                    wrong.append((which, got))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


TEXTS = ["The code of the old box is five. " * n for n in (2, 7, 11)]


def test_threads_embed() -> None:
    """Texts that are turned into vectors take their turns too, and a close ends them."""
    llm = make(embedding=True, pooling_type=1)
    right = [llm.embed(text) for text in TEXTS]
    wrong: list[Any] = []

    def embed(first: int) -> None:
        for i in range(first, first + 30):
            if not np.allclose(llm.embed(TEXTS[i % 3]), right[i % 3], atol=1e-4):
                wrong.append(i)

    def embed_on() -> None:
        while True:
            try:
                llm.embed(TEXTS)
            except ClosedError:
                ended.set()
                return

    threads = [threading.Thread(target=embed, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    ended = threading.Event()
    thread = threading.Thread(target=embed_on)
    thread.start()
    time.sleep(0.2)
    llm.close()
    thread.join(60)
    assert ended.is_set()


def test_embeddings_of_nothing() -> None:
    with make(embedding=True, pooling_type=1) as llm:
        for nothing in (None, 5, [], [1], b"x", "\ud800"):
            with pytest.raises(OptionError):
                llm.embed(nothing)
        assert len(llm.create_embedding(TEXTS)["data"]) == 3
    with make() as llm, pytest.raises(StateError, match="embedding=True"):
        llm.embed("x")


@pytest.mark.parametrize("merge", [None, "mosaic"])
def test_close_while_others_generate(merge: str | None) -> None:
    llm = make(merge)
    ended: list[type[BaseException]] = []
    begun = threading.Event()

    def ask() -> None:
        try:
            while True:
                for _ in llm.create_completion(FIRST, stream=True, **{**LONG, "max_tokens": 900}):
                    begun.set()
        except KVMergeError as error:
            ended.append(type(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    llm.close()
    for thread in threads:
        thread.join(60)
    assert len(ended) == 4
    assert set(ended) <= {ClosedError, StateError}


@pytest.mark.parametrize("merge", [None, "mosaic"])
def test_close_in_the_middle_of_many_requests(merge: str | None) -> None:
    """Eight threads ask fifty times each; until the close every answer is right."""
    llm = make(merge)
    right = []
    for question in (FIRST, SECOND):
        llm.reset()
        right.append(text([llm.create_completion(question, **LONG)]))
    answered: list[bool] = []
    ended: list[BaseException] = []
    half = threading.Event()

    def ask(i: int) -> None:
        try:
            for k in range(50):
                which, stream = (i + k) % 2, k % 3 == 0
                answer = llm.create_completion((FIRST, SECOND)[which], stream=stream, **LONG)
                answered.append(text(answer if stream else [answer]) == right[which])
                if len(answered) >= 100:
                    half.set()
        except BaseException as error:
            ended.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    assert half.wait(120)
    llm.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert all(answered)
    assert 100 <= len(answered) < 400
    assert ended
    assert {type(error) for error in ended} <= {ClosedError, StateError}


def test_close_ends_a_long_prompt() -> None:
    llm = make(n_batch=16)
    failed: list[BaseException] = []

    def read() -> None:
        try:
            llm.eval([5] * 2000)
        except KVMergeError as error:
            failed.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while llm.n_tokens == 0 and thread.is_alive():
        time.sleep(0.001)
    llm.close()
    thread.join(60)
    assert [type(error) for error in failed] == [ClosedError]


def test_abandoned_stream_does_not_block(llm: Llama) -> None:
    stream = llm.create_completion(FIRST, stream=True, **LONG)
    next(stream)
    del stream
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(llm.create_completion(SECOND, max_tokens=1))
    )
    thread.start()
    thread.join(60)
    assert len(answers) == 1


FORK = """
import os, signal, sys
from kvmerge import Llama, pocket
from kvmerge.errors import ForkedError
llm = Llama(pocket.model_path(), n_ctx=512, verbose=False, kv_merge="mosaic", n_threads=2,
            n_threads_batch=2)
llm.create_completion("Hello " * 50, max_tokens=2)
child = os.fork()
if child == 0:
    signal.alarm(60)
    for use in (lambda: llm.create_completion("Hello", max_tokens=1), lambda: llm.eval([5]),
                lambda: llm.save_state(), lambda: llm.kv_stats(), lambda: llm.reset()):
        try:
            use()
        except ForkedError:
            pass
        else:
            os._exit(3)
    llm.close()
    options = dict(n_ctx=512, verbose=False)
    try:
        Llama(pocket.model_path(), n_threads=2, n_threads_batch=2, **options)
    except ForkedError as error:
        assert "n_threads=1" in str(error)
    else:
        os._exit(4)
    with Llama(pocket.model_path(), n_threads=1, n_threads_batch=1, **options) as new:
        new.create_completion("Hello", max_tokens=1)
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
llm.create_completion("Goodbye", max_tokens=2)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_fork() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


def in_process(seen: Any) -> None:
    with make() as llm:
        seen.put(llm.create_completion(FIRST, max_tokens=2, temperature=0)["choices"][0]["text"])


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_processes(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    context = multiprocessing.get_context(method)
    seen = context.Queue()
    process = context.Process(target=in_process, args=(seen,))
    process.start()
    answer = seen.get(timeout=120)
    process.join(60)
    with make() as llm:
        assert (
            answer
            == llm.create_completion(FIRST, max_tokens=2, temperature=0)["choices"][0]["text"]
        )


MUTE = """
import os, threading
from kvmerge import Llama, pocket
def load():
    for _ in range(4):
        Llama(pocket.model_path(), mmproj=pocket.mmproj_path(), n_threads=1, verbose=False).close()
before = [os.fstat(fd).st_ino for fd in (1, 2)]
threads = [threading.Thread(target=load) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert [os.fstat(fd).st_ino for fd in (1, 2)] == before
print("heard")
"""


def test_loading_in_threads_leaves_the_output_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MUTE], check=True, timeout=120, capture_output=True, text=True
    )
    assert done.stdout == "heard\n"
    assert done.stderr == ""
