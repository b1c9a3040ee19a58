"""Bad input: each gets an exception that names the cause and what is accepted."""

from __future__ import annotations

import base64
import http.server
import io
import math
import pickle
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import kvmerge
from conftest import Factory, answer
from kvmerge import errors, pocket
from kvmerge.budget import Budget
from kvmerge.policies import PRESETS, resolve

# Options.


@pytest.mark.parametrize(
    "budget", [0, 0.0, 1.5, -3, -0.2, "big", "0.2", math.nan, math.inf, True, False, None, [1]]
)
def test_budget(budget: Any) -> None:
    with pytest.raises(errors.BudgetError, match=r"float in \(0, 1\].*int of at least 1") as caught:
        kvmerge.Llama("nowhere.gguf", kv_merge="flowmm", kv_budget=budget)
    assert repr(budget) in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("budget", "tokens", "at_least", "cells"),
    [
        (0.2, 1000, 20, 200),
        (0.2, 1001, 20, 201),
        (0.2, 10, 0, 2),
        (0.1, 30, 0, 3),
        (0.2, 50, 20, 20),
        (0.2, 12, 20, 12),
        (1.0, 77, 20, 77),
        (300, 1000, 20, 300),
        (300, 100, 20, 100),
        (1, 100, 20, 1),
    ],
)
def test_cells_of_a_budget(budget: Any, tokens: int, at_least: int, cells: int) -> None:
    assert Budget(budget).cells(tokens, at_least) == cells


@pytest.mark.parametrize("policy", ["flowm", "FLOW", 3, kvmerge.FlowMM, "", {}])
def test_policy_name(policy: Any) -> None:
    with pytest.raises(errors.PolicyError) as caught:
        kvmerge.Llama("nowhere.gguf", kv_merge=policy)
    for name in PRESETS:
        assert repr(name) in str(caught.value)


def test_close_policy_name_is_suggested() -> None:
    with pytest.raises(errors.PolicyError, match=r"Did you mean 'flowmm'\?"):
        resolve("flowm")
    with pytest.raises(errors.PolicyError, match=r"Did you mean FlowMM\(\)\?"):
        resolve(kvmerge.FlowMM)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("theta", 1.5, "from 0 to 1"),
        ("theta", "high", "from 0 to 1"),
        ("tau", -0.1, "from 0 to 1"),
        ("tau", math.nan, "from 0 to 1"),
        ("window", 0, "from 1 to 256"),
        ("window", 16.0, "from 1 to 256"),
        ("window", True, "from 1 to 256"),
        ("sinks", 300, "from 0 to 256"),
        ("flow_rows", 0, "from 1 to 65536"),
        ("keys", "mov", "Did you mean 'move'?"),
        ("bias", "sum", "'none', 'count', 'fit'"),
        ("fold", None, "'mean'"),
    ],
)
def test_policy_field(field: str, value: Any, accepted: str) -> None:
    with pytest.raises(errors.PolicyError) as caught:
        kvmerge.FlowMM(**{field: value})
    assert str(caught.value).startswith(f"FlowMM({field}={value!r}): {field} must be ")
    assert accepted in str(caught.value)


def test_even_pool() -> None:
    with pytest.raises(errors.PolicyError, match="must be odd"):
        kvmerge.Policy(neighbours=4)
    with pytest.raises(errors.PolicyError, match="value_norm must be True or False"):
        kvmerge.Policy(value_norm=1)  # type: ignore[arg-type]


def test_unknown_option() -> None:
    with pytest.raises(errors.UnknownOptionError, match=r"'kv_merg'. Did you mean 'kv_merge'\?"):
        kvmerge.Llama("nowhere.gguf", kv_merg="flowmm")
    with pytest.raises(TypeError, match="n_gpu_layers"):
        kvmerge.Llama("nowhere.gguf", n_gpu_layer=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"type_k": "q8"}, "'q8_0'"),
        ({"type_k": 12}, "'q8_0'"),
        ({"type_v": True}, "'f16'"),
        ({"type_v": "q8_0"}, "flash_attn=True"),
        ({"n_ctx": -1}, "n_ctx must be a whole number"),
        ({"merge_before": -1}, "merge_before must be a whole number of at least 0"),
        ({"merge_before": 1.5}, "merge_before must be a whole number of at least 0"),
        ({"image_max_tokens": 64}, "need mmproj="),
        ({"mmproj": "a.gguf", "mmproj_path": "b.gguf"}, "different files"),
        ({"mmproj": "a.gguf", "chat_handler": print}, "pass it or chat_handler="),
    ],
)
def test_option(options: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.OptionError, match=re.escape(said)):
        kvmerge.Llama("nowhere.gguf", **options)


def test_merging_without_a_cache(model: Path) -> None:
    with pytest.raises(errors.UnsupportedError, match="keeps no cache"):
        kvmerge.Llama(model, kv_merge="flowmm", embedding=True)


# Files.


@pytest.fixture(params=["model", "mmproj"])
def which(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(which: str, file: object, llama: Factory) -> kvmerge.Llama:
    return llama(file) if which == "model" else llama(mmproj=file)


def error_of(which: str) -> type[errors.KVMergeError]:
    return errors.ModelError if which == "model" else errors.ProjectorError


def test_missing_file(which: str, tmp_path: Path, llama: Factory) -> None:
    with pytest.raises(error_of(which), match=f"the {which} .*nowhere.gguf does not exist"):
        load(which, tmp_path / "nowhere.gguf", llama)


def test_folder(which: str, tmp_path: Path, llama: Factory) -> None:
    with pytest.raises(error_of(which), match="is a folder"):
        load(which, tmp_path, llama)


def test_no_path(which: str, llama: Factory) -> None:
    with pytest.raises(error_of(which), match="must be the path"):
        load(which, 17, llama)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a GGUF"),
        (b"PK\x03\x04" * 30, "not a GGUF"),
        (b"GGUF\x03\x00", "cut off after 6 bytes"),
        (b"GGUF" + b"\xff" * 60, "GGUF version"),
    ],
)
def test_no_gguf(which: str, content: bytes, said: str, tmp_path: Path, llama: Factory) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(error_of(which), match=said):
        load(which, file, llama)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.99])
def test_cut_off_file(which: str, share: float, tmp_path: Path, llama: Factory) -> None:
    whole = (pocket.model_path() if which == "model" else pocket.mmproj_path()).read_bytes()
    file = tmp_path / "short.gguf"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(error_of(which), match="short.gguf") as caught:
        load(which, file, llama)
    assert "no reason" not in str(caught.value)


def test_swapped_files(model: Path, mmproj: Path, llama: Factory) -> None:
    with pytest.raises(errors.ModelError, match="looks like an mmproj"):
        llama(mmproj)
    with pytest.raises(errors.ProjectorError, match="made for this model"):
        llama(mmproj=model)


# Pictures.


def show(source: Any, kind: str = "image_url") -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Picture 1:"},
                {"type": kind, kind: source},
                {"type": "text", "text": "\n"},
            ],
        },
        {"role": "user", "content": "What colour is in picture 1?"},
    ]


@pytest.fixture(scope="module")
def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(png: bytes) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = {"/red.png": 200, "/secret.png": 403}.get(self.path, 404)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(png if status == 200 else b"no")

        def log_message(self, *_: Any) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_every_kind_of_source(llama: Factory, png: bytes, server: str, tmp_path: Path) -> None:
    llm = llama()
    file = tmp_path / "a red one.png"
    file.write_bytes(png)
    uri = "data:image/png;base64," + base64.b64encode(png).decode()
    expected = answer(llm, show(uri))
    cached = llm.kv_stats().tokens
    for source in (
        {"url": uri},
        str(file),
        file,
        file.as_uri(),
        {"url": file.as_uri()},
        f"{server}/red.png",
        png,
        bytearray(png),
    ):
        assert answer(llm, show(source)) == expected, source
        assert llm.kv_stats().tokens == cached
    image = Image.open(file)
    assert answer(llm, show(image, kind="image")) == expected
    assert answer(llm, show(image)) == expected


def test_formats_that_only_pillow_reads(llama: Factory, png: bytes, tmp_path: Path) -> None:
    Image.open(io.BytesIO(png)).save(tmp_path / "red.webp", lossless=True)
    llm = llama()
    assert answer(llm, show(str(tmp_path / "red.webp"))) == answer(llm, show(png))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere.jpg", "picture 1 (nowhere.jpg) does not exist"),
        ("file:///nowhere/at/all.png", "does not exist"),
        ("file://elsewhere/a.png", "another machine (elsewhere)"),
        ("ftp://example.org/a.png", "ftp://, which is not fetched"),
        ("data:image/png;base64", "without a comma"),
        ("data:image/png;base64,@@@", "base64 is broken"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,aGVsbG8gd29ybGQ=", "is not one that can be read"),
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, "is not one that can be read"),
        (".", "is a folder"),
        (7, "is of type int"),
        ({"uri": "a.png"}, "has no 'image_url' content"),
        (None, "has no 'image_url' content"),
        ("http://127.0.0.1:1/a.png", "cannot be reached"),
        ("http://[bad/a.png", "picture 1"),
    ],
)
def test_no_picture(source: Any, said: str, llama: Factory) -> None:
    llm = llama()
    with pytest.raises(errors.MediaError, match=re.escape(said)) as caught:
        answer(llm, show(source))
    assert "data: URI" in str(caught.value), "says what is accepted"
    assert "JPEG" in str(caught.value)
    assert answer(llm, [{"role": "user", "content": "Hello"}]) is not None


def test_refused_url(llama: Factory, server: str) -> None:
    llm = llama()
    with pytest.raises(errors.MediaError, match="HTTP 403"):
        answer(llm, show(f"{server}/secret.png"))
    with pytest.raises(errors.MediaError, match="HTTP 404"):
        answer(llm, show(f"{server}/nowhere.png"))


def test_which_picture_is_named(llama: Factory, prompt: pocket.Prompt) -> None:
    messages = prompt.messages(0)
    pictures = [p for p in messages[0]["content"] if p["type"] == "image_url"]
    pictures[2]["image_url"]["url"] = "https:" + "x" * 500
    with pytest.raises(errors.MediaError, match=r"picture 3 \(https:xxx") as caught:
        answer(llama(), messages)
    assert len(str(caught.value)) < 400, "long URLs are cut"


def test_sound_is_not_taken(llama: Factory) -> None:
    with pytest.raises(errors.UnsupportedError, match="does not take sounds"):
        answer(llama(), show({"data": "AAAA", "format": "wav"}, kind="input_audio"))


def test_pictures_without_mmproj(llama: Factory, png: bytes) -> None:
    llm = llama(mmproj=None)
    with pytest.raises(errors.MediaError, match="pass mmproj="):
        answer(llm, show(png))


def test_picture_at_the_end(llama: Factory, png: bytes) -> None:
    llm = llama()
    ends = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    llm.metadata["tokenizer.chat_template"] = ends
    with pytest.raises(errors.MediaError, match="text has to follow"):
        answer(llm, [{"role": "user", "content": [{"type": "image", "image": png}]}])


# Length.


@pytest.mark.parametrize("merge", [None, "flowmm"])
def test_prompt_longer_than_n_ctx(merge: str | None, llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama(n_ctx=256, kv_merge=merge)
    hello = [{"role": "user", "content": "What is the code of the old box?"}]
    expected = answer(llm, hello)
    with pytest.raises(errors.ContextLengthError, match=r"\d+ tokens.*pictures.*n_ctx=256"):
        answer(llm, prompt.messages(0))
    before = llm.kv_stats()
    assert before.tokens > 0, "nothing is lost"
    with pytest.raises(errors.ContextLengthError, match="n_ctx=256"):
        llm.create_completion("picture " * 400, max_tokens=1)
    with pytest.raises(errors.ContextLengthError, match="n_ctx=256"):
        llm.eval([5] * 300)
    assert llm.kv_stats() == before
    llm.reset()
    assert answer(llm, hello) == expected


# Interrupted and closed.


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("merge", [None, "flowmm"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
def test_interrupted_while_reading(
    merge: str | None,
    error: type[BaseException],
    llama: Factory,
    prompt: pocket.Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = answer(llama(kv_merge=merge), prompt.messages(0))
    llm = llama(kv_merge=merge, n_batch=64)
    decode, calls = llm._ctx.decode, 0

    def interrupted(batch: Any) -> None:
        nonlocal calls
        decode(batch)
        calls += 1
        if calls == 3:
            raise error

    monkeypatch.setattr(llm._ctx, "decode", interrupted)
    with pytest.raises(error):
        answer(llm, prompt.messages(0))
    monkeypatch.undo()
    assert answer(llm, prompt.messages(0)) == expected


@pytest.mark.parametrize("merge", [None, "flowmm"])
def test_interrupted_anywhere(merge: str | None, llama: Factory, prompt: pocket.Prompt) -> None:
    """Ctrl-C at a dozen moments of a conversation, each followed by the same call again."""
    messages = [prompt.messages(i, ["", "red", "ring"][:i]) for i in range(3)]
    expected = [answer(llama(kv_merge=merge), turn, max_tokens=3) for turn in messages]
    llm = llama(kv_merge=merge, n_batch=64)
    seconds = float("inf")
    for _ in range(3):  # the fastest: on a busy machine the others are too late to interrupt
        llm.reset()
        start = time.perf_counter()
        found = [answer(llm, turn, max_tokens=3) for turn in messages]
        seconds = min(seconds, time.perf_counter() - start)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted = 0
    try:
        for attempt in range(12):
            llm.reset()
            signal.setitimer(signal.ITIMER_REAL, seconds * (attempt + 1) / 12)
            try:
                for turn in messages:
                    answer(llm, turn, max_tokens=3)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if merge is None:
                assert answer(llm, messages[attempt % 3], max_tokens=3) == expected[attempt % 3]
            else:
                llm.reset()
                assert [answer(llm, turn, max_tokens=3) for turn in messages] == found
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 2


@pytest.mark.parametrize("merge", [None, "flowmm"])
def test_interrupted_while_answering(
    merge: str | None, llama: Factory, prompt: pocket.Prompt
) -> None:
    llm = llama(kv_merge=merge)
    messages = prompt.messages(0)
    stream = llm.create_chat_completion(messages, stream=True, temperature=0.0, max_tokens=24)
    for _, _chunk in zip(range(2), stream, strict=False):
        pass
    stream.close()
    first = answer(llm, messages)
    assert llm.kv_stats().tokens >= 256
    llm.reset()
    assert answer(llm, messages) == answer(llama(kv_merge=merge), messages)
    assert isinstance(first, str)


def test_streams_that_overtake_each_other(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama()
    late = llm.create_chat_completion(prompt.messages(0), stream=True, max_tokens=4)
    answer(llm, [{"role": "user", "content": "Hello"}])
    with pytest.raises(errors.MediaError, match="no longer in the cache"):
        list(late)
    assert answer(llm, prompt.messages(0)) == answer(llama(), prompt.messages(0))


def test_closed(llama: Factory) -> None:
    llm = llama(kv_merge="flowmm")
    with llm:
        llm.create_completion("Hello", max_tokens=1)
    llm.close()
    for use in (
        lambda: llm.create_completion("Hello"),
        lambda: llm.create_chat_completion([{"role": "user", "content": "Hello"}]),
        lambda: llm("Hello"),
        lambda: llm.eval([1]),
        lambda: list(llm.generate([1])),
        lambda: llm.tokenize(b"Hello"),
        lambda: llm.detokenize([1]),
        lambda: llm.embed("Hello"),
        lambda: llm.save_state(),
        lambda: llm.reset(),
        lambda: llm.kv_stats(),
        lambda: llm.n_ctx(),
        lambda: llm.n_vocab(),
        lambda: llm.token_eos(),
        lambda: llm.sample(),
        lambda: llm.ctx,
        lambda: llm.engine,
        lambda: pickle.dumps(llm),
        lambda: llm.__enter__(),
    ):
        with pytest.raises(errors.ClosedError, match="closed"):
            use()


def test_failed_construction_leaves_nothing_behind(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for arguments in ({"kv_budget": 0}, {"kv_merge": "x"}, {"nonsense": 1}):
        with pytest.raises(errors.KVMergeError):
            kvmerge.Llama(tmp_path / "nowhere.gguf", **arguments)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["rpc_servers", "mul_mat_q", "n_parts", "f16_kv"])
def test_options_of_earlier_releases_change_nothing(
    name: str, llama: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    """Frameworks still pass them, and stock takes any keyword."""
    assert llama(mmproj=None, **{name: None}).n_tokens == 0
    assert f"no longer has the option {name}" in caplog.text


@pytest.mark.parametrize("select", ["mosaic", "runs", "media"])
@pytest.mark.parametrize("choice", [{"match": "any", "tau": 1.0}, {"match": "segment", "tau": 0.8}])
def test_groups_of_its_own_take_no_other_match(select: str, choice: dict[str, Any]) -> None:
    with pytest.raises(errors.PolicyError, match="forms its own groups"):
        kvmerge.Policy(select=select, **choice)
    kvmerge.Policy(select=select, match="none", tau=1.0)
