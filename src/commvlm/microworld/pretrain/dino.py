"""The tiny DINOv2: self-distillation without labels.

The losses of DINOv2 (Oquab et al., arXiv 2304.07193): the teacher's class token over two global views is predicted by the
student from the other one and from smaller crops (DINO, multi-crop), the teacher's patch tokens are predicted where the
student's are masked (iBOT), both centred by Sinkhorn-Knopp; KoLeo spreads the class tokens. The teacher is the student's
moving average and is what is exported.

What a small world needs besides (docs/microworld.md tells what happens without):
- Views come from two drawings of the same objects, whose background, clutter and noise differ: with one drawing,
  backgrounds alone tell scenes apart. Colours are exchanged or greyed often, else they alone tell objects apart.
- Windows around objects first, whole scenes then. Boxes only say where to look, as a curated set of photos of objects does.
- Small batches: a queue of past scores joins Sinkhorn-Knopp (as in SwAV, arXiv 2006.09882), and the heads have batch norms,
  without which all images look alike to them for hundreds of updates.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..scene import SIDE
from .checkpoint import export
from .loop import Pretraining, go_on
from .optim import autocast, optimizers
from .pool import scene_pool
from .views import WINDOW, crops, placed, recolored, squares
from .vit import GRID, keep_patches, new_dinov2, normalised


@dataclass(frozen=True)
class DINOBudget:
    """windows: the share of the updates spent on windows. queue: past scores that Sinkhorn-Knopp sees. grey, swapped: shares
    of views without their colours, and with others."""

    updates: int = 900
    batch: int = 32
    windows: float = 0.85
    prototypes: int = 128
    queue: int = 512
    grey: float = 0.2
    swapped: float = 0.6
    muon_lr: float = 0.015
    adam_lr: float = 1e-3
    momentum: float = 0.98
    scenes: int = 40000
    seed: int = 0
    difficulty: str = "easy"


class Head(nn.Module):
    """MLP to a unit sphere, then cosine to `prototypes` directions: (n, width) -> (n, prototypes)."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 64), nn.BatchNorm1d(64, affine=False)
        )
        self.embed_prototypes = nn.Parameter(torch.randn(prototypes, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.layers(x.float()).float(), dim=-1)
        return (x @ F.normalize(self.embed_prototypes, dim=-1).T).float()


class Student(nn.Module):
    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.backbone = new_dinov2()
        self.image_head = Head(128, prototypes)
        self.patch_head = Head(128, prototypes)

    def forward(self, pixels: Tensor, kept: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> class tokens (b, d) and the kept patches' tokens (b, m, d) after the final norm. kept: (b, m) patches that are
        seen; hidden: (b, m) True where a mask token stands for a patch."""
        masks = None
        if hidden is not None:
            masks = torch.zeros(len(pixels), GRID**2, dtype=torch.bool).scatter(1, kept, hidden)
        with keep_patches(self.backbone.embeddings, kept):
            out = self.backbone(pixels, bool_masked_pos=masks).last_hidden_state
        return out[:, 0], out[:, 1:]


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Teacher's assignment with every prototype used alike: (b, k) scores -> (b, k) rows that sum to one."""
    q = torch.exp((scores - scores.max()) / temperature).T
    for _ in range(rounds):
        q = q / q.sum(1, keepdim=True).clamp(min=1e-12) / q.shape[0]
        q = q / q.sum(0, keepdim=True).clamp(min=1e-12) / q.shape[1]
    return (q * q.shape[1]).T


def koleo(x: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest neighbour on the sphere (Sablayrolles et al., arXiv 1806.03198)."""
    x = F.normalize(x.float(), dim=-1)
    similarity = x @ x.T
    nearest = similarity.fill_diagonal_(-2).argmax(1)
    return -torch.log(F.pairwise_distance(x, x[nearest]) + 1e-6).mean()


def hidden_patches(count: int, seen: int, rng: np.random.Generator) -> Tensor:
    """(count, seen) True where masked: half of the images, at least one of them, 15 to 60 % of the patches that are seen."""
    share = rng.uniform(0.15, 0.6, (count, 1))
    masked = rng.random((count, 1)) < 0.5
    masked[0] |= not masked.any()
    return torch.from_numpy(rng.random((count, seen)).argsort(1) < np.floor(share * masked * seen))


class DINOTrainer(Pretraining[Student]):
    def __init__(self, budget: DINOBudget, cache: Path) -> None:
        torch.manual_seed(budget.seed)
        self.budget = budget
        self.model = Student(budget.prototypes)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.past = nn.Module()
        self.past.register_buffer("scores", torch.zeros(budget.queue, budget.prototypes))
        self.past.register_buffer("count", torch.tensor(0))
        self.kept = nn.ModuleDict({"student": self.model, "teacher": self.teacher, "past": self.past})
        self.optimizers = optimizers(self.model, muon_lr=budget.muon_lr, adam_lr=budget.adam_lr)
        self.scenes, first = scene_pool(cache, budget.scenes, budget.difficulty)
        self.looks = (first, scene_pool(cache, budget.scenes, budget.difficulty, look=1)[1])

    @property
    def state(self) -> nn.Module:
        return self.kept

    def views(self, update: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(pixels of both global views (2b, 3, 64, 64), the patches seen (2b, m), which of these the student does not
        (2b, m), the patches of a smaller crop of each (2b, l))."""
        b = self.budget
        rng = np.random.Generator(np.random.Philox(key=[b.seed + 202, update]))
        chosen = rng.integers(len(self.scenes), size=b.batch)
        drawn = [normalised(torch.from_numpy(look[chosen]), "dinov2") for look in self.looks]
        count = 2 * b.batch
        if update < b.windows * b.updates:
            things = [self.scenes[i].things for i in chosen]
            centers = np.asarray([group[int(rng.integers(len(group)))].center for group in things])
            seen = [placed(pixels, centers, rng) for pixels in drawn]
            pixels, kept = torch.cat([s[0] for s in seen]), torch.cat([s[1] for s in seen])
            row, column = rng.integers(0, 2, (2, count))
            small = squares(row, column, 3, WINDOW)
        else:
            pixels = torch.cat([crops(p, SIDE, (0.4, 1.0), rng) for p in drawn])
            kept = torch.arange(GRID**2).expand(count, -1)
            row, column = rng.integers(0, GRID - WINDOW + 1, (2, count))
            small = squares(row, column, WINDOW, GRID)
        pixels = recolored(pixels, rng, grey=b.grey, swapped=b.swapped)
        return pixels, kept, hidden_patches(count, kept.shape[1], rng), kept.gather(1, small)

    def image_targets(self, scores: Tensor, temperature: float) -> Tensor:
        """Sinkhorn-Knopp over these scores (n, k) and the queue's, which they then join."""
        old = self.past.scores[: int(self.past.count)]  # pyright: ignore[reportIndexIssue, reportArgumentType]
        both = torch.cat([scores, old])[: self.budget.queue]
        self.past.scores[: len(both)] = both  # pyright: ignore[reportIndexIssue]
        self.past.count.fill_(len(both))  # pyright: ignore[reportCallIssue]
        return sinkhorn(both, temperature)[: len(scores)]

    def loss(self, update: int) -> tuple[Tensor, dict[str, float]]:
        b = self.budget
        pixels, kept, hidden, small = self.views(update)
        temperature = 0.04 + 0.02 * min(1.0, update / (0.15 * b.updates))
        with autocast():
            with torch.no_grad():
                t_image, t_patches = self.teacher(pixels, kept)
                t_scores, t_hidden = self.teacher.image_head(t_image), self.teacher.patch_head(t_patches[hidden])
            s_image, s_patches = self.model(pixels, kept, hidden)
            s_scores = torch.stack(
                [self.model.image_head(s_image), self.model.image_head(self.model(pixels, small)[0])]
            )
            s_hidden = self.model.patch_head(s_patches[hidden])
        targets = self.image_targets(t_scores, temperature).roll(b.batch, 0)  # each view's is the other's
        image = -(targets * (s_scores / 0.1).log_softmax(-1)).sum(-1).mean()
        patch = -(sinkhorn(t_hidden, temperature) * (s_hidden / 0.1).log_softmax(-1)).sum(-1).mean()
        spread = torch.stack([koleo(part) for part in s_image.chunk(2)]).mean()
        total = image + patch + 0.1 * spread
        return total, {"image": image.item(), "patch": patch.item(), "koleo": spread.item()}

    @torch.no_grad()
    def after(self, update: int) -> None:
        """The teacher moves towards the student, ever more slowly."""
        b = self.budget
        momentum = 1 - (1 - b.momentum) * (math.cos(math.pi * update / b.updates) + 1) / 2
        for t, s in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            t.lerp_(s, 1 - momentum)


def pretrain_dino(out: Path, budget: DINOBudget, *, cache: Path, minutes: float | None = None) -> Path:
    """Trains the tiny DINOv2 into `out`; resumes from what is there. Returns the folder of the teacher's backbone."""
    trainer = DINOTrainer(budget, cache)
    settings = {"objective": "self-distillation (DINO + iBOT + KoLeo)", **asdict(budget)}
    facts = go_on(trainer, out, "dinov2", settings, minutes=minutes)
    return export(trainer.teacher.backbone, out, {**facts, "views": facts["updates"] * budget.batch * 4})
