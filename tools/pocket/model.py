"""The pocket model in PyTorch: a small ViT, a two-layer projector and a Llama-type decoder.

The arithmetic follows what llama.cpp does for the projector type ``mlp`` and the architecture
``llama``: tanh GELU, interleaved rotary embedding, RMSNorm, SwiGLU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Config", "Decoder", "PocketModel", "Vision"]


@dataclass(frozen=True)
class Config:
    """Sizes of the model.

    Parameters
    ----------
    vocabulary : int
        Number of tokens.
    rotary : int
        Channels of a head that the rotary embedding turns.  The others compare what tokens are
        about at any distance: what is found two pictures back is found twenty back.
    """

    vocabulary: int
    picture: int = 64
    patch: int = 8
    vision_width: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_ffn: int = 512
    width: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    ffn: int = 640
    rotary: int = 32
    rope_base: float = 10000.0
    eps: float = 1e-5

    @property
    def patches(self) -> int:
        """Number of tokens of one picture."""
        return (self.picture // self.patch) ** 2

    def rope_rates(self) -> Tensor:
        """Radians per position of every pair of channels that is turned."""
        half = self.rotary // 2
        return self.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)


class VisionBlock(nn.Module):
    """One pre-norm transformer block of the ViT."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        w = c.vision_width
        self.heads = c.vision_heads
        self.ln1 = nn.LayerNorm(w, eps=c.eps)
        self.q = nn.Linear(w, w)
        self.k = nn.Linear(w, w)
        self.v = nn.Linear(w, w)
        self.out = nn.Linear(w, w)
        self.ln2 = nn.LayerNorm(w, eps=c.eps)
        self.up = nn.Linear(w, c.vision_ffn)
        self.down = nn.Linear(c.vision_ffn, w)

    def forward(self, x: Tensor) -> Tensor:
        n, t, w = x.shape
        y = self.ln1(x)
        q, k, v = (
            m(y).view(n, t, self.heads, w // self.heads).transpose(1, 2)
            for m in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, w))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class Vision(nn.Module):
    """ViT and projector: pictures to decoder inputs."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.patch = nn.Linear(3 * c.patch * c.patch, c.vision_width)
        self.position = nn.Parameter(torch.randn(c.patches, c.vision_width) * 0.02)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.vision_layers))
        self.post = nn.LayerNorm(c.vision_width, eps=c.eps)
        self.mm0 = nn.Linear(c.vision_width, c.width)
        self.mm2 = nn.Linear(c.width, c.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (n, size, size, 3), scaled to [-1, 1], to (n, patches, width)."""
        n, p, g = pixels.shape[0], self.c.patch, self.c.picture // self.c.patch
        # The order inside a patch is channel, row, column as in a convolution kernel.
        x = pixels.view(n, g, p, g, p, 3).permute(0, 1, 3, 5, 2, 4).reshape(n, g * g, 3 * p * p)
        x = self.patch(x) + self.position
        for block in self.blocks:
            x = block(x)
        x = self.post(x)
        return self.mm2(F.gelu(self.mm0(x), approximate="tanh"))


class RMSNorm(nn.Module):
    """Root-mean-square norm; under autocast the result is bfloat16."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        y = x * (size.square() / x.shape[-1] + self.eps).rsqrt()
        if torch.is_autocast_enabled("cpu"):
            return y.bfloat16() * self.weight.bfloat16()
        return y * self.weight


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Interleaved rotary embedding: neighbouring channels are one complex number."""
    first, rest = x.split((2 * turn.shape[-1], x.shape[-1] - 2 * turn.shape[-1]), dim=-1)
    pairs = torch.view_as_complex(first.float().unflatten(-1, (-1, 2)))
    return torch.cat((torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype), rest), dim=-1)


class DecoderBlock(nn.Module):
    """One Llama block."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.norm1 = RMSNorm(c.width, c.eps)
        self.q = nn.Linear(c.width, c.heads * c.head_size, bias=False)
        self.k = nn.Linear(c.width, c.kv_heads * c.head_size, bias=False)
        self.v = nn.Linear(c.width, c.kv_heads * c.head_size, bias=False)
        self.out = nn.Linear(c.heads * c.head_size, c.width, bias=False)
        self.norm2 = RMSNorm(c.width, c.eps)
        self.gate = nn.Linear(c.width, c.ffn, bias=False)
        self.up = nn.Linear(c.width, c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.width, bias=False)

    def forward(
        self,
        x: Tensor,
        turn: Tensor,
        cache: list[tuple[Tensor, Tensor]] | None = None,
        index: int = 0,
    ) -> Tensor:
        c = self.c
        n, t, _ = x.shape
        y = self.norm1(x)
        q = _rotate(self.q(y).view(n, t, c.heads, c.head_size), turn).transpose(1, 2)
        k = _rotate(self.k(y).view(n, t, c.kv_heads, c.head_size), turn).transpose(1, 2)
        v = self.v(y).view(n, t, c.kv_heads, c.head_size).transpose(1, 2)
        causal = True
        if cache is not None:
            if len(cache) > index:
                k = torch.cat((cache[index][0], k), dim=2)
                v = torch.cat((cache[index][1], v), dim=2)
                cache[index] = (k, v)
                causal = t > 1
            else:
                cache.append((k, v))
        group = c.heads // c.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        if cache is not None and causal and k.shape[2] != t:
            past = k.shape[2] - t
            mask = torch.ones(t, k.shape[2], dtype=torch.bool).tril(past)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Llama-type decoder whose output matrix is the token embedding."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.vocabulary, c.width)
        self.blocks = nn.ModuleList(DecoderBlock(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.eps)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 if "embed" in name else p.shape[1] ** -0.5
                if name.endswith(("out.weight", "down.weight")):
                    std /= 4 * (2 * c.layers) ** 0.5
                nn.init.normal_(p, std=std)
        nn.init.normal_(self.embed.weight, std=0.06)
        self._begin_copying()

    @torch.no_grad()
    def _begin_copying(self) -> None:
        """Begin with what copying needs: heads that look one token back, and one that follows them.

        A head of the first block tells every token what the token before it is.  A head of the
        second looks for the token that comes after an earlier copy of the present one, and repeats
        it.  Left to chance, the pair takes thousands of steps to form; training refines it.
        """
        c, first, second = self.c, self.blocks[0], self.blocks[1]
        size, half = c.head_size, c.head_size // 2
        one = torch.eye(size)
        # One channel is the same in all tokens, so that a head can attend by place alone; others
        # are free for what the first block says of the token before.
        shared, before = 2 * size, slice(size, 2 * size)
        self.embed.weight[:, before] = 0.0
        self.embed.weight[:, shared] = 0.6
        first.k.weight[:size] *= 0.1
        first.k.weight[0:6:2, shared] = 0.6
        for head, back in enumerate((1, 2)):
            rows = slice(head * size, (head + 1) * size)
            first.q.weight[rows] *= 0.1
            for pair, rate in enumerate(c.rope_rates()[:3].tolist()):
                first.q.weight[head * size + 2 * pair, shared] = 3.0 * math.cos(back * rate)
                first.q.weight[head * size + 2 * pair + 1, shared] = -3.0 * math.sin(back * rate)
        first.v.weight[:size] *= 0.1
        first.v.weight[:size, :size] += one
        first.out.weight[:, :size] *= 0.1
        first.out.weight[before, :size] += 0.06 * one
        second.q.weight[:size] *= 0.1
        second.k.weight[:size] *= 0.1
        second.q.weight[half:size, :half] += 3.0 * one[:half, :half]
        second.k.weight[half:size, size : size + half] += 3.0 * one[:half, :half]
        second.v.weight[:size] *= 0.1
        second.v.weight[:size, :size] += one
        second.out.weight[:, :size] *= 0.1
        second.out.weight[:size, :size] += 0.5 * one

    def forward(
        self,
        x: Tensor,
        cache: list[tuple[Tensor, Tensor]] | None = None,
        start: int = 0,
        taps: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Map decoder inputs (n, t, width) to normed hidden states of the same shape.

        ``taps`` takes up what leaves the blocks that are its keys.
        """
        places = torch.arange(start, start + x.shape[1], dtype=torch.float32)
        angles = places[:, None] * self.c.rope_rates()
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        for i, block in enumerate(self.blocks):
            x = block(x, turn, cache, i)
            if taps is not None and i in taps:
                taps[i] = x
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary for hidden states."""
        return hidden @ self.embed.weight.t()


class PocketModel(nn.Module):
    """Vision part and decoder together."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.vision = Vision(c)
        self.decoder = Decoder(c)
