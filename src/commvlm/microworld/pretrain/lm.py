"""The tiny language model's pretraining on symbolic scenes: grammar, looking things up, boxes; no pixels.

Architecture: the library's Qwen3 (its QK-norm matters here). What makes it learn in minutes: attention hints, Muon,
and "mimetic" initialisation (query and key matrices equal, output the transpose of value; Trockman and Kolter,
arXiv 2305.09828).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from ...data.boxes import box_iou, parse_boxes
from ..scene import DIFFICULTIES, Difficulty, sample_scene
from ..tokenizer import COORDINATES, build_tokenizer
from .attention import NAME as SHOWN_PREFIX
from .checkpoint import export
from .loop import Pretraining, go_on
from .optim import autocast, optimizers, schedule
from .symbols import GRID, SymbolBatch, position_code, prefix_ids, symbol_batch

MIX = {"presence": 4.0, "rec": 4.0, "reg": 1.5, "count": 2.0, "color": 1.0, "relation": 2.0, "caption": 0.5}


@dataclass(frozen=True)
class LMBudget:
    """updates of `scenes` scenes with `questions` questions each; learning rates of Muon and AdamW."""

    updates: int = 3600
    scenes: int = 16
    questions: int = 12
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    warmup: int = 60
    hold: float = 0.6
    hint: float = 0.3
    seed: int = 0
    difficulty: str = "easy"


def new_lm(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Qwen3, 4 layers of width 128, initialised for looking things up."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=2048,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        nn.init.normal_(embedding, std=1.0)  # pyright: ignore[reportArgumentType]
        values = torch.tensor([float(c) for c in COORDINATES])
        code = position_code(values, config.hidden_size // 2)
        ids = tokenizer.convert_tokens_to_ids(list(COORDINATES))
        embedding[ids] = 0.3 * embedding[ids] + torch.cat([code, code], dim=1)  # pyright: ignore[reportIndexIssue]
        for name, weight in model.named_parameters():
            if name.endswith("q_proj.weight"):
                nn.init.orthogonal_(weight, gain=1.3)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.fill_(1.2)
            elif name == "model.norm.weight":
                weight.fill_(config.hidden_size**-0.5)
        parameters = dict(model.named_parameters())
        for name, weight in parameters.items():
            if name.endswith("k_proj.weight"):
                weight.copy_(parameters[name.replace("k_proj", "q_proj")])
            elif name.endswith("v_proj.weight"):
                nn.init.orthogonal_(weight, gain=0.6)
                parameters[name.replace("v_proj", "o_proj")].copy_(weight.T)
    return model


class SymbolicEyes(nn.Module):
    """Patch tokens of symbolic scenes: fixed background and extent codes around the model's own word embeddings."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        centers = (torch.arange(GRID) + 0.5) / GRID
        rows, columns = torch.meshgrid(centers, centers, indexing="ij")
        half = width // 2
        code = torch.cat([position_code(columns.reshape(-1), half), position_code(rows.reshape(-1), half)], dim=1)
        self.register_buffer("position", code)
        self.register_buffer("background", torch.randn(width, generator=generator))
        self.register_buffer("extent", torch.randn(4, width, generator=generator))
        self.register_buffer("centers", torch.stack([columns.reshape(-1), rows.reshape(-1)] * 2, dim=1))

    def forward(self, batch: SymbolBatch, words: nn.Embedding, rng: torch.Generator) -> Tensor:
        """-> (scenes, 64, width)."""
        out = []
        for cover, ids, boxes in zip(batch.coverage, batch.words, batch.extents, strict=True):
            share = torch.from_numpy(cover)  # (objects, 64)
            share = share / share.sum(0).clamp(min=1)
            named = words(torch.from_numpy(ids)).sum(1)  # (objects, width)
            tokens = share.T @ named + (1 - share.sum(0))[:, None] * self.background  # pyright: ignore[reportOperatorIssue]
            if torch.rand((), generator=rng) < 0.5:
                reach = torch.from_numpy(boxes)[share.argmax(0)] - self.centers  # (64, 4) edges from the patch's centre  # pyright: ignore[reportOperatorIssue]
                tokens = tokens + (share.amax(0) > 0)[:, None] * (4 * reach) @ self.extent * 0.5  # pyright: ignore[reportOperatorIssue]
            keep = torch.rand(len(tokens), 1, generator=rng) > 0.08
            tokens = torch.where(keep, tokens, self.background)  # pyright: ignore[reportArgumentType, reportCallIssue]
            tokens = tokens + self.position + 0.4 * torch.randn(tokens.shape, generator=rng)
            out.append(tokens)
        return torch.stack(out)


class LMTrainer(Pretraining[Qwen3ForCausalLM]):
    """One update = one batch of symbolic scenes, drawn from (seed, update) alone, so a resumed run is the same run."""

    def __init__(self, budget: LMBudget) -> None:
        self.budget = budget
        self.tokenizer = build_tokenizer()
        self.model = new_lm(self.tokenizer, budget.seed)
        self.model.set_attn_implementation(SHOWN_PREFIX)
        self.eyes = SymbolicEyes(self.model.config.hidden_size, budget.seed)
        self.prefix = torch.tensor(prefix_ids(self.tokenizer))
        self.image = self.prefix == self.tokenizer.convert_tokens_to_ids("<image>")
        self.optimizers = optimizers(self.model, muon_lr=budget.muon_lr, adam_lr=budget.adam_lr)
        self.soft = self._soft_targets()

    def _soft_targets(self) -> Tensor:
        """(V, V): a coordinate's target is a Gaussian (sigma one bin) over its neighbours, any other token's is itself."""
        targets = torch.eye(len(self.tokenizer))
        ids = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(COORDINATES)))
        bins = torch.arange(len(ids), dtype=torch.float32)
        near = torch.exp(-0.5 * (bins[:, None] - bins[None, :]) ** 2)
        targets[ids[:, None], ids[None, :]] = near / near.sum(1, keepdim=True)
        return targets

    def world(self, update: int) -> str | Difficulty:
        """The curriculum: at most two objects, then three, then all."""
        full = DIFFICULTIES[self.budget.difficulty]
        most = 2 if update < 200 else 3 if update < 500 else full.objects[1]
        return Difficulty(
            full.categories, full.sizes, (full.objects[0], most), full.overlap, full.clutter, full.kindred
        )

    def batch(self, update: int, split: str = "pretrain") -> SymbolBatch:
        b = self.budget
        rng = np.random.Generator(np.random.Philox(key=[b.seed + 17, update]))
        first = update * b.scenes
        scenes = [sample_scene(split, first + i, self.world(update)) for i in range(b.scenes)]
        return symbol_batch(scenes, self.tokenizer, questions=b.questions, mix=MIX, rng=rng, difficulty=b.difficulty)

    def rate(self, update: int) -> float:
        b = self.budget
        return schedule(update, total=b.updates, warmup=b.warmup, hold=b.hold)

    def loss(self, update: int) -> tuple[Tensor, dict[str, float]]:
        """(training loss; right: the share of supervised tokens that are predicted)."""
        batch = self.batch(update)
        scenes, p = len(batch.ids), len(self.prefix)
        with autocast():
            out = self.read(batch, torch.Generator().manual_seed(update))
            labels = batch.labels.view(scenes, -1)
            predicts = torch.roll(
                labels != -100, -1, dims=1
            )  # never true at a branch's last token: it is padding or eos
            logits = self.model.get_output_embeddings()(out.last_hidden_state[:, p:][predicts])  # pyright: ignore[reportOptionalCall, reportOptionalSubscript]
        targets = torch.roll(labels, -1, dims=1)[predicts]
        logs = logits.float().log_softmax(-1)
        loss = -(self.soft[targets] * logs).sum(-1).mean()
        right = (logs.argmax(-1) == targets).float().mean().item()
        if self.budget.hint > 0:
            loss = loss + self.budget.hint * self._hint_loss(batch, out.attentions)  # pyright: ignore[reportArgumentType]
        return loss, {"right": right}

    def read(self, batch: SymbolBatch, rng: torch.Generator) -> BaseModelOutputWithPast:
        """The base model's output over prefix and branches; `rng` draws the scenes' noise."""
        scenes, questions, length = batch.ids.shape
        words = self.model.get_input_embeddings()
        head = words(self.prefix).expand(scenes, -1, -1).clone()
        head[:, self.image] = self.eyes(batch, words, rng)
        inputs = torch.cat([head, words(batch.ids.view(scenes, -1))], dim=1)
        p = len(self.prefix)
        positions = torch.cat([torch.arange(p), (p + torch.arange(length)).repeat(questions)])
        return self.model.base_model(
            inputs_embeds=inputs, position_ids=positions.expand(scenes, -1), prefix_length=p, branches=questions,
            output_attentions=True, use_cache=False,
        )  # fmt: skip

    def answer(self, batch: SymbolBatch, rng: torch.Generator, *, most: int = 12) -> Tensor:
        """(scenes, questions, length) ids with every answer said greedily, token by token, in place of the true one.

        most: tokens of an answer that are said; boxes and phrases need ten.
        """
        ids = batch.ids.clone()
        supervised = batch.labels != -100
        ids[supervised] = self.tokenizer.pad_token_id  # pyright: ignore[reportArgumentType]
        state = rng.get_state()
        for k in range(min(most, int(supervised.sum(-1).max()))):
            rng.set_state(state)
            out = self.read(replace(batch, ids=ids), rng).last_hidden_state[:, len(self.prefix) :]  # pyright: ignore[reportOptionalSubscript]
            out = out.view(*ids.shape, -1)
            at = (batch.answer_at + k).clamp(max=ids.shape[2] - 2)
            rows, columns = torch.arange(len(ids))[:, None], torch.arange(ids.shape[1])[None]
            token = self.model.get_output_embeddings()(out[rows, columns, at]).argmax(-1)  # pyright: ignore[reportOptionalCall]
            here = supervised[rows, columns, at + 1] & (batch.answer_at + k == at)
            ids[rows, columns, at + 1] = torch.where(here, token, ids[rows, columns, at + 1])
        return ids

    def _hint_loss(self, batch: SymbolBatch, attentions: tuple[Tensor, ...]) -> Tensor:
        """-log of the mass that head 0 of layers 2 and 3 puts, where the answer begins, on the objects asked about
        (or on the first token, where there is none)."""
        scenes, questions = batch.answer_at.shape
        wanted = torch.zeros(scenes, questions, len(self.prefix))
        wanted[:, :, self.image] = (batch.asked > 0.3).float()
        wanted[..., 0] = (wanted.sum(-1) == 0).float()
        rows, columns = torch.arange(scenes)[:, None], torch.arange(questions)[None]
        total = torch.zeros(())
        for layer in (1, 2):
            mass = attentions[layer][rows, 0, columns, batch.answer_at].float()  # (scenes, questions, prefix)
            mass = (mass * wanted).sum(-1).clamp(min=1e-4)
            total = total - (mass.log() * batch.hint).sum() / batch.hint.sum().clamp(min=1)
        return total / 2


def pretrain_lm(out: Path, budget: LMBudget, *, minutes: float | None = None) -> Path:
    """Trains the tiny LM into `out` (checkpoint and log); resumes from what is there. Returns the model's folder."""
    trainer = LMTrainer(budget)
    facts = go_on(trainer, out, "lm", asdict(budget), minutes=minutes)
    trainer.tokenizer.padding_side = "left"
    return export(trainer.model, out, {"objective": "answering about symbolic scenes", **facts}, trainer.tokenizer)


@torch.no_grad()
def symbolic_scores(budget: LMBudget, folder: Path | None, *, batches: int = 8) -> dict[str, float]:
    """Greedy answers about scenes that were never trained on: share right per kind of question, IoU >= 0.5 for REC.

    folder: the model's; None scores an untrained one.
    """
    trainer = LMTrainer(budget)
    if folder is not None:
        trainer.model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        trainer.model.set_attn_implementation(SHOWN_PREFIX)
    trainer.model.eval()
    right: dict[str, list[bool]] = {}
    for update in range(budget.updates, budget.updates + batches):  # past the curriculum
        batch = trainer.batch(update, "probe-test")
        said = trainer.answer(batch, torch.Generator().manual_seed(update))
        for s in range(len(batch.ids)):
            for q, kind in enumerate(batch.kinds[s * budget.questions : (s + 1) * budget.questions]):
                supervised = batch.labels[s, q] != -100
                truth, answer = batch.ids[s, q][supervised], said[s, q][supervised]
                texts = [trainer.tokenizer.decode(ids) for ids in (truth, answer)]
                right.setdefault(kind, []).append(_same_box(*texts) if kind == "rec" else texts[0] == texts[1])  # pyright: ignore[reportArgumentType]
    return {kind: round(float(np.mean(hits)), 4) for kind, hits in sorted(right.items()) if kind != "caption"}


def _same_box(truth: str, answer: str) -> bool:
    """Whether two boxes in text have an IoU of at least 0.5; no when the answer holds none."""
    (true,), said = parse_boxes(truth), parse_boxes(answer)
    return len(said) == 1 and bool(box_iou(said[0][:1], [true[0]])[0] >= 0.5)
