"""The selection of NVIDIA kvpress, on the same weights.

Not run by default: ``pip install torch transformers kvpress``, then ``pytest -m peer``.

A tiny random Llama is built with transformers and written as a GGUF. What kvpress scores and keeps
in one has to be what the engine scores and keeps in the other. The scores of kvpress are means over
queries and heads, ours are sums; neither changes an order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from kvmerge.policies import H2O, Policy, SnapKV
from session import Session

pytestmark = pytest.mark.peer

LAYERS, HEADS, HEADS_KV, HEAD_SIZE, VOCAB = 2, 4, 2, 64, 256
TOKENS, WINDOW, KEPT = 200, 16, 60


@pytest.fixture(scope="module")
def peer() -> Any:
    # here, because importing them takes seconds
    for package in ("torch", "transformers", "kvpress"):
        pytest.importorskip(package, reason="pip install torch transformers kvpress")
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HEADS * HEAD_SIZE, intermediate_size=256,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS_KV,
        max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=False,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                # uneven attention, as in trained models
                gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(std=1.0 if "embed" in name else gain / weight.shape[1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def exported(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peer") / "peer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(HEADS * HEAD_SIZE)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(256)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS_KV)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in peer.state_dict().items():
        values = weight.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", HEADS_KV)):
            if part in name:
                # transformers turns halves of a head, llama.cpp neighbours
                halves = values.reshape(heads, 2, HEAD_SIZE // 2, -1)
                values = halves.swapaxes(1, 2).reshape(values.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target, name
        writer.add_tensor(target, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(1).integers(0, VOCAB, TOKENS).tolist()


def scores_of_peer(peer: Any, press: Any, tokens: list[int]) -> list[np.ndarray]:
    """Return what a press scores, ``[kv heads, n]`` for each layer."""
    import torch
    import transformers

    found: list[np.ndarray] = []
    score = press.score

    def recorded(*args: Any, **kwargs: Any) -> Any:
        found.append(score(*args, **kwargs))
        return found[-1]

    press.score = recorded
    with torch.no_grad(), press(peer):
        peer(torch.tensor([tokens]), past_key_values=transformers.DynamicCache())
    assert len(found) == LAYERS
    return [scores[0].numpy() for scores in found]


def plans_of_engine(model: Path, policy: Policy, tokens: list[int]) -> Iterator[tuple[int, Any]]:
    with Session(model, merge=policy.engine_params(), cache_type="f32") as session:
        session.decode(tokens)
        assert session.engine
        session.engine.merge(KEPT)
        for layer in range(LAYERS):
            yield layer, [session.engine.plan(layer, head) for head in range(HEADS_KV)]


def test_the_models_are_the_same(peer: Any, exported: Path, tokens: list[int]) -> None:
    import torch

    with Session(exported, cache_type="f32") as session, torch.no_grad():
        logits = peer(torch.tensor([tokens])).logits[0, -1].numpy()
        np.testing.assert_allclose(session.decode(tokens), logits, atol=1e-3)


@pytest.mark.parametrize("neighbours", [1, 5])
def test_snapkv(peer: Any, exported: Path, tokens: list[int], neighbours: int) -> None:
    import kvpress

    press = kvpress.SnapKVPress(
        compression_ratio=1 - KEPT / TOKENS, window_size=WINDOW, kernel_size=neighbours
    )
    expected = scores_of_peer(peer, press, tokens)
    # kvpress pools as if there were zeros before the first and instead of the window's tokens
    inner = slice(neighbours // 2, TOKENS - WINDOW - neighbours // 2)
    policy = replace(SnapKV(), window=WINDOW, neighbours=neighbours, pool="mean")
    for layer, plans in plans_of_engine(exported, policy, tokens):
        for head, plan in enumerate(plans):
            ours = plan.score / (WINDOW * HEADS // HEADS_KV)
            np.testing.assert_allclose(ours[inner], expected[layer][head][inner], rtol=1e-3)
            kept = set(np.flatnonzero(plan.fate >= 2))
            best = np.argsort(-expected[layer][head], kind="stable")[:KEPT]
            # a token at an edge of the pool that comes or goes makes another one go or come
            assert len(kept ^ set(best)) <= 2 * 2 * (neighbours // 2)


def test_attention_of_all_queries(peer: Any, exported: Path, tokens: list[int]) -> None:
    import kvpress

    press = kvpress.ObservedAttentionPress(compression_ratio=1 - KEPT / TOKENS)
    expected = scores_of_peer(peer, press, tokens)
    # kvpress takes the mean over the queries that see a token, H2O the sum
    seen_by = np.arange(TOKENS, 0, -1)
    for layer, plans in plans_of_engine(exported, H2O(), tokens):
        for head, plan in enumerate(plans):
            ours = plan.score / (HEADS // HEADS_KV) / seen_by
            np.testing.assert_allclose(ours, expected[layer][head], rtol=1e-3)
