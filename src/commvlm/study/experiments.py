"""The paper's figures and tables, one function each: a scale -> the rows that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from .controls import collapse, controls, peers
from .rows import Row, comm, encoder, layers_for, merged, mfm, pair, single
from .settings import Scale, StudyEncoder

TABLE_7 = ("mae", "deit")
"""The encoders that the paper's Table 7 has, as scales call them."""
MERGES = ("mean", "layerscale", "lln-layerscale", "conv-layerscale")


@dataclass(frozen=True)
class Experiment:
    """title, asks: for the report. rows: what it trains. tasks: those it is about, in order; all of the scale's if empty.
    after: the rows are a curve over this place ("layer"), or a table."""

    title: str
    asks: str
    rows: Callable[[Scale], list[Row]]
    tasks: tuple[str, ...] = ()
    over: str = ""


def figure_2(scale: Scale) -> list[Row]:
    """Every encoder at every layer of the sweep, one layer at a time."""
    return [single(scale, given, layer) for given in scale.encoders for layer in layers_for(scale, given, scale.layers)]


def figure_3(scale: Scale) -> list[Row]:
    """Merging strategies: Mean(half), then each merge over all layers, for both encoders of the pair and others that are not
    left out by their `merges`."""
    rows = []
    for given in scale.encoders:
        if not (given.merges or given.name in scale.pair):
            continue
        rows += [single(scale, given, given.last), merged(scale, given, "mean", given.deep)]
        rows += [merged(scale, given, merge, "all") for merge in MERGES]
        if given.merged != "all":
            rows.append(mfm(scale, given))
    return rows


def table_1(scale: Scale) -> list[Row]:
    """Five visual halves on every task."""
    first, second = pair(scale)
    lasts = [single(scale, given, given.last) for given in (first, second)]
    return [*lasts, mfm(scale, first), mfm(scale, second), comm(scale)]


def table_6(scale: Scale) -> list[Row]:
    """The vision-only encoder's alignment: linear, then MLPs of several depths at ratio 4, then of several ratios."""
    _, second = pair(scale)
    shapes = dict.fromkeys([*((depth, 4) for depth in scale.depths), *((1, ratio) for ratio in scale.ratios)])
    rows = [aligned(scale, second, 0, 0)]
    return rows + [aligned(scale, second, depth, ratio) for depth, ratio in shapes]


def aligned(scale: Scale, given: StudyEncoder, depth: int, ratio: int) -> Row:
    """An encoder's merged branch behind an MLP of `depth` hidden layers; 0 is a linear alignment."""
    align = {"kind": "mlp", "hidden": depth, "ratio": ratio} if depth else "linear"
    if align == given.align:
        return mfm(scale, given)
    name = f"{given.name} aligned by " + (f"{depth} MLP, ratio {ratio}" if depth else "a linear layer")
    model = scale.model(encoder(given, given.merged, "lln-layerscale", align=align))
    return Row(name, model, {"encoder": given.name, "hidden": depth, "ratio": ratio})


def table_7(scale: Scale) -> list[Row]:
    """Other encoders at their deep layers, the paper's even if the pair has them, beside the pair's merged branches."""
    first, second = pair(scale)
    others = [given for given in scale.encoders if given.name not in scale.pair or given.name in TABLE_7]
    return [
        mfm(scale, first),
        mfm(scale, second),
        *(single(scale, given, layer) for given in others for layer in layers_for(scale, given, scale.deepest)),
    ]


def weights(scale: Scale) -> list[Row]:
    """The rows that learn weights of layers."""
    return [*(mfm(scale, given) for given in pair(scale)), comm(scale)]


FIGURE_1 = "figure-1"
EXPERIMENTS: dict[str, Experiment] = {
    FIGURE_1: Experiment("Figure 1: similarity maps", "What does one patch's token find alike?", lambda scale: []),
    "figure-2": Experiment(
        "Figure 2: one layer at a time", "Which layer serves which task?", figure_2, ("rec", "pope", "reg"), "layer"
    ),
    "figure-3": Experiment("Figure 3: merging strategies", "Which merge is best?", figure_3, ("rec", "pope", "reg")),
    "table-1": Experiment("Table 1: five visual halves", "What does joining two merged encoders give?", table_1),
    "table-6": Experiment("Table 6: aligning the vision-only encoder", "How deep an MLP?", table_6, ("rec", "pope")),
    "table-7": Experiment("Table 7: other encoders", "Do other encoders serve as well?", table_7, ("rec", "pope")),
    "controls": Experiment("Controls", "What else could explain the paper's gains?", controls),
    "peers": Experiment("Peers", "Other projects' visual halves under equal conditions", peers),
    "collapse": Experiment("Deep alignments", "Why do deep MLPs fail?", collapse, ("rec", "pope")),
    "weights": Experiment(
        "Learned layer weights", "What weights do the merged layers learn?", weights, ("rec", "pope")
    ),
}
"""Figure 1 needs no training: it is drawn from the encoders alone."""


def experiments_named(names: list[str]) -> dict[str, Experiment]:
    """Raises ValueError for one that there is not, with the nearest names. "all" is every one."""
    known = [*EXPERIMENTS, "all"]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
            raise ValueError(f"there is no experiment {name!r}; {hint}")
    return dict(EXPERIMENTS) if "all" in names else {name: EXPERIMENTS[name] for name in names}


def rows_of(scale: Scale, names: list[str]) -> list[Row]:
    """Every row that these experiments need, once; places of one row in several of them are kept together."""
    found: dict[str, Row] = {}
    for experiment in experiments_named(names).values():
        for row in experiment.rows(scale):
            kept = found.get(row.name)
            if kept is not None and (kept.model, kept.pixels) != (row.model, row.pixels):
                raise ValueError(f"two rows are called {row.name!r}: name the encoders apart")
            found[row.name] = row if kept is None else replace(kept, at={**row.at, **kept.at})
    return list(found.values())
