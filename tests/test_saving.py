"""Contexts in files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import kvmerge
from conftest import Factory, make_llama
from kvmerge import errors, pocket, saving
from kvmerge.chat.handler import ChatHandler
from kvmerge.gguf_file import fingerprint

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 16}
MERGED: dict[str, Any] = {"kv_merge": "flowmm", "kv_budget": 0.2}
PICTURES = 2


def small_prompt() -> pocket.Prompt:
    return pocket.make_prompt(np.random.default_rng(20), PICTURES)


def tokens_of(llm: kvmerge.Llama, messages: Any) -> tuple[list[int], dict[str, int]]:
    """Return what was read and written, and what was reused of it."""
    usage = llm.create_chat_completion(messages, **GREEDY)["usage"]
    return llm.input_ids[: llm.n_tokens].tolist(), usage["prompt_tokens_details"]


def chat(number: int) -> list[Any]:
    """A chat that goes on from the first question, whatever was answered to it."""
    turn = {"role": "assistant", "content": "red"}
    return [*small_prompt().messages(0), turn, *small_prompt().messages(number)[1:]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged chat about two pictures."""
    file = tmp_path_factory.mktemp("saved") / "context.kvm"
    with make_llama(**MERGED) as llm:
        tokens_of(llm, small_prompt().messages(0))
        llm.save_context(file)
    return file


class Held:
    """What a model holds, to see that it is not touched."""

    def __init__(self, llm: kvmerge.Llama) -> None:
        self.llm = llm
        self.before = self.now()

    def now(self) -> tuple[Any, ...]:
        llm = self.llm
        cells = () if llm.engine is None else llm.engine.read_cells(0).k.tobytes()
        return llm.input_ids[: llm.n_tokens].tolist(), llm.media_spans, llm.kv_stats(), cells

    def is_untouched(self) -> bool:
        return self.now() == self.before


@pytest.fixture(scope="module")
def held() -> Any:
    """A model with a chat of its own in the cache."""
    with make_llama(**MERGED) as llm:
        tokens_of(llm, pocket.make_prompt(np.random.default_rng(3), 1).messages(0))
        yield Held(llm)


def header_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    size = saving._START.unpack_from(data)[2]
    return json.loads(data[saving._START.size : saving._START.size + size])


def rewritten(file: Path, change: Callable[[dict[str, Any]], None], target: Path) -> Path:
    """Write a file with another header, and a SHA-256 that fits."""
    header, data = header_of(file), file.read_bytes()
    _, version, size, cells_size = saving._START.unpack_from(data)
    change(header)
    new = json.dumps(header).encode()
    start = saving._START.pack(saving.MAGIC, version, len(new), cells_size)
    cells = data[saving._START.size + size : -32]
    target.write_bytes(
        start + new + cells + hashlib.sha256(start + new + cells).digest(),
    )
    return target


IN_A_NEW_PROCESS = """
import json, sys
from conftest import make_llama
from test_saving import MERGED, chat, tokens_of
from kvmerge.chat.handler import ChatHandler

encoded = []
decode_chunk = ChatHandler.decode_chunk
ChatHandler.decode_chunk = lambda self, *a: encoded.append(1) or decode_chunk(self, *a)
with make_llama(**MERGED) as llm:
    llm.load_context(sys.argv[1])
    stats = str(llm.kv_stats())
    found = [tokens_of(llm, chat(number)) for number in (1, 2)]
    print(json.dumps([stats, found, len(encoded)]))
"""


def test_goes_on_in_a_new_process(saved: Path) -> None:
    paths = [str(Path(kvmerge.__file__).parents[1]), str(Path(__file__).parent)]
    process = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, str(saved)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    stats, found, encoded = json.loads(process.stdout.splitlines()[-1])
    assert encoded == 0
    with make_llama(**MERGED) as llm:
        tokens_of(llm, small_prompt().messages(0))
        expected_stats = str(llm.kv_stats()).splitlines()
        # How long the merge took differs.
        assert [a for a, b in zip(stats.splitlines(), expected_stats, strict=True) if a != b] in (
            [],
            [line for line in stats.splitlines() if line.startswith("merges")],
        )
        for number, (tokens, details) in zip((1, 2), found, strict=True):
            expected_tokens, expected_details = tokens_of(llm, chat(number))
            assert tokens == expected_tokens
            assert details == expected_details
            assert details["cached_tokens"] > PICTURES * 64


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_merge": "mosaic"},
        {"kv_merge": "h2o", "kv_budget": 60},
        {"kv_merge": "madakv", "type_k": "q8_0", "type_v": "q8_0", "flash_attn": True},
        {"kv_merge": "none", "type_k": "f32"},
    ],
    ids=lambda options: ",".join(map(str, options.values())) or "off",
)
def test_there_and_back(options: dict[str, Any], llama: Factory, tmp_path: Path) -> None:
    llm, other = llama(**options), llama(**options)
    tokens_of(llm, small_prompt().messages(0))
    llm.save_context(tmp_path / "a")
    other.load_context(str(tmp_path / "a"))
    assert other.kv_stats() == llm.kv_stats()
    assert other.media_spans == llm.media_spans
    assert tokens_of(other, chat(1)) == tokens_of(llm, chat(1))


def test_contexts_are_reused(
    llama: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = small_prompt().questions
    llm = llama(**MERGED)
    with llm.context(small_prompt().context(), **GREEDY) as ctx:
        llm.save_context(tmp_path / "a")
        expected = [ctx.ask(question.text)["choices"] for question in questions[:3]]
    llm.close()
    monkeypatch.setattr(ChatHandler, "decode_chunk", None)
    llm = llama(**MERGED)
    llm.load_context(tmp_path / "a")
    assert "merges          1" in str(llm.kv_stats())
    with llm.context(small_prompt().context(), **GREEDY) as ctx:
        assert [ctx.ask(question.text)["choices"] for question in questions[:3]] == expected
    llm.load_context(tmp_path / "a")
    _, details = tokens_of(llm, small_prompt().messages(2))
    assert details["cached_tokens"] > PICTURES * 64


def test_size_is_that_of_what_is_held(llama: Factory, tmp_path: Path) -> None:
    prompt = pocket.make_prompt(np.random.default_rng(20), 6)
    sizes = []
    for options in ({}, {"kv_merge": "mosaic", "kv_budget": 0.2}):
        llm = llama(**options)
        llm.create_chat_completion(prompt.messages(0), max_tokens=1)
        llm.save_context(tmp_path / "a")
        cells = saving._START.unpack_from((tmp_path / "a").read_bytes())[3]
        sizes.append((cells, llm.kv_stats().mib * 2**20))
    (full, held_full), (_, held_merged) = sizes
    assert held_full < full < 1.1 * held_full
    assert held_merged < 0.25 * held_full


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 12, 16, 23, 24, 25, 100, 0.1, 0.3, 0.5, 0.9, -33, -1])
def test_truncated(n: float, saved: Path, held: Held, tmp_path: Path) -> None:
    data = saved.read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(data[: round(n * len(data)) if isinstance(n, float) else n])
    with pytest.raises(errors.StateError, match="cut off|not a saved context"):
        held.llm.load_context(cut)
    assert held.is_untouched()


def test_added_to(saved: Path, held: Held, tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(errors.StateError, match="added to"):
        held.llm.load_context(tmp_path / "long")
    assert held.is_untouched()


def test_every_flipped_bit_is_noticed(saved: Path, held: Held, tmp_path: Path) -> None:
    data, flipped = saved.read_bytes(), tmp_path / "flipped"
    rng = np.random.default_rng(1)
    places = [*range(24), 25, 60, *rng.integers(24, len(data), 40).tolist(), len(data) - 1]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        flipped.write_bytes(changed)
        with pytest.raises(errors.StateError):
            held.llm.load_context(flipped)
    assert held.is_untouched()


HUGE = saving._START.pack(saving.MAGIC, saving.FORMAT_VERSION, 2**31, 2**63)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a saved context"),
        (b"GGUF" + bytes(100), "not a saved context: it begins with b'GGUF"),
        (saving._START.pack(saving.MAGIC, 4, 1, 1) + bytes(34), "version 4, of a newer kvmerge"),
        (saving._START.pack(saving.MAGIC, 2, 1, 1) + bytes(34), "version 2, of an older kvmerge"),
        (
            saving._START.pack(saving.MAGIC, saving.FORMAT_VERSION, 2**31, 2**63) + bytes(99),
            "cut off",
        ),
    ],
)
def test_foreign_files(content: bytes, reason: str, held: Held, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(errors.StateError, match=reason):
        held.llm.load_context(tmp_path / "a")
    assert held.is_untouched()


def test_no_file(held: Held, tmp_path: Path) -> None:
    with pytest.raises(errors.StateError, match="No such file"):
        held.llm.load_context(tmp_path / "a")
    with pytest.raises(errors.StateError, match="cannot be read"):
        held.llm.load_context(tmp_path)
    assert held.is_untouched()


def no_list(header: dict[str, Any]) -> None:
    header["tokens"] = "many"


def too_many_positions(header: dict[str, Any]) -> None:
    header["positions"].append(0)


def backwards(header: dict[str, Any]) -> None:
    header["positions"].reverse()


def no_media(header: dict[str, Any]) -> None:
    del header["media"]


def media_outside(header: dict[str, Any]) -> None:
    header["media"][0]["end"] = 10**6


def huge_token(header: dict[str, Any]) -> None:
    header["tokens"][0] = 2**40


def no_origin(header: dict[str, Any]) -> None:
    header["origin"] = None


@pytest.mark.parametrize(
    "change",
    [no_list, too_many_positions, backwards, no_media, media_outside, huge_token, no_origin],
)
def test_headers_that_make_no_sense(
    change: Callable[[dict[str, Any]], None], saved: Path, held: Held, tmp_path: Path
) -> None:
    file = rewritten(saved, change, tmp_path / "a")
    with pytest.raises(errors.StateError, match="makes no sense"):
        held.llm.load_context(file)
    assert held.is_untouched()


def test_refused_by_llama_cpp(saved: Path, held: Held, tmp_path: Path) -> None:
    """A file that is whole but whose cells are not: only llama.cpp can tell."""
    data = bytearray(saved.read_bytes())
    _, _, header_size, cells_size = saving._START.unpack_from(data)
    first = saving._START.size + header_size
    size = cells_size // 2
    start = saving._START.pack(saving.MAGIC, saving.FORMAT_VERSION, header_size, size)
    body = start + data[saving._START.size : first + size]
    (tmp_path / "a").write_bytes(body + hashlib.sha256(body).digest())
    with pytest.raises(errors.StateError, match="refused by llama.cpp"):
        held.llm.load_context(tmp_path / "a")
    assert held.is_untouched()


def test_loads_after_all_that(saved: Path, held: Held) -> None:
    assert held.is_untouched()
    held.llm.load_context(saved)
    assert held.llm.n_tokens == len(header_of(saved)["tokens"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_merge": None}, "kv_merge='flowmm', here it is None"),
        ({"kv_merge": "evict"}, "kv_merge='flowmm', here it is 'evict'"),
        ({"kv_merge": kvmerge.FlowMM(theta=0.3)}, "here it is .*theta=0.3"),
        ({"type_k": "f32"}, "type_k='f16', here it is 'f32'"),
        ({"flash_attn": True}, "flash_attn"),
        ({"rope_freq_base": 5000.0}, "rope_freq_base"),
        ({"mmproj": None}, "another mmproj"),
        ({"n_ctx": 256, "n_batch": 64}, "n_ctx=256 takes"),
    ],
    ids=str,
)
def test_another_setting(options: dict[str, Any], reason: str, saved: Path, llama: Factory) -> None:
    llm = llama(**{**MERGED, **options})
    llm.create_completion("The code", max_tokens=2)
    before = Held(llm)
    if "n_ctx" in options:
        saved = rewritten(saved, longer, saved.parent / "longer")
    with pytest.raises(errors.StateError, match=reason):
        llm.load_context(saved)
    assert before.is_untouched()
    llm.create_completion("The code", max_tokens=2)


def longer(header: dict[str, Any]) -> None:
    header["tokens"] += [1] * 256
    last = header["positions"][-1]
    header["positions"] += [last + i for i in range(1, 257)]


def test_another_model_of_the_same_shape(saved: Path, tmp_path: Path, llama: Factory) -> None:
    """Trained further: the same metadata and tensors, other weights."""
    file = tmp_path / "other.gguf"
    shutil.copy(pocket.model_path(), file)
    assert fingerprint(file) == fingerprint(pocket.model_path())
    tensor = gguf.GGUFReader(file).tensors[-1]
    with file.open("r+b") as stream:
        stream.seek(tensor.data_offset)
        stream.write(bytes(64))
    llm = llama(file, **MERGED)
    with pytest.raises(errors.StateError, match="another model file"):
        llm.load_context(saved)
    assert llm.n_tokens == 0


def test_nothing_to_save(llama: Factory, tmp_path: Path) -> None:
    with pytest.raises(errors.StateError, match="the cache is empty"):
        llama().save_context(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full(held: Held, saved: Path) -> kvmerge.Llama:
    held.llm.load_context(saved)
    return held.llm


def test_an_old_file_stays_when_writing_fails(
    full: kvmerge.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"old")

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for name, how, expected in (
        ("fsync", fails, errors.StateError),
        ("replace", fails, errors.StateError),
        ("replace", interrupted, KeyboardInterrupt),
    ):
        with monkeypatch.context() as patch, pytest.raises(expected):
            patch.setattr(os, name, how)
            full.save_context(file)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert file.read_bytes() == b"old"
    full.save_context(file)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    full.load_context(file)


def test_places_that_cannot_be_written(full: kvmerge.Llama, tmp_path: Path) -> None:
    with pytest.raises(errors.StateError, match="cannot be saved to .*it is a folder"):
        full.save_context(tmp_path)
    with pytest.raises(errors.StateError, match="cannot be saved to .*No such file or directory"):
        full.save_context(tmp_path / "none" / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path", ["a\0b", "a\ud800/b", 5, None, "~nobody-of-that-name/a", "", "x" * 300]
)
def test_no_path(path: Any, full: kvmerge.Llama) -> None:
    for use in (full.save_context, full.load_context):
        with pytest.raises(errors.StateError) as caught:
            use(path)
        str(caught.value).encode()


def test_closed(llama: Factory, saved: Path) -> None:
    llm = llama()
    llm.close()
    for call in (llm.load_context, llm.save_context):
        with pytest.raises(errors.ClosedError):
            call(saved)


@pytest.mark.parametrize("options", [{}, MERGED], ids=["off", "on"])
def test_no_state(options: dict[str, Any], llama: Factory) -> None:
    for nothing in (None, 5, b"x", {}):
        with pytest.raises(errors.StateError, match="what save_state"):
            llama(**options).load_state(nothing)


def test_refused_states_leave_the_cache(held: Held, saved: Path, llama: Factory) -> None:
    """`load_state`, of llama-cpp-python, keeps to the same rule."""
    held.llm.load_context(saved)
    before = Held(held.llm)
    other = llama(mmproj=None, kv_merge=kvmerge.FlowMM(window=8))
    other.create_completion("The code of the old box", max_tokens=1)
    too_long = held.llm.save_state()
    too_long.n_tokens = 5000
    for unfit in (other.save_state(), too_long):
        with pytest.raises(errors.StateError):
            held.llm.load_state(unfit)
        assert before.is_untouched()
    longer = llama(mmproj=None, n_ctx=1024, **MERGED)
    longer.create_completion("The code of the old box", max_tokens=1)
    held.llm.load_state(longer.save_state())
    assert len(held.llm.input_ids) == held.llm.n_ctx()
    held.llm.load_context(saved)


@pytest.mark.skipif(os.name != "posix", reason="links, pipes and modes of POSIX")
def test_links_pipes_and_modes(llama: Factory, tmp_path: Path) -> None:
    llm = llama(mmproj=None)
    llm.create_completion("Hello", max_tokens=1)
    real, link, pipe, new = (tmp_path / name for name in ("real", "link", "pipe", "new"))
    real.write_bytes(b"")
    real.chmod(0o640)
    link.symlink_to(real)
    os.mkfifo(pipe)
    llm.save_context(link)
    assert link.is_symlink()
    assert real.stat().st_size > 0
    assert real.stat().st_mode & 0o777 == 0o640
    for use in (llm.save_context, llm.load_context):  # Neither waits for another side.
        with pytest.raises(errors.StateError, match="not a regular file"):
            use(pipe)
    assert pipe.is_fifo()
    before = os.umask(0o027)
    try:
        llm.save_context(new)
    finally:
        os.umask(before)
    assert new.stat().st_mode & 0o777 == 0o640
    llm.load_context(link)
