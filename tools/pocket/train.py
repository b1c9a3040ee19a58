"""Train the pocket model: ``python tools/pocket/train.py all --work DIR``.

Stages (each resumes from its checkpoint in the work folder):

``pool``    draw the training pictures once
``vision``  the ViT and the projector alone, as a classifier
``copy``    the fresh decoder alone, on copying random strings
``text``    the decoder alone on the tasks, with few tokens made of words in place of the pictures
``align``   the projector, so that a picture token says what the three words of its caption say
``joint``   everything together on the tasks of :mod:`kvmerge.pocket.tasks`
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "python" / "kvmerge"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import vocabulary as v  # noqa: E402
from batches import PICTURE, Batch, Mix, make_batch, picture_index  # noqa: E402
from export import read_vision  # noqa: E402
from model import Config, Decoder, PocketModel, Vision  # noqa: E402
from pocket.render import COLOURS, LETTERS, SHAPES, render_picture  # noqa: E402
from pocket.tasks import MAX_PICTURES, SCANNING_TASKS, TASKS, Picture  # noqa: E402

REPEATS = 40
"""Pictures drawn of every (colour, shape, letter)."""

VOCABULARY = v.SIZE

BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
"""Whether products in bfloat16 are faster than in float32 here; elsewhere they are far slower."""

GATHERING_WEIGHT = 0.15
"""Weight of `Gathering` next to the loss on the answers."""

COPY_GAP = 700
"""Words between the copies, at most: as far as it is across a dozen pictures."""

COPY_EVERY = 12
"""Every so many steps are a batch of copying, lest it be forgotten."""


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
    # The last block comes later, see `align_vision`.
    config = replace(config, vision_layers=config.vision_layers - 1)
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
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
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
            log(
                f"vision {step + 1} right {right} {(time.time() - begun) / (step + 1 - first):.2f}s"
            )
        if (step + 1) % 100 == 0:
            save(path, model=both.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            save(work / "vision-weights.pt", vision=vision.state_dict(), step=step + 1)


def copy_batch(rng: np.random.Generator, tokens: int, gap: int) -> tuple[Tensor, Tensor]:
    """Draw strings of words that occur twice, and mark what can be known.

    Only tokens of the tasks occur: bytes that no prompt contains would dilute the practice.  With
    a `gap`, two of three batches have up to so many other words between the copies, since what is
    learnt at short distances alone does not reach across pictures; and in every other one the
    second copy consists of short pieces in another order, each of which has to be found by its
    first word, as a fact is found by its name.

    Returns
    -------
    copies : Tensor
        (rows, length).
    known : Tensor
        (length,), whether a token follows from those before it.
    """
    words = torch.from_numpy(rng.permutation(v.WORDS))

    def draw(rows: int, length: int, among: Tensor = words) -> Tensor:
        return among[torch.from_numpy(rng.integers(0, len(among), (rows, length)))]

    lead = int(rng.integers(1, 16))
    between = int(rng.integers(0, gap + 1)) if rng.random() < 2 / 3 else 0
    if gap and rng.random() < 0.5:
        piece, pieces = int(rng.integers(2, 6)), int(rng.integers(3, 17))
        length = piece * pieces
    else:
        piece, pieces, length = 0, 0, int(rng.integers(12, 49))
    rows = max(4, tokens // (lead + 2 * length + between))
    first = second = draw(rows, length)
    known = torch.ones(length, dtype=torch.bool)
    known[0] = False
    if piece:
        # No first word of a piece occurs anywhere else.
        names, others = words[: len(words) // 3], words[len(words) // 3 :]
        order = torch.from_numpy(rng.permuted(np.tile(np.arange(len(names)), (rows, 1)), axis=1))
        rest = draw(rows, pieces * (piece - 1), others).view(rows, pieces, piece - 1)
        parts = torch.cat((names[order[:, :pieces, None]], rest), dim=2)
        shuffled = torch.from_numpy(rng.permuted(np.tile(np.arange(pieces), (rows, 1)), axis=1))
        first = parts.flatten(1)
        second = parts.gather(1, shuffled[..., None].expand(-1, -1, piece)).flatten(1)
        known[::piece] = False
        words = others
    copies = torch.cat((draw(rows, lead, words), first, draw(rows, between, words), second), dim=1)
    return copies, torch.cat((torch.zeros(lead + length + between, dtype=torch.bool), known))


def copy_loss(
    decoder: Decoder, rng: np.random.Generator, size: int, gap: int
) -> tuple[Tensor, float]:
    """Return the loss of copying about `size` tokens, and the share of right ones."""
    tokens, known = copy_batch(rng, size, gap)
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        hidden = decoder(decoder.embed(tokens[:, :-1]))
        scores = decoder.logits(hidden[:, known[1:]]).float()
    goal = tokens[:, known]
    right = (scores.argmax(-1) == goal).float().mean().item()
    return F.cross_entropy(scores.flatten(0, 1), goal.flatten()), right


def train_copy(work: Path, steps: int, rows: int, rate: float, threads: int) -> None:
    """Train the fresh decoder to repeat random strings of tokens."""
    torch.set_num_threads(threads)
    torch.manual_seed(2)
    decoder = Decoder(Config(VOCABULARY))
    optimizer = make_optimizer(decoder, rate, decay=0.01)
    path = work / "copy.pt"
    first, gap = 0, 0
    if path.exists():
        state = torch.load(path)
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        first, gap = state["step"], state["gap"]
    rng = np.random.default_rng([2, first])
    begun = time.time()
    recent: list[float] = []
    for step in range(first, steps):
        for group in optimizer.param_groups:
            # Held, not lowered: the step at which copying clicks varies.
            group["lr"] = rate * min(1.0, (step + 1) / 50)
        loss, right = copy_loss(decoder, rng, 60 * rows, gap)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        recent.append(right)
        if (step + 1) % 25:
            continue
        right = sum(recent[-50:]) / len(recent[-50:])
        pace = (time.time() - begun) / (step + 1 - first)
        log(f"copy {step + 1} gap {gap} loss {loss.item():.3f} right {right:.3f} {pace:.2f}s")
        if right > (0.85 if gap < COPY_GAP else 0.95) and len(recent) >= 50:
            done, gap, recent = gap == COPY_GAP, min(COPY_GAP, 2 * gap + 50), []
            if done:
                step = steps - 1
        if (step + 1) % 50 == 0 or step + 1 == steps:
            save(
                path,
                decoder=decoder.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
                gap=gap,
            )
        if step + 1 == steps:
            break


class Tally:
    """Running accuracy of every task, and the task weights that follow from it."""

    def __init__(self) -> None:
        self.right = dict.fromkeys((*TASKS, "gather", "copy"), 0.0)

    def add(self, found: dict[str, list[float]]) -> None:
        """Take in the answers of one batch."""
        for task, values in found.items():
            keep = (0.9 if task in ("gather", "copy") else 0.97) ** len(values)
            self.right[task] = keep * self.right[task] + (1 - keep) * sum(values) / len(values)

    def weights(self) -> list[float]:
        """Ask more often what is not learnt yet."""
        return [0.3 + 1.0 - self.right[t] for t in TASKS]

    def mean(self) -> float:
        """Accuracy over the tasks that decide how many pictures are next; counting comes late."""
        quick = [t for t in TASKS if t not in SCANNING_TASKS]
        return sum(self.right[t] for t in quick) / len(quick)

    def text(self) -> str:
        """One line for the log."""
        return " ".join(f"{t}={100 * r:.0f}" for t, r in self.right.items())


class Gathering(nn.Module):
    """Reads from the number after a picture what it shows, and from a patch of it the number.

    Practice only, not part of the model: whoever looks for a picture by its letter or colour then
    finds its number in the same place.

    Parameters
    ----------
    width : int
        Width of the decoder.
    block : int
        The block behind which the number has to know.
    """

    def __init__(self, width: int, block: int = 2) -> None:
        super().__init__()
        self.block = block
        sizes = (len(COLOURS), len(SHAPES), len(LETTERS))
        self.heads = nn.ModuleList(nn.Linear(width, s) for s in sizes)
        self.number = nn.Linear(width, MAX_PICTURES)

    def forward(self, states: Tensor, batch: Batch) -> tuple[Tensor, float]:
        """Return the loss over all numbers, and the share of right readings."""
        where = torch.tensor(batch.numbers)
        x = states[where[:, 0], where[:, 1]].float()
        x = F.rms_norm(x, x.shape[-1:])
        loss, right = x.new_zeros(()), 0.0
        for i, head in enumerate(self.heads):
            scores = head(x)
            loss = loss + F.cross_entropy(scores, where[:, 2 + i])
            right += (scores.argmax(-1) == where[:, 2 + i]).float().mean().item() / 3
        # Pictures follow one another: the k-th number of a row belongs to its k-th picture.
        first = torch.cumsum(torch.bincount(where[:, 0]), 0).roll(1)
        first[0] = 0
        number = torch.arange(len(where)) - first[where[:, 0]]
        at = where[:, 1] - torch.randint(1, batch.patches + 1, (len(where),))
        shown = batch.ids[where[:, 0], at] == PICTURE
        if shown.any():
            x = states[where[shown, 0], at[shown]].float()
            scores = self.number(F.rms_norm(x, x.shape[-1:]))
            loss = loss + F.cross_entropy(scores, number[shown])
            right = 0.5 * right + 0.5 * (scores.argmax(-1) == number[shown]).float().mean().item()
        return loss, right


def worded_pictures(decoder: Decoder, batch: Batch) -> Tensor:
    """Return picture tokens as `align_vision` will make them: what the three words say together.

    Some say less, and all say it with noise.  A picture has as few tokens as the batch asks for, so
    that most of the practice in finding answers costs little.
    """
    combo = torch.tensor(batch.pictures) // REPEATS
    labels = (
        combo // (len(SHAPES) * len(LETTERS)),
        combo // len(LETTERS) % len(SHAPES),
        combo % len(LETTERS),
    )
    words = decoder.embed.weight
    result = 0.25 * words.detach().std() * torch.randn(len(combo), batch.patches, words.shape[1])
    for group, label in zip((tuple(COLOURS), SHAPES, LETTERS), labels, strict=True):
        heard = (torch.rand(len(combo), batch.patches, 1) < 0.9).float()
        result = result + heard * words[word_rows(group)][label][:, None]
    return result


def forward_batch(
    model: PocketModel, batch: Batch, pixels: Tensor | None, gathering: Gathering | None = None
) -> tuple[Tensor, dict[str, list[float]]]:
    """Return the loss of a batch and, for every answer, whether all its tokens are right.

    Without `pixels` words take the place of the pictures.  With `gathering` its loss comes on top,
    and its share of right readings under ``gather``.
    """
    taps = {} if gathering is None else {gathering.block: torch.empty(0)}
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        x = model.decoder.embed(batch.ids.clamp(min=0))
        features = worded_pictures(model.decoder, batch) if pixels is None else model.vision(pixels)
        features = features.flatten(0, 1).to(x.dtype)
        x = x.masked_scatter((batch.ids == PICTURE)[..., None], features)
        hidden = model.decoder(x[:, :-1], taps=taps)
        marked = batch.weights[:, 1:] > 0
        scores = model.decoder.logits(hidden[marked]).float()
    goal = batch.ids[:, 1:][marked]
    weight = batch.weights[:, 1:][marked]
    loss = (F.cross_entropy(scores, goal, reduction="none") * weight).sum() / weight.sum()
    good = torch.ones_like(batch.ids, dtype=torch.bool)
    good[:, 1:][marked] = scores.argmax(-1) == goal
    found: dict[str, list[float]] = {}
    for task, row, first, last in batch.spans:
        found.setdefault(task, []).append(float(good[row, first:last].all()))
    if gathering is not None:
        extra, right = gathering(taps[gathering.block], batch)
        loss = loss + GATHERING_WEIGHT * extra
        found["gather"] = [right]
    return loss, found


def pick_from_pool(picture: Picture, rng: np.random.Generator) -> int:
    """Return the pool index of a drawing of this picture."""
    return picture_index(picture, REPEATS, rng)


def train_text(work: Path, steps: int, rate: float, threads: int, tokens: int) -> None:
    """Train the decoder on the tasks with words in place of the pictures."""
    torch.set_num_threads(threads)
    torch.manual_seed(3)
    config = Config(VOCABULARY)
    model = PocketModel(config)
    model.decoder.load_state_dict(torch.load(work / "copy.pt")["decoder"])
    gathering = Gathering(config.width)
    parts = nn.ModuleList([model.decoder, gathering])
    optimizer = make_optimizer(parts, rate)
    path = work / "text.pt"
    first = 0
    if path.exists():
        state = torch.load(path)
        model.decoder.load_state_dict(state["decoder"])
        gathering.load_state_dict(state["gathering"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    rng = np.random.default_rng([3, first])
    tally = Tally()
    most, changed = 3, first
    begun = time.time()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 30)
        if step % COPY_EVERY == 0:
            loss, copied = copy_loss(model.decoder, rng, tokens, COPY_GAP)
            tally.add({"copy": [copied]})
        else:
            n = int(rng.integers(min(2, most), most + 1))
            batch = draw_words(rng, n, tokens, tally.weights(), most / 12)
            loss, found = forward_batch(model, batch, None, gathering)
            tally.add(found)
        if tally.mean() > 0.75 and most < 12 and step >= changed + 8:
            most, changed = most + 1, step
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            pace = (time.time() - begun) / (step + 1 - first)
            log(f"text {step + 1} {pace:.2f}s n<={most} loss {loss.item():.3f} {tally.text()}")
        if (step + 1) % 50 == 0 or step + 1 == steps:
            save(
                path,
                decoder=model.decoder.state_dict(),
                gathering=gathering.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
            )


def word_rows(words: Sequence[str]) -> list[int]:
    """Token ids of words as they stand inside a sentence."""
    ids = [v.encode(" " + word) for word in words]
    if any(len(i) != 1 for i in ids):
        raise ValueError("a word is more than one token")
    return [i[0] for i in ids]


def align_vision(work: Path, steps: int, batch: int, rate: float, threads: int) -> None:
    """Let every token of a picture say what its three words say together.

    The decoder has learnt the tasks on words, so it understands such tokens almost at once.  The
    last block of the ViT starts as one that adds the mean of the picture to every token, the last
    matrix of the projector is solved for by least squares, and a few steps of training follow.
    """
    torch.set_num_threads(threads)
    pool = np.load(work / "pool.npy", mmap_mode="r")
    words = torch.load(work / "text.pt")["decoder"]["embed.weight"]
    tables = [words[word_rows(group)] for group in (tuple(COLOURS), SHAPES, LETTERS)]
    config = Config(VOCABULARY)
    vision = Vision(config)
    known = torch.load(work / "vision-weights.pt")["vision"]
    vision.load_state_dict(known, strict=False)
    fresh = f"blocks.{config.vision_layers - 1}.q.weight" not in known
    rng = np.random.default_rng(5)

    def draw(count: int) -> tuple[Tensor, list[Tensor], Tensor]:
        index = np.sort(rng.choice(len(pool), count, replace=False))
        combo = torch.from_numpy(index // REPEATS)
        labels = [
            combo // (len(SHAPES) * len(LETTERS)),
            combo // len(LETTERS) % len(SHAPES),
            combo % len(LETTERS),
        ]
        goal = sum(table[label] for table, label in zip(tables, labels, strict=True))
        return to_pixels(pool[index], rng), labels, goal

    block, one = vision.blocks[-1], torch.eye(config.vision_width)
    with torch.no_grad():
        if fresh:
            for layer in (block.q, block.k, block.v, block.out, block.down):
                layer.weight.zero_()
                layer.bias.zero_()
            block.v.weight.copy_(one)
            block.out.weight.copy_(3.0 * one)
        pixels, labels, goal = draw(3000)
        last, vision.mm2 = vision.mm2, nn.Identity()
        tokens = torch.cat([vision(part) for part in pixels.split(500)]).flatten(0, 1)
        vision.mm2 = last
        centre, goal_centre = tokens.mean(0), goal.mean(0)
        x = tokens - centre
        square = x.t() @ x
        square += 1e-4 * square.diagonal().mean() * torch.eye(len(square))
        wanted = (goal - goal_centre).repeat_interleave(config.patches, 0)
        matrix = torch.linalg.solve(square, x.t() @ wanted)
        last.weight.copy_(matrix.t())
        last.bias.copy_(goal_centre - centre @ matrix)
    del tokens, x, wanted
    optimizer = make_optimizer(vision, rate)
    begun = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, rate, 30)
        pixels, labels, goal = draw(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            features = vision(pixels)
        features = features.float()
        spread = (goal - goal.mean(0)).pow(2).mean()
        loss = (features - goal[:, None]).pow(2).mean() / spread
        loss = loss + (features.mean(1) - goal).pow(2).mean() / spread
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vision.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 25 == 0:
            right = []
            for table, label in zip(tables, labels, strict=True):
                scores = features.detach() @ table.t() - 0.5 * table.pow(2).sum(1)
                right.append(f"{(scores.argmax(-1) == label[:, None]).float().mean():.3f}")
            pace = (time.time() - begun) / (step + 1)
            log(f"align {step + 1} {pace:.2f}s loss {loss.item():.3f} tokens right {right}")
    save(work / "vision-aligned.pt", vision=vision.state_dict())


def draw_batch(
    rng: np.random.Generator,
    n: int,
    tokens: int,
    weights: list[float],
    captions: float,
    clutter: float = 1.0,
) -> Batch:
    """Draw a batch of prompts with ``n`` pictures and about ``tokens`` tokens."""
    rows = max(1, round(tokens / (90 * n + 250)))
    mix = Mix(n, rows, weights, captions, clutter=clutter)
    return make_batch(rng, mix, Config(VOCABULARY).patches, pick_from_pool)


def draw_words(
    rng: np.random.Generator, n: int, tokens: int, weights: list[float], clutter: float
) -> Batch:
    """Draw a batch whose pictures are a few tokens each."""
    patches = int(rng.integers(2, 9))
    rows = max(2, tokens // (n * (patches + 24) + 350))
    return make_batch(rng, Mix(n, rows, weights, 0.0, clutter=clutter), patches, pick_from_pool)


def measure(model: PocketModel, pool: np.ndarray, seed: int) -> str:
    """Return the accuracy with 4, 8 and 12 pictures on a fixed set, as a line for the log."""
    lines = []
    rng = np.random.default_rng([99, seed])
    with torch.no_grad():
        for n in (4, 8, 12):
            found: dict[str, list[float]] = {t: [] for t in TASKS}
            for _ in range(2):
                batch = draw_batch(rng, n, 8000, [1.0] * len(TASKS), 0.0)
                _, part = forward_batch(model, batch, to_pixels(pool[batch.pictures]))
                for task, values in part.items():
                    found[task] += values
            shares = {t: 100 * sum(x) / max(1, len(x)) for t, x in found.items()}
            text = " ".join(f"{t}={s:.0f}" for t, s in shares.items())
            lines.append(f"  n={n} mean {sum(shares.values()) / len(shares):.1f} {text}")
    return "\n".join(lines)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, part: float) -> None:
    """Set the rates for a part of the run, 0 to 1: they fall towards its end."""
    fall = max(0.0, (part - 0.35) / 0.65)
    for group in optimizer.param_groups:
        group["lr"] = (
            rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall))) * group.get("slow", 1.0)
        )


def draw_pictures(rng: np.random.Generator, most: int, part: float) -> int:
    """Draw how many pictures a batch shows, mostly about as many as there may be by now."""
    n = int(rng.integers(max(1, most - 4), most + 1))
    if rng.random() < (0.1 if part < 0.7 else 0.45):
        n = int(rng.integers(1, most + 1))
    if part > 0.5 and rng.random() < 0.08:
        n = int(rng.integers(13, 25))
    return n


def train_joint(
    work: Path,
    steps: int,
    rate: float,
    threads: int,
    tokens: int,
    minutes: float,
    vision_rate: float = 0.1,
) -> None:
    """Train everything on the tasks with pictures; stop after ``minutes`` at the latest."""
    torch.set_num_threads(threads)
    torch.manual_seed(4)
    pool = np.load(work / "pool.npy")
    model = PocketModel(Config(VOCABULARY))
    decoder_groups = make_optimizer(model.decoder, rate).param_groups
    vision_groups = make_optimizer(model.vision, rate).param_groups
    for group in vision_groups:
        # A high rate makes the ViT forget the letters before the decoder reads them.
        group["slow"] = vision_rate
    gathering = Gathering(model.c.width)
    gathering_groups = make_optimizer(gathering, rate).param_groups
    groups = [*decoder_groups, *vision_groups, *gathering_groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    learnt = {"model": model, "gathering": gathering, "optimizer": optimizer}
    path = work / "joint.pt"
    first, spent, most, changed = 0, 0.0, 6, 0
    tally, words_only = Tally(), Tally()
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        gathering.load_state_dict(state["gathering"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["spent"]
        tally.right.update({t: r for t, r in state["tally"].items() if t in tally.right})
        most = state["most"]
        changed = first
    else:
        state = torch.load(work / "text.pt")
        model.decoder.load_state_dict(state["decoder"])
        gathering.load_state_dict(state["gathering"])
        model.vision.load_state_dict(torch.load(work / "vision-aligned.pt")["vision"])
    rng = np.random.default_rng([4, first])
    begun = time.time()
    for step in range(first, steps):
        # The rate follows the time, so that the run ends when it has to.
        clock = spent + time.time() - begun
        if clock > minutes * 60:
            break
        part = max(step / steps, clock / (minutes * 60))
        model.vision.requires_grad_(part > 0.3)
        set_rate(optimizer, rate * min(1.0, (step - first + 1) / 50), part)
        if tally.mean() > 0.75 and most < 12 and step >= changed + 15:
            most, changed = most + 1, step
        most = max(most, min(12, int(6 + 18 * part)))
        n = draw_pictures(rng, most, part)
        kind = rng.random()
        if step % COPY_EVERY == 0 and part < 0.85:
            loss, copied = copy_loss(model.decoder, rng, tokens, COPY_GAP)
            tally.add({"copy": [copied]})
        elif kind < 0.3 * (1 - part):
            batch = draw_words(rng, n, tokens, words_only.weights(), most / 12)
            loss, found = forward_batch(model, batch, None, gathering)
            words_only.add(found)
        else:
            batch = draw_batch(rng, n, tokens, tally.weights(), 0.05, most / 12)
            pixels = to_pixels(pool[batch.pictures], rng)
            loss, found = forward_batch(model, batch, pixels, gathering)
            tally.add(found)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % 20 == 0:
            pace = f"{(time.time() - begun) / (done - first):.2f}s {part:.2f}"
            log(f"joint {done} {pace} n<={most} loss {loss.item():.3f} {tally.text()}")
            if part < 0.5 and done % 100 == 0:
                log(f"words only: {words_only.text()}")
        if done % 200 == 0:
            log(measure(model, pool, 0))
        if done % 50 == 0:
            save(
                path,
                **{name: each.state_dict() for name, each in learnt.items()},
                step=done,
                spent=spent + time.time() - begun,
                tally=tally.right,
                most=most,
            )
    save(
        path,
        **{name: each.state_dict() for name, each in learnt.items()},
        step=steps,
        spent=spent + time.time() - begun,
        tally=tally.right,
        most=most,
    )
    log(measure(model, pool, 1))


def main() -> None:
    """Run the stages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "stage", choices=("pool", "vision", "copy", "text", "align", "joint", "all")
    )
    parser.add_argument("--work", type=Path, default=Path("pocket-work"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--vision-from", type=Path, help="exported vision part to begin with, in place of a stage"
    )
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--vision-batch", type=int, default=256)
    parser.add_argument("--vision-rate", type=float, default=1.5e-3)
    parser.add_argument("--copy-steps", type=int, default=1500)
    parser.add_argument("--copy-rows", type=int, default=48)
    parser.add_argument("--copy-rate", type=float, default=1e-3)
    parser.add_argument("--text-steps", type=int, default=1600)
    parser.add_argument("--text-rate", type=float, default=8e-4)
    parser.add_argument("--align-steps", type=int, default=130)
    parser.add_argument("--joint-steps", type=int, default=2400)
    parser.add_argument("--joint-rate", type=float, default=8e-4)
    parser.add_argument("--joint-minutes", type=float, default=66.0)
    parser.add_argument("--tokens", type=int, default=7000)
    args = parser.parse_args()
    wanted = (
        ("pool", "vision", "copy", "text", "align", "joint")
        if args.stage == "all"
        else (args.stage,)
    )
    args.work.mkdir(parents=True, exist_ok=True)
    if "pool" in wanted:
        draw_pool(args.work)
    if args.vision_from is not None and not (args.work / "vision-weights.pt").exists():
        vision = read_vision(args.vision_from, Config(VOCABULARY))
        save(args.work / "vision-weights.pt", vision=vision)
    elif "vision" in wanted:
        train_vision(
            args.work, args.vision_steps, args.vision_batch, args.vision_rate, args.threads
        )
    if "copy" in wanted:
        train_copy(args.work, args.copy_steps, args.copy_rows, args.copy_rate, args.threads)
    if "text" in wanted:
        train_text(args.work, args.text_steps, args.text_rate, args.threads, args.tokens // 2)
    if "align" in wanted:
        align_vision(args.work, args.align_steps, args.vision_batch, 4e-4, args.threads)
    if "joint" in wanted:
        train_joint(
            args.work,
            args.joint_steps,
            args.joint_rate,
            args.threads,
            args.tokens,
            args.joint_minutes,
        )


if __name__ == "__main__":
    main()
