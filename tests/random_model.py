"""Language models with random weights, for tests and benchmarks that need shapes and not sense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np


@dataclass(frozen=True)
class Shape:
    """Shape of a decoder.

    Attributes
    ----------
    arch
        ``"llama"``; ``"gemma3"``: every other layer, from the first on, has a sliding window of 64
        tokens; ``"lfm2"``: every other layer, from the first on, is a short convolution;
        ``"qwen2vl"``: positions have a time, a row and a column (M-RoPE).
    layers, heads, heads_kv, head_size, ffn, vocab, context
        As in the GGUF metadata; the embedding has ``heads * head_size`` values.
    pools
        Whether the embedding of a text is the mean of its tokens', as in models made for that.
    """

    arch: str = "llama"
    layers: int = 3
    heads: int = 4
    heads_kv: int = 2
    head_size: int = 64
    ffn: int = 256
    vocab: int = 512
    context: int = 8192
    pools: bool = False

    @property
    def embedding(self) -> int:
        """Size of the embedding."""
        return self.heads * self.head_size


def write_tokens(writer: gguf.GGUFWriter, vocabulary: Path | None) -> None:
    """Give a model the tokens of a GGUF, or none."""
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    for field in gguf.GGUFReader(vocabulary).fields.values():
        if field.name.startswith("tokenizer."):
            kind, *inner = field.types
            writer.add_key_value(field.name, field.contents(), kind, *inner[-1:])


def write_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """Say what shape a model has."""
    writer.add_name("random")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.embedding)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    if shape.arch == "lfm2":
        writer.add_shortconv_l_cache(3)
        writer.add_head_count_kv([shape.heads_kv * (i % 2) for i in range(shape.layers)])
    else:
        writer.add_head_count_kv(shape.heads_kv)
    if shape.arch == "gemma3":
        writer.add_sliding_window(64)
        writer.add_sliding_window_pattern(2)
    writer.add_rope_dimension_count(shape.head_size)
    if shape.arch == "qwen2vl":
        part = shape.head_size // 16
        writer.add_rope_dimension_sections([2 * part, 3 * part, 3 * part, 0])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    if shape.pools:
        writer.add_pooling_type(gguf.PoolingType.MEAN)


def write_random_model(
    path: Path,
    shape: Shape,
    *,
    seed: int = 0,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F16,
    head_order: Sequence[int] | None = None,
    vocabulary: Path | None = None,
) -> Path:
    """Write a GGUF with random weights that llama.cpp loads.

    Parameters
    ----------
    path
        File to write.
    shape
        Shape of the model.
    seed
        Seed of the weights.
    quantization
        Type of the matrices; norms are F32.
    head_order
        Order of the KV heads, each with its group of query heads: the model says the same in any.
    vocabulary
        GGUF whose tokens it has, `shape.vocab` of them.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, shape.arch)
    write_shape(writer, shape)
    write_tokens(writer, vocabulary)

    def matrix(
        name: str, rows: int, columns: int, gain: float = 1.0, heads: int | None = None
    ) -> None:
        """Write a matrix; `heads` is the axis along which it is made of KV heads."""
        weights = rng.standard_normal((rows, columns), dtype=np.float32) * gain / columns**0.5
        if heads is not None and head_order is not None:
            blocks = np.split(weights, shape.heads_kv, axis=heads)
            weights = np.concatenate([blocks[h] for h in head_order], axis=heads)
        if quantization in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            kind = np.float16 if quantization == gguf.GGMLQuantizationType.F16 else np.float32
            writer.add_tensor(name, weights.astype(kind))
        else:
            packed = gguf.quantize(weights, quantization)
            writer.add_tensor(name, packed, raw_dtype=quantization)

    def norm(name: str, size: int = shape.embedding) -> None:
        writer.add_tensor(name, np.ones(size, dtype=np.float32))

    has_head_norms, kv = shape.arch in ("gemma3", "lfm2"), shape.heads_kv * shape.head_size
    matrix("token_embd.weight", shape.vocab, shape.embedding, gain=shape.embedding**0.5)
    matrix("output.weight", shape.vocab, shape.embedding)
    norm("token_embd_norm.weight" if shape.arch == "lfm2" else "output_norm.weight")
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight")
        norm(f"{block}.ffn_norm.weight")
        if shape.arch == "gemma3":
            norm(f"{block}.post_attention_norm.weight")
            norm(f"{block}.post_ffw_norm.weight")
        if shape.arch == "lfm2" and layer % 2 == 0:
            matrix(f"{block}.shortconv.in_proj.weight", 3 * shape.embedding, shape.embedding)
            matrix(f"{block}.shortconv.out_proj.weight", shape.embedding, shape.embedding)
            kernel = rng.standard_normal((shape.embedding, 3), dtype=np.float32)
            writer.add_tensor(f"{block}.shortconv.conv.weight", kernel)
        else:
            # a gain on Q and K makes attention uneven, as it is in trained models
            matrix(f"{block}.attn_q.weight", shape.embedding, shape.embedding, gain=1.5, heads=0)
            matrix(f"{block}.attn_k.weight", kv, shape.embedding, gain=1.5, heads=0)
            matrix(f"{block}.attn_v.weight", kv, shape.embedding, heads=0)
            matrix(f"{block}.attn_output.weight", shape.embedding, shape.embedding, heads=1)
            if has_head_norms:
                norm(f"{block}.attn_q_norm.weight", shape.head_size)
                norm(f"{block}.attn_k_norm.weight", shape.head_size)
        matrix(f"{block}.ffn_gate.weight", shape.ffn, shape.embedding)
        matrix(f"{block}.ffn_up.weight", shape.ffn, shape.embedding)
        matrix(f"{block}.ffn_down.weight", shape.embedding, shape.ffn)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
