"""Write a checkpoint as the two GGUF files that llama.cpp loads.

``python tools/pocket/export.py DIR/joint.pt`` writes ``pocket.gguf`` and ``pocket-mmproj.gguf``
into the package.  The decoder is stored as Q8_0 and the vision part as F16.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "python" / "kvmerge"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import vocabulary as v  # noqa: E402
from model import Config  # noqa: E402

CONTEXT = 8192


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: str) -> None:
    data = tensor.detach().float().numpy()
    if kind == "f32" or data.ndim < 2:
        writer.add_tensor(name, np.ascontiguousarray(data))
    elif kind == "f16":
        writer.add_tensor(name, data.astype(np.float16))
    else:
        packed = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def export_decoder(state: dict[str, torch.Tensor], c: Config, path: Path) -> None:
    """Write the decoder with its tokenizer."""
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name("kvmerge pocket")
    w.add_description("Tiny model for tests: answers questions about pictures of letters on shapes")
    w.add_context_length(CONTEXT)
    w.add_embedding_length(c.width)
    w.add_block_count(c.layers)
    w.add_feed_forward_length(c.ffn)
    w.add_head_count(c.heads)
    w.add_head_count_kv(c.kv_heads)
    w.add_key_length(c.head_size)
    w.add_value_length(c.head_size)
    w.add_layer_norm_rms_eps(c.eps)
    w.add_rope_dimension_count(c.head_size)
    w.add_rope_freq_base(c.rope_base)
    # For this architecture llama.cpp turns all channels; factors slow down those that stand still.
    turned = c.rope_rates()
    rates = c.rope_base ** (-torch.arange(0, c.head_size, 2) / c.head_size)
    factors = torch.full_like(rates, 1e9)
    factors[: len(turned)] = rates[: len(turned)] / turned
    _add(w, "rope_freqs.weight", factors, "f32")
    w.add_vocab_size(c.vocabulary)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("llama-bpe")
    w.add_token_list(v.TOKENS)
    kinds = []
    for token in v.TOKENS:
        if token in v.SPECIALS:
            kinds.append(gguf.TokenType.CONTROL)
        elif token.startswith("<|unused"):
            kinds.append(gguf.TokenType.UNUSED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    w.add_token_types(kinds)
    # llama.cpp wants the key.  No merge can apply: a word is one token or falls into bytes.
    w.add_token_merges(["<|unused_0|> <|unused_0|>"])
    w.add_bos_token_id(v.BEGIN)
    w.add_eos_token_id(v.END)
    w.add_eot_token_id(v.END)
    w.add_pad_token_id(v.END)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_chat_template(v.CHAT_TEMPLATE)

    _add(w, "token_embd.weight", state["embed.weight"], "q8_0")
    _add(w, "output_norm.weight", state["norm.weight"], "f32")
    names = {
        "norm1": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "out": "attn_output",
        "norm2": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
    }  # fmt: skip
    for i in range(c.layers):
        for ours, theirs in names.items():
            tensor = state[f"blocks.{i}.{ours}.weight"]
            _add(w, f"blk.{i}.{theirs}.weight", tensor, "q8_0")
    _finish(w)


VISION_BLOCK = {
    "ln1": "ln1", "q": "attn_q", "k": "attn_k", "v": "attn_v", "out": "attn_out",
    "ln2": "ln2", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
"""Names of the parts of a block of the ViT, and what GGUF calls them."""


def read_vision(path: Path, c: Config) -> dict[str, torch.Tensor]:
    """Read what `export_vision` has written."""
    found = {t.name: torch.tensor(t.data).float() for t in gguf.GGUFReader(path).tensors}
    names = {f"post.{p}": f"v.post_ln.{p}" for p in ("weight", "bias")}
    names |= {f"mm{i}.{p}": f"mm.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    names |= {"patch.bias": "v.patch_embd.bias", "position": "v.position_embd.weight"}
    names |= {
        f"blocks.{i}.{ours}.{p}": f"v.blk.{i}.{theirs}.{p}"
        for i in range(c.vision_layers)
        for ours, theirs in VISION_BLOCK.items()
        for p in ("weight", "bias")
    }
    kernel = found["v.patch_embd.weight"].reshape(c.vision_width, -1)
    return {"patch.weight": kernel} | {ours: found[theirs] for ours, theirs in names.items()}


def export_vision(state: dict[str, torch.Tensor], c: Config, path: Path) -> None:
    """Write the ViT and the projector."""
    w = gguf.GGUFWriter(str(path), "clip")
    w.add_name("kvmerge pocket vision")
    w.add_string("clip.projector_type", "mlp")
    w.add_bool("clip.has_vision_encoder", True)
    w.add_bool("clip.has_text_encoder", False)
    w.add_bool("clip.has_llava_projector", True)
    w.add_bool("clip.use_gelu", True)
    w.add_uint32("clip.vision.image_size", c.picture)
    w.add_uint32("clip.vision.patch_size", c.patch)
    w.add_uint32("clip.vision.embedding_length", c.vision_width)
    w.add_uint32("clip.vision.feed_forward_length", c.vision_ffn)
    w.add_uint32("clip.vision.projection_dim", c.width)
    # For this projector llama.cpp reads the output of the last block but one.
    w.add_uint32("clip.vision.block_count", c.vision_layers + 1)
    w.add_uint32("clip.vision.attention.head_count", c.vision_heads)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", c.eps)
    w.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    w.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    kernel = state["patch.weight"].view(c.vision_width, 3, c.patch, c.patch)
    _add(w, "v.patch_embd.weight", kernel, "f16")
    _add(w, "v.patch_embd.bias", state["patch.bias"], "f32")
    _add(w, "v.position_embd.weight", state["position"], "f32")
    for i in range(c.vision_layers + 1):
        for ours, theirs in VISION_BLOCK.items():
            for part in ("weight", "bias"):
                tensor = state[f"blocks.{min(i, c.vision_layers - 1)}.{ours}.{part}"]
                if i == c.vision_layers:
                    tensor = torch.zeros_like(tensor)
                _add(w, f"v.blk.{i}.{theirs}.{part}", tensor, "f16")
    for part in ("weight", "bias"):
        _add(w, f"v.post_ln.{part}", state[f"post.{part}"], "f32")
        _add(w, f"mm.0.{part}", state[f"mm0.{part}"], "f16")
        _add(w, f"mm.2.{part}", state[f"mm2.{part}"], "f16")
    _finish(w)


def main() -> None:
    """Export the checkpoint named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "python" / "kvmerge" / "pocket")
    args = parser.parse_args()
    state = torch.load(args.checkpoint, map_location="cpu")["model"]
    c = Config(v.SIZE)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) :]: t for k, t in state.items() if k.startswith(prefix)}

    export_decoder(part("decoder."), c, args.out / "pocket.gguf")
    export_vision(part("vision."), c, args.out / "pocket-mmproj.gguf")
    for name in ("pocket.gguf", "pocket-mmproj.gguf"):
        print(name, (args.out / name).stat().st_size)


if __name__ == "__main__":
    main()
