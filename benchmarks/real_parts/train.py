"""Train what joins the album model's parts: a projector, and an adapter of the language model.

First the projector, on its own: each token of a picture is to look like the embedding of the word
that is printed there, or of the photograph's name.  Then, with the projector as it is, the adapter,
through the language model, on answers about albums: short ones first.  Training both through the
language model makes the projector forget the words.  On two cores half an hour is enough.

    pip install "kvmerge[album]" torch
    cd benchmarks && python -m real_parts.train FOLDER_OF_PHOTOGRAPHS --minutes 30
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor, nn

from kvmerge import Llama

from . import parts
from .album import Album, Picture, facts, page, photographs, vocabulary
from .build import WEIGHTS
from .encoder import TOKENS, WIDTH, Features
from .language_model import LanguageModel

HELD_BACK = 100
"""Pages that training does not see."""
VARIANTS = 3
"""How often each photograph is there: as it is, and cut, mirrored, brighter or darker."""
QUESTIONS = 6
"""Asked at most about one album, one after the other."""
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n"
)
NEXT, ASKED, END = "\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"


class Projector(nn.Module):
    """LayerNorm and two linear layers, as in InternVL."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * WIDTH)
        self.a = nn.Linear(4 * WIDTH, 768)
        self.b = nn.Linear(768, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings, [..., width]."""
        projected: Tensor = self.b(F.gelu(self.a(self.norm(x)), approximate="tanh"))
        return projected


@dataclass(frozen=True)
class Seen:
    """Pictures, and what the encoder says of each, [tokens, 4 x width of the encoder]."""

    pages: list[Picture]
    photographs: list[Picture]
    of_pages: Tensor
    of_photographs: Tensor


def look(photos: dict[str, Path], words: frozenset[str], n_pages: int, seed: int) -> Seen:
    """Draw pages, open photographs, and encode all of them once."""
    rng = np.random.default_rng(seed)
    features = Features(parts.fetch(parts.ENCODER))

    def encoded(pictures: list[Picture]) -> Tensor:
        images = [picture.image for picture in pictures]
        batches = [features(images[i : i + 16]) for i in range(0, len(images), 16)]
        return torch.tensor(np.concatenate(batches)).half()

    pages = [page(rng, words) for _ in range(n_pages)]
    shown = []
    for name, file in photos.items():
        image = Image.open(file).convert("RGB")
        shown += [Picture(image, name)]
        shown += [Picture(varied(image, rng), name) for _ in range(VARIANTS - 1)]
    return Seen(pages, shown, encoded(pages), encoded(shown))


def varied(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a photograph cut, perhaps mirrored, and brighter or darker."""
    width, height = image.size
    cut = rng.uniform(0.88, 1)
    left, top = (int(rng.uniform(0, (1 - cut) * side)) for side in (width, height))
    image = image.crop((left, top, left + int(cut * width), top + int(cut * height)))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.85, 1.15)))


def train_projector(seen: Seen, embeddings: Tensor, ids: dict[str, int], steps: int) -> Projector:
    """Teach a projector to give each token of a picture the embedding of its word.

    Parameters
    ----------
    seen : Seen
        Pictures.
    embeddings : Tensor
        Of the language model, [vocabulary, width].
    ids : dict
        Token of each word; the empty word is of tokens in which nothing is printed.
    steps : int
        Of 56 pages and 12 photographs.
    """
    projector = Projector(embeddings.shape[1])
    tokens = sorted(set(ids.values()))
    index = {word: tokens.index(token) for word, token in ids.items()}
    goals = F.normalize(embeddings[tokens], dim=-1)
    length = embeddings[tokens].norm(dim=-1).mean()
    printed = torch.tensor([[index[word] for word in each.printed] for each in seen.pages])
    names = torch.tensor([index[each.name] for each in seen.photographs])
    weight = torch.ones(len(tokens))
    weight[index[""]] = 0.2  # most of a page is blank
    optimizer = torch.optim.AdamW(projector.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps, pct_start=0.05)
    for step in range(1, steps + 1):
        i = torch.randint(0, len(printed) - HELD_BACK, (56,))
        j = torch.randint(0, len(names), (12,))
        shown = projector(torch.cat([seen.of_pages[i], seen.of_photographs[j]]).float())
        wanted = torch.cat([printed[i], names[j][:, None].expand(-1, TOKENS)])
        likeness = F.normalize(shown, dim=-1) @ goals.T
        loss = F.cross_entropy(16 * likeness.flatten(0, 1), wanted.flatten(), weight=weight)
        loss = loss + 0.1 * ((shown.norm(dim=-1) / length - 1) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                shown = F.normalize(projector(seen.of_pages[-HELD_BACK:].float()), dim=-1)
            wanted = printed[-HELD_BACK:]
            right = ((shown @ goals.T).argmax(-1) == wanted)[wanted != index[""]]
            print(f"projector, step {step}: {right.float().mean():.1%} of new words", flush=True)
    return projector.requires_grad_(False)


class Conversations:
    """Albums with questions and answers, as tokens and embeddings.

    Parameters
    ----------
    seen : Seen
        What albums are made of.
    tokenizer : Llama
        Gives the tokens of a text.
    """

    def __init__(self, seen: Seen, tokenizer: Llama) -> None:
        self.seen, self._tokenizer = seen, tokenizer

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return self._tokenizer.tokenize(text.encode(), add_bos=False, special=True)

    def draw(
        self, rng: np.random.Generator, n: int
    ) -> tuple[list[int], npt.NDArray[np.bool_], list[tuple[int, Tensor]]]:
        """Return tokens, which of them are answers, and where pictures stand, with features."""
        album, features = self._album(rng, n)
        ids, pictures = self.tokens(SYSTEM), []
        for part in album.content():
            if part["type"] == "text":
                ids += self.tokens(part["text"])
                continue
            ids += self.tokens("<img>")
            pictures.append((len(ids), features[len(pictures)]))
            ids += [0] * TOKENS + self.tokens("</img>")
        answers = []
        n_lines = QUESTIONS if n == 1 else 3
        for turn, (_, question, answer) in enumerate(album.questions(rng, n_lines)[:QUESTIONS]):
            ids += self.tokens((NEXT if turn else "") + question + ASKED)
            answers += range(len(ids), len(ids) + len(self.tokens(answer + END)))
            ids += self.tokens(answer + END)
        return ids, np.isin(np.arange(len(ids)), answers), pictures

    def _album(self, rng: np.random.Generator, n: int) -> tuple[Album, list[Tensor]]:
        pictures, features = [], []
        names = rng.choice(len(self.seen.photographs) // VARIANTS, n, replace=False)
        for name in names:
            if rng.random() < 0.6:
                i = int(rng.integers(len(self.seen.pages) - HELD_BACK))
                pictures.append(self.seen.pages[i])
                features.append(self.seen.of_pages[i])
            else:
                i = int(name) * VARIANTS + int(rng.integers(VARIANTS))
                pictures.append(self.seen.photographs[i])
                features.append(self.seen.of_photographs[i])
        return Album(tuple(pictures), facts(rng, n)), features


def train_adapter(
    model: LanguageModel, projector: Projector, talk: Conversations, minutes: float, seed: int
) -> None:
    """Teach the language model to answer about pictures that the projector has turned to words."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.adapter.parameters(), weight_decay=0.01)
    start, losses = time.monotonic(), []
    while (part := (time.monotonic() - start) / 60 / minutes) < 1:
        n = int(rng.choice([1, 2, 3, 4, 6, 8] if part > 0.4 else [1, 1, 2]))
        drawn = [talk.draw(rng, n) for _ in range(max(1, 6 // n))]
        ids = torch.zeros(len(drawn), max(len(each[0]) for each in drawn), dtype=torch.long)
        is_answer = torch.zeros_like(ids, dtype=torch.bool)
        for row, (tokens, answer, _) in enumerate(drawn):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            is_answer[row, : len(tokens)] = torch.tensor(answer)
        x = model.embeddings[ids]
        for row, (_, _, pictures) in enumerate(drawn):
            for place, features in pictures:
                x[row, place : place + TOKENS] = projector(features.float())
        logits = model(x)[:, :-1][is_answer[:, 1:]] @ model.embeddings.T
        loss = F.cross_entropy(logits, ids[is_answer])
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (len(losses) + 1) / 20) * max(0.03, 1 - part)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.adapter.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 20 == 0:
            print(f"adapter, step {len(losses)}: loss {np.mean(losses[-20:]):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photographs", type=Path, help="folder of .jpg files")
    parser.add_argument("--pages", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=900, help="of the projector")
    parser.add_argument("--minutes", type=float, default=30, help="of the adapter")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    file = parts.fetch(parts.SMOLLM2)
    photos, words = photographs(args.photographs, file), vocabulary(file)
    seen = look(photos, words, args.pages, args.seed)
    model = LanguageModel(file)
    talk = Conversations(seen, Llama(file, vocab_only=True, verbose=False))
    known = {word for each in seen.pages for word in each.printed} | set(photos)
    ids = {word: talk.tokens(f" {word}" if word else "\n")[-1] for word in known}
    projector = train_projector(seen, model.embeddings, ids, args.steps)
    train_adapter(model, projector, talk, args.minutes, args.seed)
    weights = {name: value.numpy() for name, value in projector.state_dict().items()}
    weights |= {
        name.replace(":", "."): value.detach().numpy() for name, value in model.adapter.items()
    }
    half = {name: value.astype(np.float16) for name, value in weights.items()}
    np.savez_compressed(args.out, **half)


if __name__ == "__main__":
    main()
