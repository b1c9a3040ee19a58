"""SmolLM2 in PyTorch, from its GGUF, frozen but for an adapter of the attention's matrices."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import torch
import torch.nn.functional as F
from gguf.quants import dequantize
from torch import Tensor, nn

from .build import ADAPTED, SCALE

RANK = 8
HEADS, HEADS_KV, HEAD_SIZE = 9, 3, 64
ROPE_BASE, EPSILON = 100_000.0, 1e-5


class LanguageModel(nn.Module):
    """What gives the hidden states of embeddings.

    Parameters
    ----------
    file : Path
        The GGUF.  Its query and key rows are interleaved for RoPE, as llama.cpp wants them.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        reader = gguf.GGUFReader(file)
        self.frozen = {
            tensor.name.removesuffix(".weight"): torch.tensor(
                dequantize(tensor.data, tensor.tensor_type)
            ).reshape(*map(int, reversed(tensor.shape)))
            for tensor in reader.tensors
        }
        self.layers = int(reader.fields["llama.block_count"].contents())
        self.embeddings = self.frozen["token_embd"]
        self.adapter = nn.ParameterDict()
        for layer in range(self.layers):
            for name in ADAPTED:
                rows, columns = self.frozen[f"blk.{layer}.{name}"].shape
                first = torch.randn(RANK, columns) / math.sqrt(columns)
                self.adapter[f"blk:{layer}:{name}:lora_a"] = nn.Parameter(first)
                self.adapter[f"blk:{layer}:{name}:lora_b"] = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden states of the last layer, [batch, n, width]; padding is at the end."""
        batch, n, width = x.shape
        frequency = ROPE_BASE ** -(torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
        angle = torch.arange(n)[:, None] * frequency
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]

        def turned(rows: Tensor) -> Tensor:
            pairs = torch.view_as_complex(rows.view(batch, n, -1, HEAD_SIZE // 2, 2))
            return torch.view_as_real(pairs * turn).reshape(batch, n, -1, HEAD_SIZE).transpose(1, 2)

        for layer in range(self.layers):
            h = self._norm(x, f"blk.{layer}.attn_norm")
            q = turned(self._adapted(h, layer, "attn_q"))
            k = turned(self._adapted(h, layer, "attn_k"))
            v = self._adapted(h, layer, "attn_v").view(batch, n, HEADS_KV, HEAD_SIZE)
            k, v = (each.repeat_interleave(HEADS // HEADS_KV, 1) for each in (k, v.transpose(1, 2)))
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self._adapted(seen.transpose(1, 2).reshape(batch, n, width), layer, ADAPTED[3])
            h = self._norm(x, f"blk.{layer}.ffn_norm")
            gate = F.silu(h @ self.frozen[f"blk.{layer}.ffn_gate"].T)
            up = h @ self.frozen[f"blk.{layer}.ffn_up"].T
            x = x + (gate * up) @ self.frozen[f"blk.{layer}.ffn_down"].T
        return self._norm(x, "output_norm")

    def _adapted(self, x: Tensor, layer: int, name: str) -> Tensor:
        first, second = (self.adapter[f"blk:{layer}:{name}:lora_{part}"] for part in "ab")
        return x @ self.frozen[f"blk.{layer}.{name}"].T + (x @ first.T) @ second.T * SCALE

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)
        return x * scale * self.frozen[name]
