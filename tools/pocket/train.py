"""Train the pocket model: ``python tools/pocket/train.py all --work DIR``.

Stages (each resumes from its checkpoint in the work folder):

``pool``    draw the training pictures once
``vision``  the ViT and the projector alone, as a classifier
``copy``    the fresh decoder alone, on copying random strings
``joint``   everything together on the tasks of :mod:`kvmerge.pocket.tasks`
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from model import Config, Decoder, Vision  # noqa: E402

from kvmerge.pocket.render import COLOURS, LETTERS, SHAPES, render_picture  # noqa: E402

REPEATS = 40
"""Pictures drawn of every (colour, shape, letter)."""

VOCABULARY = 640


def log(message: str) -> None:
    """Print a line with the time of day."""
    print(time.strftime("%H:%M:%S"), message, flush=True)


def draw_part(job: tuple[int, str]) -> np.ndarray:
    """Draw all letters and repeats of one colour."""
    index, colour = job
    rng = np.random.default_rng([20_000_003, index])
    return np.stack(
        [
            np.asarray(render_picture(colour, shape, letter, rng))
            for shape in SHAPES
            for letter in LETTERS
            for _ in range(REPEATS)
        ]
    )


def draw_pool(work: Path) -> None:
    """Draw the pool of training pictures and save it."""
    path = work / "pool.npy"
    if path.exists():
        return
    with Pool(2) as workers:
        parts = workers.map(draw_part, list(enumerate(COLOURS)), chunksize=1)
    np.save(path, np.concatenate(parts))
    log(f"drew {sum(len(p) for p in parts)} pictures")


def to_pixels(pictures: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
    """Scale pictures (uint8) to [-1, 1]; with a generator, vary them a little."""
    x = torch.from_numpy(pictures).float().div_(127.5).sub_(1.0)
    if rng is not None:
        n = len(pictures)
        gain = torch.from_numpy(rng.uniform(0.93, 1.07, (n, 1, 1, 1)).astype(np.float32))
        shift = torch.from_numpy(rng.uniform(-0.05, 0.05, (n, 1, 1, 3)).astype(np.float32))
        x = x * gain + shift + torch.randn_like(x) * 0.02
    return x


def rate_at(step: int, steps: int, peak: float, warm: int = 50) -> float:
    """Cosine learning rate with a linear start."""
    if step < warm:
        return peak * (step + 1) / warm
    part = (step - warm) / max(1, steps - warm)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


def make_optimizer(model: nn.Module, rate: float, decay: float = 0.05) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    big = [p for p in model.parameters() if p.dim() >= 2]
    small = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": big, "weight_decay": decay}, {"params": small, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def save(path: Path, **parts: object) -> None:
    """Write a checkpoint so that an interrupted write leaves the old one."""
    torch.save(parts, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train_vision(work: Path, steps: int, batch: int, rate: float, threads: int) -> None:
    """Train the ViT and the projector to name colour, shape and letter."""
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    pool = np.load(work / "pool.npy", mmap_mode="r")
    config = Config(VOCABULARY)
    vision = Vision(config)
    sizes = (len(COLOURS), len(SHAPES), len(LETTERS))
    heads = nn.ModuleList(nn.Linear(config.width, s) for s in sizes)
    both = nn.ModuleList([vision, heads])
    optimizer = make_optimizer(both, rate)
    path = work / "vision.pt"
    first = 0
    if path.exists():
        state = torch.load(path)
        both.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    rng = np.random.default_rng([1, first])
    begun = time.time()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, rate)
        index = np.sort(rng.integers(0, len(pool), batch))
        combo = torch.from_numpy(index // REPEATS)
        pixels = to_pixels(pool[index], rng)
        labels = (
            combo // (sizes[1] * sizes[2]),
            combo // sizes[2] % sizes[1],
            combo % sizes[2],
        )
        with torch.autocast("cpu", torch.bfloat16):
            pooled = vision(pixels).mean(1)
            scores = [head(pooled).float() for head in heads]
        losses = [F.cross_entropy(s, y) for s, y in zip(scores, labels, strict=True)]
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 25 == 0:
            right = [
                f"{(s.argmax(1) == y).float().mean():.3f}"
                for s, y in zip(scores, labels, strict=True)
            ]
            log(f"vision {step + 1} right {right} {(time.time() - begun) / (step + 1 - first):.2f}s")
        if (step + 1) % 100 == 0:
            save(path, model=both.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            save(work / "vision-weights.pt", vision=vision.state_dict(), step=step + 1)


def train_copy(work: Path, steps: int, rows: int, rate: float, threads: int) -> None:
    """Train the fresh decoder to repeat random strings of tokens."""
    torch.set_num_threads(threads)
    torch.manual_seed(2)
    decoder = Decoder(Config(VOCABULARY))
    optimizer = make_optimizer(decoder, rate, decay=0.01)
    path = work / "copy.pt"
    first = 0
    if path.exists():
        state = torch.load(path)
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    rng = np.random.default_rng([2, first])
    begun = time.time()
    recent: list[float] = []
    for step in range(first, steps):
        for group in optimizer.param_groups:
            # Held, not lowered: the step at which copying clicks varies.
            group["lr"] = rate * min(1.0, (step + 1) / 50)
        length = int(rng.integers(8, 40))
        strings = torch.from_numpy(rng.integers(0, VOCABULARY, (rows, length)))
        lead = torch.from_numpy(rng.integers(0, VOCABULARY, (rows, int(rng.integers(1, 16)))))
        tokens = torch.cat((lead, strings, strings), dim=1)
        at = lead.shape[1] + length
        with torch.autocast("cpu", torch.bfloat16):
            hidden = decoder(decoder.embed(tokens[:, :-1]))
            scores = decoder.logits(hidden[:, at:]).float()
        goal = tokens[:, at + 1 :]
        loss = F.cross_entropy(scores.flatten(0, 1), goal.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        recent.append((scores.argmax(-1) == goal).float().mean().item())
        if (step + 1) % 25 == 0:
            right = sum(recent[-25:]) / 25
            pace = (time.time() - begun) / (step + 1 - first)
            log(f"copy {step + 1} loss {loss.item():.3f} right {right:.3f} {pace:.2f}s")
            if (step + 1) % 50 == 0:
                save(
                    path,
                    decoder=decoder.state_dict(),
                    optimizer=optimizer.state_dict(),
                    step=step + 1,
                )
            if right > 0.985:
                save(
                    path,
                    decoder=decoder.state_dict(),
                    optimizer=optimizer.state_dict(),
                    step=steps,
                )
                return


def main() -> None:
    """Run the stages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("pool", "vision", "copy"))
    parser.add_argument("--work", type=Path, default=Path("pocket-work"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--vision-batch", type=int, default=256)
    parser.add_argument("--vision-rate", type=float, default=1.5e-3)
    parser.add_argument("--copy-steps", type=int, default=3000)
    parser.add_argument("--copy-rows", type=int, default=48)
    parser.add_argument("--copy-rate", type=float, default=1e-3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "pool":
        draw_pool(args.work)
    if args.stage == "vision":
        train_vision(
            args.work, args.vision_steps, args.vision_batch, args.vision_rate, args.threads
        )
    if args.stage == "copy":
        train_copy(args.work, args.copy_steps, args.copy_rows, args.copy_rate, args.threads)


if __name__ == "__main__":
    main()
