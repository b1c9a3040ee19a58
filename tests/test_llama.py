"""`kvmerge.Llama`: everything but pictures."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import kvmerge
from conftest import Factory, answer
from kvmerge import errors, pocket
from kvmerge.native import binding
from kvmerge.policies import resolve

TEXT = " ".join(
    f"The code of the {thing} is {code}."
    for thing, code in zip(
        ("old box", "new door", "small key", "heavy bag", "clean car", "round cup"),
        (123, 456, 789, 321, 654, 987),
        strict=True,
    )
)


def logits_after(llm: llama_cpp.Llama, tokens: list[int], n: int = 8) -> np.ndarray:
    """Return the logits after the prompt and after each of `n` greedy tokens."""
    rows = []
    for token in llm.generate(tokens, temp=0.0):
        rows.append(np.array(llm._ctx.get_logits()[: llm.n_vocab()]))
        if len(rows) > n:
            break
        assert token >= 0
    return np.array(rows)


def test_is_a_llama_cpp_llama(llama: Factory) -> None:
    llm = llama()
    assert isinstance(llm, llama_cpp.Llama)
    response = llm.create_completion(TEXT, max_tokens=4, temperature=0.0)
    assert response["choices"][0]["finish_reason"] in ("length", "stop")
    assert response["usage"]["prompt_tokens_details"]["cells"] > 60


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_merge": "none"}, {"kv_merge": "flowmm", "kv_budget": 1.0}],
    ids=["off", "none", "budget 1"],
)
def test_off_means_off(options: dict[str, Any], model: Path, llama: Factory) -> None:
    stock = llama_cpp.Llama(str(model), n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False)
    tokens = stock.tokenize(TEXT.encode())
    expected = logits_after(stock, tokens)
    stock.close()
    llm = llama(mmproj=None, **options)
    assert llm.engine is None
    np.testing.assert_array_equal(logits_after(llm, tokens), expected)


def test_completion_merges(llama: Factory, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvmerge")
    llm = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.5)
    tokens = llm.tokenize(TEXT.encode())
    llm.create_completion(tokens, max_tokens=4, temperature=0.0)
    stats = llm.kv_stats()
    assert stats.merges[0].cells_before == len(tokens)
    assert stats.merges[0].cells_after == -(-len(tokens) // 2)
    assert stats.cells == stats.merges[0].cells_after + stats.tokens - len(tokens)
    assert stats.last_merge_ms > 0
    assert len(caplog.messages) == 2
    n = len(tokens)
    line = (
        rf"merged {n} cells into {stats.merges[0].cells_after} \(text: {n} into "
        rf"{stats.merges[0].cells_after}; {n} tokens, {n} positions\), "
        r".* MiB into .* MiB, .* ms, error .*"
    )
    assert caplog.messages[0].startswith("computes on ")
    assert re.fullmatch(line, caplog.messages[1])


def test_first_token_comes_from_the_full_cache(llama: Factory) -> None:
    full, merged = llama(mmproj=None), llama(mmproj=None, kv_merge="flowmm", kv_budget=0.3)
    tokens = full.tokenize(TEXT.encode())
    expected, found = logits_after(full, tokens, 1), logits_after(merged, tokens, 1)
    np.testing.assert_array_equal(found[0], expected[0])
    assert not np.array_equal(found[1], expected[1])


def test_merge_before(llama: Factory) -> None:
    full = llama(mmproj=None)
    tokens = full.tokenize(TEXT.encode())
    llm = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.3, merge_before=5)
    found = logits_after(llm, tokens, 1)
    assert not np.array_equal(found[0], logits_after(full, tokens, 1)[0])
    merge = llm.kv_stats().merges[0]
    assert merge.tokens == merge.cells_before == len(tokens) - 5


def test_merge_before_of_more_than_the_prompt(llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.3, merge_before=5000)
    llm.create_completion(TEXT, max_tokens=2)
    assert llm.kv_stats().tokens > 0


@pytest.mark.parametrize("budget", [40, 21, 0.9])
def test_budgets(budget: float | int, llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge="flowmm", kv_budget=budget)
    tokens = llm.tokenize(TEXT.encode())
    llm.create_completion(tokens, max_tokens=2)
    expected = budget if isinstance(budget, int) else -(-len(tokens) * 9 // 10)
    assert llm.kv_stats().merges[0].cells_after == expected


def test_short_prompts_are_left_alone(llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.2)
    llm.create_completion("The code", max_tokens=2)
    assert not llm.kv_stats().merges


def test_merges_again_past_the_budget(llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.4)
    tokens = llm.tokenize(TEXT.encode())
    llm.create_completion(tokens, max_tokens=1)
    more = tokens + llm.tokenize(TEXT.encode(), add_bos=False)
    response = llm.create_completion(more, max_tokens=1)
    details = response["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == len(tokens), "what is there is not read again"
    stats = llm.kv_stats()
    assert [merge.tokens for merge in stats.merges] == [len(tokens), len(more)]
    assert stats.cells == -(-len(more) * 2 // 5)
    assert llm.engine is not None and llm.engine.n_tokens() == len(more)


def test_diverging_prompt_is_read_again(llama: Factory, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvmerge")
    llm = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.4)
    tokens = llm.tokenize(TEXT.encode())
    llm.create_completion(tokens, max_tokens=1)
    other = tokens[:30] + tokens[40:]
    found = logits_after(llm, other, 4)
    lines = [message for message in caplog.messages if message.startswith("reading all")]
    n = len(tokens)
    assert lines == [
        f"reading all {len(other)} tokens of the prompt again: it differs from the cache after 30 "
        f"of {n} tokens, and what comes before was merged"
    ]
    caplog.clear()
    llm.create_completion(other[:20], max_tokens=1)
    assert "reading all 20 tokens of the prompt again: it ends after 20 of the" in caplog.text
    fresh = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.4)
    np.testing.assert_array_equal(found, logits_after(fresh, other, 4))


@pytest.mark.parametrize("merge", [None, "flowmm"])
def test_same_prompt_twice(merge: str | None, llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge=merge, kv_budget=0.5)
    first = llm.create_completion(TEXT, max_tokens=6, temperature=0.0)["choices"][0]["text"]
    again = llm.create_completion(TEXT, max_tokens=6, temperature=0.0)["choices"][0]["text"]
    if merge is None:
        assert again == first
    assert isinstance(again, str)


def test_text_chats_merge(llama: Factory) -> None:
    for options in ({"mmproj": None}, {}):
        llm = llama(kv_merge="flowmm", kv_budget=0.4, **options)
        answer(llm, [{"role": "user", "content": TEXT}])
        assert len(llm.kv_stats().merges) == 1


def test_context_that_is_rounded_up(llama: Factory) -> None:
    llm = llama(mmproj=None, n_ctx=100, logits_all=True)
    assert llm.n_ctx() > 100
    llm.eval(llm.tokenize(TEXT.encode()) * 3)
    assert llm.kv_stats().tokens > 100


def test_reset_forgets(llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.4)
    llm.create_completion(TEXT, max_tokens=2)
    llm.reset()
    stats = llm.kv_stats()
    assert (stats.tokens, stats.cells, stats.positions, stats.merges) == (0, 0, 0, ())


def test_going_back_into_merged_cells(llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.4)
    tokens = llm.tokenize(TEXT.encode())
    llm.create_completion(tokens, max_tokens=1)
    llm.n_tokens = 10
    with pytest.raises(errors.StateError, match="cannot go back to token 10"):
        llm.eval([5])
    llm.reset()
    llm.eval([5])


@pytest.mark.parametrize("kind", ["f16", "f32", "q8_0", "bf16"])
def test_cache_types_by_name(kind: str, llama: Factory) -> None:
    llm = llama(mmproj=None, type_k=kind, type_v=kind, flash_attn=True)
    llm.create_completion(TEXT, max_tokens=1)
    per_number = {"f16": 2, "bf16": 2, "f32": 4, "q8_0": 34 / 32}[kind]
    arch = llm.metadata["general.architecture"]
    layers = int(llm.metadata[f"{arch}.block_count"])
    heads = int(llm.metadata[f"{arch}.attention.head_count_kv"])
    assert llm.kv_stats().bytes_per_cell == layers * 2 * heads * 64 * per_number


def test_bytes_per_cell_agree(llama: Factory) -> None:
    assert (
        llama(mmproj=None).kv_stats().bytes_per_cell
        == llama(mmproj=None, kv_merge="flowmm").kv_stats().bytes_per_cell
        > 0
    )


def test_stats(llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge=kvmerge.FlowMM(theta=0.3), kv_budget=0.4)
    llm.create_completion(TEXT, max_tokens=2)
    stats = llm.kv_stats()
    assert stats.positions == stats.tokens > stats.cells
    assert stats.mib == stats.cells * stats.bytes_per_cell / 2**20
    assert stats.mib_full == stats.tokens * stats.bytes_per_cell / 2**20
    assert "theta=0.3" in stats.policy
    shown = str(stats)
    for word in ("tokens seen", "cells held", "KV MiB", "flowmm", "0.4 of the tokens kept", "rho"):
        assert word in shown
    page = stats._repr_html_()
    assert f"cells held      {stats.cells}" in page
    assert "theta=0.3" in page
    assert f"{100 * stats.cells / stats.tokens:.0f} % of the full cache" in page
    plain = stats.to_dict()
    assert plain["merges"][0]["cells_after"] == stats.merges[0].cells_after
    assert plain["flow"][0]["rho"] == 0.0, "one modality: nothing crosses"


def decode(llm: kvmerge.Llama, tokens: list[int], position: int) -> None:
    """Read tokens as a framework does that runs llama.cpp on the context by itself."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, position + i
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == len(tokens) - 1
    assert llama_cpp.llama_decode(llm.ctx, batch) == 0
    llama_cpp.llama_batch_free(batch)


@pytest.mark.parametrize("merge", [None, "auto", "flowmm"])
def test_stats_of_what_something_else_has_read(merge: str | None, llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge=merge, kv_budget=0.5)
    right = llm.create_completion(TEXT, max_tokens=4, temperature=0)["choices"][0]["text"]
    llm.reset()
    assert llm.kv_stats().elsewhere == 0
    decode(llm, [5] * 100, 0)
    stats = llm.kv_stats()
    assert (stats.tokens, stats.positions, stats.cells, stats.elsewhere) == (100, 100, 100, 100)
    assert "elsewhere     100 tokens were not read through kvmerge" in str(stats)
    # The next call answers its own question.
    assert llm.create_completion(TEXT, max_tokens=4, temperature=0)["choices"][0]["text"] == right
    seen = llm.kv_stats()
    assert (seen.elsewhere, seen.tokens) == (0, llm.n_tokens)
    decode(llm, [5] * 10, llm.n_tokens)
    assert (llm.kv_stats().elsewhere, llm.kv_stats().cells) == (10, seen.cells + 10)
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, 0, -1)
    assert (llm.kv_stats().tokens, llm.kv_stats().cells) == (0, 0)
    assert "were not removed by kvmerge" in str(llm.kv_stats())


def test_a_cap_holds_for_what_something_else_reads(llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge="auto", kv_max_cells=512)
    for at in range(0, 1024, 64):
        decode(llm, list(range(64)), at)
    stats = llm.kv_stats()
    assert (stats.tokens, stats.elsewhere) == (1024, 1024)
    # Every merge is in the list, not only the last one that somebody looked at.
    assert llm.engine
    assert len(stats.merges) == llm.engine.stats().n_merges > 2
    assert [merge.tokens for merge in stats.merges] == sorted({m.tokens for m in stats.merges})
    with pytest.raises(kvmerge.KVMergeError, match="no merge"):
        llm.engine.merges(len(stats.merges) + 1)
    assert stats.merges
    assert stats.cells <= 512


def test_stats_where_something_else_restored_a_merged_state(llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.3)
    llm.create_completion(TEXT, max_tokens=1)
    cells = llm.kv_stats().cells
    size = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
    state = (llama_cpp.ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(llm.ctx, state, size, 0) == size
    other = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.3)
    assert llama_cpp.llama_state_seq_set_data(other.ctx, state, size, 0) == size
    stats = other.kv_stats()
    assert (stats.cells, stats.merges) == (cells, ())


def test_stats_of_layers_that_differ(llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge="pyramid", kv_budget=0.4)
    llm.create_completion(TEXT, max_tokens=2)
    stats = llm.kv_stats()
    assert stats.layer_cells[0] > stats.layer_cells[-1]
    assert stats.cells == round(sum(stats.layer_cells) / len(stats.layer_cells))
    assert f"a layer       {stats.layer_cells[0]} " in str(stats)


def test_pickle(llama: Factory) -> None:
    llm = llama(kv_merge=kvmerge.FlowMM(theta=0.3), kv_budget=64, merge_before=3, n_batch=128)
    copy = pickle.loads(pickle.dumps(llm))
    try:
        state = copy.__getstate__()
        for name in ("kv_merge", "kv_budget", "merge_before", "mmproj", "n_batch", "n_ctx"):
            assert state[name] == llm.__getstate__()[name], name
        assert copy.chat_handler.mtmd_ctx is not None
    finally:
        copy.close()


def test_save_and_load_state_without_merging(llama: Factory) -> None:
    llm = llama(mmproj=None)
    tokens = llm.tokenize(TEXT.encode())
    expected = logits_after(llm, tokens, 3)
    state = llm.save_state()
    llm.create_completion("The old", max_tokens=2)
    llm.load_state(pickle.loads(pickle.dumps(state)))
    assert llm.kv_stats().tokens == state.n_tokens
    np.testing.assert_array_equal(logits_after(llm, tokens, 3)[1:], expected[1:])


@pytest.mark.parametrize("name", ["flowmm", "mosaic", "h2o"])
def test_save_and_load_state_with_merging(name: str, llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge=name, kv_budget=0.4)
    tokens = llm.tokenize(TEXT.encode())
    llm.create_completion(tokens, max_tokens=2)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    stats = llm.kv_stats()
    assert stats.merges
    more = [*llm.input_ids[: llm.n_tokens].tolist(), *tokens[:5]]
    expected = llm.create_completion(more, max_tokens=4, temperature=0.0)["choices"][0]["text"]
    other = llama(mmproj=None, kv_merge=name, kv_budget=0.4)
    other.load_state(state)
    assert other.kv_stats() == stats
    again = other.create_completion(more, max_tokens=4, temperature=0.0)["choices"][0]["text"]
    assert again == expected
    for unfit in (llama(mmproj=None), llama(mmproj=None, kv_merge=kvmerge.FlowMM(window=8))):
        with pytest.raises(errors.StateError):
            unfit.load_state(state)
        unfit.create_completion(TEXT, max_tokens=2)
    with pytest.raises(errors.StateError, match="saved without"):
        other.load_state(llama(mmproj=None).save_state())


@pytest.mark.parametrize("name", [None, "flowmm"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_empty_is_restored_empty(name: str | None, whole: bool, llama: Factory) -> None:
    """llama.cpp leaves the cells that are there when it reads a state without any."""
    llm = llama(mmproj=None, kv_merge=name)
    empty = llm.kv_cache.snapshot(whole=whole)
    expected = llm.create_completion(TEXT, max_tokens=4, temperature=0.0)["choices"][0]["text"]
    llm.kv_cache.restore(empty)
    assert (llm.kv_cache.n_tokens, llm.kv_stats().cells) == (0, 0)
    assert llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0) == -1
    again = llm.create_completion(TEXT, max_tokens=4, temperature=0.0)["choices"][0]["text"]
    assert again == expected


def test_set_cache_does_not_go_with_merging(llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.4)
    llm.create_completion(TEXT, max_tokens=2)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    with pytest.raises(errors.UnsupportedError, match="set_cache"):
        llm.create_completion(TEXT, max_tokens=2)
    llm.set_cache(None)
    llm.create_completion(TEXT, max_tokens=2)


def test_all_spellings_of_the_projector(model: Path, mmproj: Path, llama: Factory) -> None:
    for name in ("mmproj", "mmproj_path", "clip_model_path"):
        llm = llama(**{"mmproj": None, name: str(mmproj)})
        assert llm.chat_handler.clip_model_path == str(mmproj)


def test_log_probabilities(llama: Factory) -> None:
    llm = llama(mmproj=None, kv_merge="flowmm", kv_budget=0.5, logits_all=True)
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= " red red red"', verbose=False)
    response = llm.create_completion(
        TEXT, max_tokens=3, logprobs=2, temperature=0.0, grammar=grammar
    )
    assert len(response["choices"][0]["logprobs"]["tokens"]) == 3


def test_speculative_decoding(llama: Factory) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    options = {"mmproj": None, "kv_merge": "flowmm", "kv_budget": 0.5}
    draft = LlamaPromptLookupDecoding(num_pred_tokens=4)
    generated = []
    for llm in (llama(**options), llama(**options, draft_model=draft)):
        tokens = llm.generate(llm.tokenize(TEXT.encode()), temp=0.0)
        generated.append([token for token, _ in zip(tokens, range(24), strict=False)])
    assert generated[0] == generated[1]
    assert len(generated[0]) == 24


def test_evict_is_flowmm_without_folding(llama: Factory) -> None:
    tokens: list[int] = []
    kept = []
    for policy in (kvmerge.FlowMM(), kvmerge.Evict()):
        llm = llama(mmproj=None, kv_merge=policy, kv_budget=0.4)
        tokens = tokens or llm.tokenize(TEXT.encode())
        llm.create_completion(tokens, max_tokens=1)
        assert llm.engine is not None
        plan = llm.engine.plan(0, 0)
        kept.append(sorted(plan.order[plan.fate >= 2].tolist()))
    assert kept[0] == kept[1]
    assert resolve("evict") == kvmerge.Evict()


def test_policies_are_shown_with_what_can_be_chosen() -> None:
    assert str(kvmerge.FlowMM()) == "flowmm"
    assert str(kvmerge.Evict(window=8)) == "evict(window=8)"
    assert str(kvmerge.FlowMM(theta=0.3, bias="none")) == "flowmm(bias='none', theta=0.3)"
    with pytest.raises(TypeError, match="match"):
        kvmerge.FlowMM(match="any")  # type: ignore[call-arg]
    custom = kvmerge.Policy(match="segment", keys="keep")
    assert custom.engine_params()["match"] == 4


def test_defaults_are_those_of_the_library() -> None:
    ffi, library, _ = binding._native()
    native = library.kvmerge_params_default()
    names = {member for member in dir(native) if member != "size"}
    params = kvmerge.Policy().engine_params()
    assert params == kvmerge.FlowMM(bias="count").engine_params()
    assert params.keys() == names, "every field of the struct has an option"
    for name, value in params.items():
        assert getattr(native, name) == pytest.approx(value), name


def test_presets_are_listed() -> None:
    assert {"none", "flowmm", "evict"} <= set(kvmerge.presets())
    assert pocket.model_path().exists()


@pytest.mark.parametrize("merge", ["flowmm", "mosaic", "streaming"])
def test_the_same_request_twice(merge: str, llama: Factory) -> None:
    """The second begins from the logits of the full cache, as the first did."""
    llm = llama(mmproj=None, kv_merge=merge, kv_budget=0.3)
    chat = [{"role": "user", "content": TEXT}]
    for ask in (
        lambda: llm.create_completion(TEXT, max_tokens=12, temperature=0, logit_bias={257: -100}),
        lambda: llm.create_chat_completion(chat, max_tokens=12, temperature=0),
    ):
        llm.reset()
        answers = [ask()["choices"] for _ in range(3)]
        assert llm.kv_stats().merges
        assert answers[1:] == answers[:1] * 2
        assert llm.kv_stats().tokens > 0


def test_another_request_between(llama: Factory) -> None:
    """What was kept of one prompt is not given to another."""
    options = {"mmproj": None, "kv_merge": "flowmm", "kv_budget": 0.3}
    llm, half = llama(**options), TEXT[: len(TEXT) // 2]
    llm.create_completion(TEXT, max_tokens=8, temperature=0)
    found = llm.create_completion(half, max_tokens=8, temperature=0)["choices"]
    assert llama(**options).create_completion(half, max_tokens=8, temperature=0)["choices"] == found
