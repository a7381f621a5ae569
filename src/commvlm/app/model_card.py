"""A checkpoint's model card: how to ask it, what it is made of, what it scored and by which receipts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluate.receipts import Receipt, read_receipt
from ..model import CommForConditionalGeneration
from ..model.layers import describe_layers

RECEIPTS = "receipts"


@dataclass(frozen=True)
class About:
    """name: the model's. license: an identifier of the hub's, None where it was not said. receipts: task -> receipt. code:
    whether the modules lie beside the weights. converted: whether these are in another precision than what was scored."""

    name: str
    license: str | None
    receipts: Mapping[str, Receipt]
    code: bool
    converted: bool = False


def find_receipts(run: Path) -> dict[str, Receipt]:
    """Task -> receipt of a run's folder; none where nothing was evaluated. Raises ValueError for a broken one."""
    return {path.stem: read_receipt(path) for path in sorted((run / RECEIPTS).glob("*.json"))}


def model_card(model: CommForConditionalGeneration, about: About) -> str:
    """Markdown with the hub's front matter."""
    data = ModelCardData(
        model_name=about.name,
        license=about.license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["comm", "visual-grounding", *(["custom_code"] if about.code else [])],
        eval_results=[_result(receipt) for receipt in about.receipts.values()] or None,
    )
    sections = [f"# {about.name}", _what(model), _use(about), _parts(model), _scores(about)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n").content


def _result(receipt: Receipt) -> EvalResult:
    return EvalResult(
        task_type="image-text-to-text", dataset_type=receipt["task"], dataset_name=receipt.get("split") or receipt["task"],
        metric_type=_metric(receipt), metric_name=f"{_metric(receipt)} ({receipt['rule']})",
        metric_value=round(receipt["value"], 2),
    )  # fmt: skip


def _metric(receipt: Receipt) -> str:
    """Receipts of other tools may not name it."""
    return receipt.get("metric") or "score"


def _what(model: CommForConditionalGeneration) -> str:
    vision: Any = model.config.vision_config
    return (
        f"A vision-language model of the COMM kind ([arXiv 2310.08825](https://arxiv.org/abs/2310.08825)): "
        f"{len(vision.names)} frozen vision encoder{'s' if len(vision.names) > 1 else ''}, several layers each, merged, "
        f"aligned, fused by {vision.fuse['kind']} and projected to {model.config.num_image_tokens} visual tokens, which "
        f"{model.config.text_config.model_type} reads. Boxes in its texts are `[x1,y1,x2,y2]` in [0, 1] of the image as "  # type: ignore[union-attr]
        f"it is shown ({model.config.geometry}). Written by commvlm {version('commvlm')}."
    )


def _use(about: About) -> str:
    trust = ", trust_remote_code=True" if about.code else ""
    first = "" if about.code else "import commvlm  # makes transformers know the model\n"
    return f"""## Use

```python
{first}from transformers import pipeline

ask = pipeline("image-text-to-text", model="{about.name}"{trust})
question = [
    {{"type": "image", "image": "photo.jpg"}},
    {{"type": "text", "text": "Where is the red cup? Answer with its box."}},
]
print(ask(text=[{{"role": "user", "content": question}}], max_new_tokens=64, return_full_text=False))
```

With commvlm installed from its repository: `commvlm chat FOLDER --image photo.jpg`, `commvlm serve FOLDER`,
`commvlm evaluate FOLDER --recipe RECIPE --data.root DATA`."""


def _parts(model: CommForConditionalGeneration) -> str:
    vision: Any = model.config.vision_config
    lines = ["## Parts", "", "| encoder | kind | image | layers | merge | align |", "|---|---|---|---|---|---|"]
    for branch in vision.branches:
        kind = vision.encoder_config(branch["name"]).model_type
        layers = describe_layers(branch["layers"])
        shown = (branch["name"], kind, f"{branch['image_size']} px", f"{layers} of {branch['depth']}")
        lines.append(f"| {' | '.join(shown)} | {branch['merge']['kind']} | {branch['align']['kind']} |")
    weights = {name: found for name, found in model.layer_weights().items() if len(found) > 1}
    if weights:
        lines += ["", "Learned layer weights, layers counted from 1:", ""]
        lines += [
            f"- {name}: {', '.join(f'{k}: {w:.3f}' for k, w in found.items())}" for name, found in weights.items()
        ]
    total = sum(parameter.numel() for parameter in model.parameters())
    return "\n".join([*lines, "", f"{total:,} parameters, {model.dtype}."])


def _scores(about: About) -> str:
    if not about.receipts:
        return ""
    lines = [
        "## Scores",
        "",
        "| task | rule | metric | value | 95 % interval | questions |",
        "|---|---|---|---|---|---|",
    ]
    for receipt in about.receipts.values():
        low_high = receipt.get("interval")
        interval = "–" if low_high is None else f"{low_high[0]:.1f} to {low_high[1]:.1f}"
        cells = (receipt["task"], receipt["rule"], _metric(receipt), f"{receipt['value']:.1f}", interval, receipt["n"])
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    said = f"What each figure was made of stands in `{RECEIPTS}/`; `commvlm receipts diff` compares two."
    if about.converted:
        said += " The weights were converted after they were scored."
    return "\n".join([*lines, "", said])
