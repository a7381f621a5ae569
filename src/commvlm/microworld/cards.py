"""Model cards of the tiny parts: how they were made, and what they know beside a random-initialised twin."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..model.encoders import load_encoder, new_encoder
from ..model.families import truncate, vision_half
from .pretrain.vit import STARTS
from .readout import features, probe_scenes, read_out

FAMILIES = {"clip_vision_model": "clip", "dinov2": "dinov2", "vit_mae": "mae", "vit": "deit"}


def write_card(folder: Path, *, train: int = 3000, test: int = 1000, steps: int = 1200) -> Path:
    """Scores the pretrained part in `folder` and writes card.json there; returns its path.

    train, test: scenes that an encoder's read-outs are fitted and scored on; steps: updates of each.

    Raises ValueError for a folder that holds no pretrained part.
    """
    made = folder / "pretraining.json"
    if not made.exists():
        raise ValueError(
            f"{folder} holds no pretrained part: no pretraining.json; make it with commvlm microworld pretrain"
        )
    try:
        facts = json.loads(made.read_text(encoding="utf-8"))
        facts["difficulty"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{made} is none that commvlm microworld pretrain wrote ({error!r}); pretrain it again"
        ) from error
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind in FAMILIES:
        scores = encoder_scores(folder, FAMILIES[kind], facts, train=train, test=test, steps=steps)
    else:
        scores = lm_scores(folder, facts)
    card = {**facts, **scores}
    path = folder / "card.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(card, indent=1))
    os.replace(part, path)
    return path


def encoder_scores(
    folder: Path, family: str, facts: dict[str, Any], *, train: int, test: int, steps: int
) -> dict[str, Any]:
    """Per layer: presence AUC (linear) and REC acc@0.5 (dense MLP), the encoder's and its untrained twins'; best of each.

    random_twin: the library's own initialisation. start: the encoder's own before its first update, where that is another
    one. beats_twin, beats_start: whether both best figures are above that one's best by more than two standard errors
    (binomial) for REC and .02 for presence.
    """
    torch.set_num_threads(1)
    seen, seen_pixels = probe_scenes("probe-train", train, facts["difficulty"])
    held, held_pixels = probe_scenes("probe-test", test, facts["difficulty"])
    config = vision_half(AutoConfig.from_pretrained(folder))
    layers = list(range(1, config.num_hidden_layers + 1))
    whole = truncate(config, config.num_hidden_layers)
    torch.manual_seed(12345)
    encoders = {"trained": load_encoder(str(folder), whole), "random_twin": new_encoder(whole)}
    if family in STARTS:
        encoders["start"] = new_encoder(whole)
        encoders["start"].load_state_dict(STARTS[family]().state_dict())
    rows: dict[str, Any] = {}
    for name, encoder in encoders.items():
        encoder = encoder.float()
        fitted = features(encoder, seen_pixels, family=family, layers=layers)
        asked = features(encoder, held_pixels, family=family, layers=layers)
        readings = [read_out((x, seen), (y, held), steps=steps) for x, y in zip(fitted, asked, strict=True)]
        rows[name] = {
            "presence_auc": [round(r.presence, 4) for r in readings],
            "rec": [round(r.rec, 4) for r in readings],
        }
    queries = sum(len(scene.things) for scene in held.scenes)
    best = {name: {k: max(v) for k, v in row.items()} for name, row in rows.items()}
    error = (2 * 0.25 / queries) ** 0.5
    trained = best["trained"]

    def beats(untrained: dict[str, float]) -> bool:
        above = trained["rec"] > untrained["rec"] + 2 * error
        return above and trained["presence_auc"] > untrained["presence_auc"] + 0.02

    verdicts = {"beats_twin": beats(best["random_twin"])}
    if "start" in best:
        verdicts["beats_start"] = beats(best["start"])
    return {"layers": layers, "probes": rows, "best": best, "rec_queries": queries, **verdicts}


def lm_scores(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers about held-out symbolic scenes, per kind of question, the model's and an untrained twin's."""
    from .pretrain.lm import LMBudget, symbolic_scores

    budget = LMBudget(**{k: v for k, v in facts.items() if k in LMBudget.__dataclass_fields__})
    trained, twin = symbolic_scores(budget, folder), symbolic_scores(budget, None)
    return {"symbolic": trained, "random_twin": twin, "beats_twin": trained["rec"] > twin["rec"] + 0.1}
