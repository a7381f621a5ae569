"""The tiny CLIP: contrastive pretraining on scenes and their global captions, which never speak of positions.

A curriculum as in small-scale practice: windows of 4 x 4 patches around an object first, then whole scenes with half
of the patches dropped (Li et al., "FLIP", arXiv 2212.00794), at the end all patches. Pairs whose captions say the same
count as positives (Yang et al., "UniCL", arXiv 2204.03610), since a small world repeats itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel

from ..language import CAPTION_FORMS, listing
from ..scene import Thing
from ..tokenizer import build_tokenizer
from .checkpoint import export
from .loop import Pretraining, go_on
from .optim import autocast, optimizers
from .pool import scene_pool
from .views import kept_half, window
from .vit import keep_patches, new_clip, normalised


@dataclass(frozen=True)
class CLIPBudget:
    """windows, halves: shares of the updates spent on windows and on half scenes; the rest sees all patches."""

    updates: int = 9000
    batch: int = 64
    windows: float = 0.35
    halves: float = 0.5
    muon_lr: float = 0.008
    adam_lr: float = 1e-3
    scenes: int = 40000
    seed: int = 0
    difficulty: str = "easy"


def caption(things: list[Thing], rng: np.random.Generator) -> str:
    if not things:
        return "an image"
    words = listing(things, rng)
    return CAPTION_FORMS[int(rng.integers(len(CAPTION_FORMS)))].replace("{}", words)


class CLIPTrainer(Pretraining[CLIPModel]):
    def __init__(self, budget: CLIPBudget, cache: Path) -> None:
        torch.manual_seed(budget.seed)
        self.budget = budget
        self.tokenizer = build_tokenizer()
        self.tokenizer.padding_side = "right"
        self.model = new_clip(len(self.tokenizer), self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
        self.optimizers = optimizers(self.model, muon_lr=budget.muon_lr, adam_lr=budget.adam_lr)
        self.scenes, self.pixels = scene_pool(cache, budget.scenes, budget.difficulty)

    def batch(self, update: int) -> tuple[Tensor, Tensor | None, dict[str, Tensor], Tensor]:
        """(pixels, kept patches or None, caption ids and mask, (b, b) True where two captions say the same)."""
        b = self.budget
        rng = np.random.Generator(np.random.Philox(key=[b.seed + 101, update]))
        chosen = rng.integers(len(self.scenes), size=b.batch)
        scenes = [self.scenes[i] for i in chosen]
        pixels = normalised(torch.from_numpy(self.pixels[chosen]), "clip")
        pixels = pixels * torch.from_numpy(rng.uniform(0.85, 1.15, (b.batch, 1, 1, 1))).float()
        phase = update / b.updates
        if phase < b.windows:
            views = [window(scene, rng) for scene in scenes]
            kept = torch.from_numpy(np.stack([v[0] for v in views]))
            shown = [v[1] for v in views]
        else:
            shown = [list(scene.things) for scene in scenes]
            half = phase < b.windows + b.halves
            kept = kept_half(b.batch, rng) if half else None
        ids = self.ids_of([caption(things, rng) for things in shown])
        meaning = [frozenset((t.color, t.category) for t in things) for things in shown]
        same = torch.tensor([[a == c for c in meaning] for a in meaning])
        return pixels, kept, ids, same

    def ids_of(self, captions: list[str]) -> dict[str, Tensor]:
        """Ids and mask of captions, each with the model's own end behind it (see `new_clip`)."""
        texts = [text + self.tokenizer.eos_token for text in captions]  # pyright: ignore[reportOperatorIssue]
        found = self.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        ends = found["input_ids"] == self.tokenizer.eos_token_id  # pyright: ignore[reportArgumentType]
        ids = found["input_ids"].masked_fill(ends, len(self.tokenizer))  # pyright: ignore[reportAttributeAccessIssue]
        return {"input_ids": ids, "attention_mask": found["attention_mask"]}

    def loss(self, update: int) -> tuple[Tensor, dict[str, float]]:
        """(symmetric contrastive loss; right: the share of images whose own caption is ranked first)."""
        pixels, kept, text, same = self.batch(update)
        with autocast():
            if kept is None:
                out = self.model(pixel_values=pixels, **text)
            else:
                with keep_patches(self.model.vision_model.embeddings, kept):
                    out = self.model(pixel_values=pixels, **text)
        logits = out.logits_per_image.float()
        target = same.float() / same.sum(1, keepdim=True)
        loss = -(target * logits.log_softmax(1)).sum(1).mean() - (target * logits.T.log_softmax(1)).sum(1).mean()
        right = same.gather(1, logits.argmax(1, keepdim=True)).float().mean().item()
        return loss / 2, {"right": right}

    @torch.no_grad()
    def after(self, update: int) -> None:
        self.model.logit_scale.clamp_(max=np.log(100))


def pretrain_clip(out: Path, budget: CLIPBudget, *, cache: Path, minutes: float | None = None) -> Path:
    """Trains the tiny CLIP into `out`; resumes from what is there. Returns the folder of its vision half."""
    trainer = CLIPTrainer(budget, cache)
    settings = {"objective": "image-text contrastive", **asdict(budget)}
    facts = go_on(trainer, out, "clip", settings, minutes=minutes)
    return export(trainer.model.vision_model, out, {**facts, "views": facts["updates"] * budget.batch})
