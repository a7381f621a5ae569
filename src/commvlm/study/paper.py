"""The paper's figures (arXiv 2310.08825 v3), for the tables that stand beside ours: facts, in the order of our rows.

They are of ViT-L encoders and a 7B model on photographs: comparable in kind with the micro world's, not in size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PaperTable:
    """columns: what the paper measures. rows: its own names -> figures; None where it gives none."""

    source: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]


PAPER: dict[str, PaperTable] = {
    "table-1": PaperTable(
        "Table 1",
        ("REC avg", "POPE avg", "COCO CIDEr", "Flickr30k CIDEr", "MME cognition", "MME perception", "VQAv2", "OK-VQA"),
        {
            "CLIP": (47.3, 82.3, 125.0, 80.7, 209.6, 1107.8, 68.8, 44.2),
            "DINOv2": (54.8, 78.3, 118.0, 68.9, 261.8, 930.5, 63.1, 41.9),
            "CLIP + MFM": (70.0, 83.4, 125.8, 81.0, 296.6, 1164.4, 69.5, 44.7),
            "DINOv2 + MFM": (72.8, 83.3, 123.4, 76.3, 252.9, 1086.8, 68.0, 42.1),
            "COMM": (72.8, 83.6, 127.3, 81.9, 360.4, 1234.9, 70.1, 45.0),
        },
    ),
    "table-6": PaperTable(
        "Table 6", ("RefCOCOg test-u", "POPE"),
        {
            "Linear": (64.1, 75.6), "MLP, ratio 4": (73.0, 80.3), "2 MLP, ratio 4": (74.6, 82.4),
            "4 MLP, ratio 4": (49.0, 79.2), "8 MLP, ratio 4": (6.8, 56.0), "MLP, ratio 8": (73.7, 81.5),
            "MLP, ratio 16": (74.5, 80.4),
        },
    ),
    "table-7": PaperTable(
        "Table 7", ("RefCOCO val", "POPE"),
        {
            "CLIP + MFM": (76.4, 80.7), "DINOv2 + MFM": (79.6, 80.3), "MAE 20": (73.6, 66.8), "MAE 22": (74.9, 68.0),
            "DeiT 20": (25.7, 66.2), "DeiT 22": (32.0, 67.9),
        },
    ),
}  # fmt: skip
PAPER_WORDS: dict[str, str] = {
    "figure-1": "The paper shows one visual token of CLIP and of DINOv2 at blocks 12 and 24.",
    "figure-2": "In the paper REC peaks near block 12 of CLIP's 24, REG near 16 to 18, POPE rises to the last block; "
    "DINOv2's deep blocks are better at REC than CLIP's and worse at POPE.",
    "figure-3": "In the paper LLN-Layerscale over all layers is the best merge of both encoders; Mean(all) is above "
    "Mean(half) for CLIP and clearly below it for DINOv2.",
    "table-1": "The paper's MME figures are totals, no means of marks, so rows cannot be paired on them and ours are not "
    "here: “commvlm evaluate RUN --tasks mme” gives a run's, where its model is kept.",
    "collapse": "The paper shows that deep MLPs fail and does not say why.",
    "weights": "The paper does not report the learned weights. Under LLN-Layerscale they do not say how much a layer is used:"
    " each layer's linear map has a scale of its own, and one that is twice as large with half the weight gives the same.",
    "controls": "The paper has none of these rows.",
    "peers": "The paper compares with peers as they were trained, not under equal conditions. Here an encoder that "
    "the scale lacks is replaced by one of the pair, and layers keep their distance from the end or their relative depth.",
}
