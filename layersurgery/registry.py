"""List the metrics and the analyses: one entry holds all that tables, figures, the report and the command line show.

A new metric or a new analysis gets its entry here, and appears everywhere. The families of edits have their own list,
`plans.families.FAMILIES`.

>>> from layersurgery.registry import ANALYSES, column
>>> column("kl_nats").label, column("kl_nats").unit
('KL from the unedited model', 'nats')
>>> [analysis for analysis in ANALYSES if ANALYSES[analysis].needs == "weights"]
['neurons']
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

Needs = Literal["text", "windows", "pairs", "weights"]


_POSITIVE, _SHARE = (0.0, math.inf), (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of numbers in a table.

    Attributes:
        name: its name in the tables.
        label: what it is, in a few words.
        unit: its unit when it is shown; empty if it has none.
        factor: what the table's numbers are multiplied by when they are shown: 100 for a share shown in percent.
        log: whether an axis of it is logarithmic.
        heading: a shorter label for a narrow table; if it has no %, each number has it.
        digits: number of digits after the point in a narrow table.
        curve: whether it is drawn over depth at the terminal.
        definition: how it is computed.
        shown: whether narrow tables and charts of edits show it.
        signed: whether it is a change, which is printed with its sign and drawn with a line at zero.
        tables: names of the tables in which the name means this; by default, all.
        bounds: the least and the greatest value that it can have; intervals end there.
    """

    name: str
    label: str
    unit: str = ""
    factor: float = 1
    log: bool = False
    heading: str = ""
    digits: int = 3
    curve: bool = True
    definition: str = ""
    shown: bool = True
    signed: bool = False
    tables: tuple[str, ...] = ()
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def axis(self) -> str:
        """Return the label of an axis: what it is, and its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


METRICS = (
    Column(
        "kl_nats", "KL from the unedited model", "nats", log=True, heading="KL",
        definition="KL(p||q), where p is the unedited model's prediction of the next token, and q the edited one's",
        bounds=_POSITIVE,
    ),
    Column(
        "agreement", "top-1 agreement", "%", 100, heading="agree", digits=1,
        definition="share of positions where p and q have the same most likely token", bounds=_SHARE,
    ),
    Column(
        "entropy_bits", "entropy", "bits", heading="entropy", digits=2, definition="H(q)", shown=False,
        bounds=_POSITIVE,
    ),
    Column(
        "entropy_change_bits", "change in entropy", "bits", heading="entropy", digits=2, definition="H(q) - H(p)",
        signed=True,
    ),
    Column(
        "loss_nats", "loss", "nats", heading="loss", definition="cross-entropy of q with the true next token",
        shown=False, bounds=_POSITIVE,
    ),
    Column(
        "loss_change_nats", "change in loss", "nats", heading="loss",
        definition="cross-entropy with the true next token, of q minus that of p", signed=True,
    ),
    Column(
        "accuracy", "accuracy", "%", 100, heading="acc.", digits=1,
        definition="share of positions where q's most likely token is the true next token", bounds=_SHARE,
    ),
)  # fmt: skip
"""The metrics of a sweep, in the order of its columns. Each also has a column of standard errors over sequences."""
KL_QUANTILES = {"kl_nats_median": 0.5, "kl_nats_p90": 0.9, "kl_nats_p99": 0.99, "kl_nats_p99_9": 0.999}
"""The columns of quantiles of KL, and the share of positions that do not exceed each."""
_KL_TAILS = (
    ("kl_nats_median", "median", "median"),
    *((name, f"{100 * share:g} % quantile", f"{100 * share:g} %") for name, share in [*KL_QUANTILES.items()][1:]),
    ("kl_nats_max", "maximum", "max"),
)
TAILS = (
    *(
        Column(
            name, f"KL, {label} over positions", "nats", log=True, heading=heading, curve=False, shown=False,
            definition=f"{label} over positions of KL(p||q)",
        )
        for name, label, heading in _KL_TAILS
    ),
    Column(
        "probability_change_rms", "RMS change of the true token's probability", "%", 100, heading="RMS Δp", digits=2,
        curve=False, shown=False,
        definition="root of the mean square of q - p of the true next token (llama.cpp's RMS Δp)",
    ),
    Column(
        "top5_overlap", "top-5 overlap", "%", 100, heading="top-5", digits=1, curve=False, shown=False,
        definition="share of p's five most likely tokens that are among q's five most likely ones",
    ),
    Column(
        "calibration_error", "expected calibration error", "%", 100, heading="ECE", digits=2, curve=False, shown=False,
        definition="difference between the probability of q's most likely token and how often this token is the true "
        "one, in 15 bins of this probability of equal width, mean over positions",
    ),
)  # fmt: skip
"""The columns that a sweep has with tails. Those of means also have standard errors over sequences."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """An analysis: what it measures, what it needs, and what its results are.

    Attributes:
        name: its name: of the command, of the function in `layersurgery.analyses` and of its main table.
        title: what it measures, in a few words.
        help: what the command does, in a sentence.
        needs: "text" if it runs the model on text, "windows" if it searches text for windows and runs the model on
            these, "pairs" if it runs the model on pairs of sentences, "weights" if it reads the weights alone.
        columns: the columns of its main table that are shown, in their order.
        figures: function that draws the figure of a table, by the table's name, as "module:function".
        tables: names of its tables, the main one first; by default one, of the analysis's own name.
        signals: what is observed in one pass over the text.
        run: function that measures it with one model and one text and writes a directory, as "module:function"; by
            default the signals are measured.
        describe: function that says in words what its main table shows, as "module:function"; by default, where each
            column that is a curve is highest and lowest.
    """

    name: str
    title: str
    help: str
    needs: Needs
    columns: tuple[Column, ...] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    signals: tuple[str, ...] = ()
    run: str = "layersurgery.analyses.measurements:run_signals"
    describe: str = "layersurgery.analyses.descriptions:describe_curves"

    def __post_init__(self) -> None:
        if not self.tables:
            object.__setattr__(self, "tables", (self.name,))


@dataclass(frozen=True, slots=True)
class Axes:
    """Describe the axes of a table that is a map: a row for each cell, placed by the columns `from` and `to`.

    Attributes:
        rows: what `from` is.
        columns: what `to` is.
        symmetric: whether a cell stands for both orders of its two places.
    """

    rows: str = "from"
    columns: str = "to"
    symmetric: bool = False


AXES = {
    "cka": Axes("stream before block", "stream before block", symmetric=True),
    "cosine": Axes("stream before block", "stream before block", symmetric=True),
    "heads": Axes("block", "head"),
    "propagation": Axes("layer of the edit", "later layer"),
}
"""The axes of maps that are not those of a family of edits, by the names of their tables."""

_LENS = (
    Column("lens_kl_nats", "logit lens: KL to the final prediction", "nats", heading="lens KL"),
    Column("lens_entropy_bits", "logit lens: entropy", "bits", heading="entropy", digits=2),
    Column(
        "lens_agreement", "logit lens: agreement with the final top token", "%", 100, heading="top token, %", digits=1
    ),
)
_ATTENTION = (
    Column("attention_prev5", "share of attention on the previous five tokens", heading="prev. 5"),
    Column(
        "attention_prev5_mean", "mean attention to each of the previous five tokens", heading="mean of each", digits=4,
        curve=False,
    ),
)  # fmt: skip
_NORMS = (
    Column("attention_norm", "norm of the attention's contribution", heading="attention", digits=2),
    Column("mlp_norm", "norm of the MLP's contribution", log=True, heading="MLP", digits=2),
    Column("attention_to_mlp_ratio", "attention norm / MLP norm", heading="attn/MLP"),
)
_SIMILARITY = (
    Column("self", "cosine: same block, swapped and not", heading="self", digits=2),
    Column("index", "cosine: same position, swapped and not", heading="index", digits=2),
    Column("adjacent", "cosine: adjacent blocks, not swapped", heading="adj.", digits=2),
)
_CKA = (
    Column("cka", "CKA of the streams", heading="CKA", curve=False),
    Column("cka_without_first", "CKA without the first token of each sequence", heading="w/o first", curve=False),
)
_COSINE = Column("cosine", "cosine of the streams", heading="cosine", curve=False)
_STREAM = (
    Column("stream_norm", "norm of the stream before the block", log=True, heading="norm", digits=1),
    Column("first_token_norm", "norm of the first token's stream", log=True, heading="first", digits=1),
    Column("stream_variance", "variance of the stream over channels", log=True, heading="variance", digits=2),
    Column("variance_growth", "variance after the block / before it", log=True, heading="growth", digits=2),
    Column("attention_to_stream", "norm of the attention's contribution / of the stream", log=True, heading="attn"),
    Column("mlp_to_stream", "norm of the MLP's contribution / of the stream", log=True, heading="MLP"),
    Column(
        "attention_cosine", "cosine of the attention's contribution with the stream", heading="attn cos", digits=2,
        signed=True,
    ),
    Column("mlp_cosine", "cosine of the MLP's contribution with the stream", heading="MLP cos", digits=2, signed=True),
)  # fmt: skip
NEURON_KINDS = ("prediction", "suppression", "partition")
"""The kinds of neurons, by what their weights do to the vocabulary."""
_ABLATION = (
    METRICS[0],
    Column("kl_nats_random", "KL without random neurons", "nats", log=True, heading="random", curve=False),
    METRICS[3],
    Column(
        "entropy_change_bits_random", "change in entropy without random neurons", "bits", heading="random", digits=2,
        curve=False, signed=True,
    ),
    METRICS[5],
    Column(
        "loss_change_nats_random", "change in loss without random neurons", "nats", heading="random", curve=False,
        signed=True,
    ),
    *(
        Column(f"{metric.name}_difference", f"{metric.label}, above random neurons", metric.unit, signed=True,
               curve=False, shown=False)
        for metric in (METRICS[0], METRICS[3], METRICS[5])
    ),
)  # fmt: skip
_PREDICTION = Column("prediction_percent", "prediction neurons", "%", heading="pred. %", digits=2)
_SUPPRESSION = Column("suppression_percent", "suppression neurons", "%", heading="suppr. %", digits=2)
_NEURONS = (
    Column("prediction", "prediction neurons", heading="prediction", digits=0, curve=False),
    _PREDICTION,
    Column("suppression", "suppression neurons", heading="suppression", digits=0, curve=False),
    _SUPPRESSION,
    Column("partition", "partition neurons", heading="partition", digits=0, curve=False),
)
_DROP_KL = Column("drop_kl_nats", "KL when the block is dropped", "nats", log=True, heading="drop KL")
_COST = Column(
    "cost", "fall of the task's metric", heading="fall", digits=4, signed=True,
    definition="the unedited model's value of the metric minus the edited model's; the reverse where lower is better",
)  # fmt: skip
_ON_TASK = (
    _COST,
    Column("answer_log_likelihood", "log-likelihood of the correct answers", "nats", heading="answers", curve=False),
)
_RANK = (
    *_ON_TASK,
    METRICS[0],
    METRICS[1],
    Column("block_influence", "block influence (ShortGPT)", log=True, heading="influence", digits=4, curve=False),
    Column("angular_distance", "angular distance (Gromov et al.)", heading="angular", digits=4, curve=False),
    Column("cost_rank", "rank on the task", heading="rank: task", digits=0, curve=False),
    Column("kl_rank", "rank by KL", heading="rank: KL", digits=0, curve=False),
    Column("influence_rank", "rank by block influence", heading="infl.", digits=0, curve=False),
    Column("angular_rank", "rank by angular distance", heading="ang.", digits=0, curve=False),
    Column("loss_rank", "rank by rise of loss", heading="loss", digits=0, curve=False),
)

_CHANGE = "change of what a layer adds, relative to its size"
PROPAGATION = "propagation"
"""Name of the table of what later layers do after an edit, and of its figure; a sweep writes them on request."""
_PROPAGATION = (
    Column("change_mean", f"mean {_CHANGE}", log=True, heading="mean"),
    Column("change_max", f"largest {_CHANGE}", log=True, heading="largest"),
)
_COSTS = (
    *_ON_TASK,
    METRICS[0],
    Column("perplexity", "perplexity", log=True, heading="ppl.", digits=1, definition="exp(loss)"),
    METRICS[1],
)
_MULTIPLICATIONS = "products with weights, each once for each token, and of attention with keys and values; an estimate"
_SAVED = tuple(
    Column(
        f"{name}{end}", f"{label}{meaning}", unit, shown=False, curve=False, definition=definition, tables=("costs",)
    )
    for end, meaning in (
        ("_saved", " saved in a plain checkpoint"),
        ("_saved_if_skipped", " saved if the program skips the branches"),
        ("_of_blocks", " of all blocks of the unedited model"),
    )
    for name, label, unit, definition in (
        ("parameters", "parameters", "", "those of the blocks; norms belong to no branch"),
        ("multiplications", "multiplications for each token", "", _MULTIPLICATIONS),
        ("cache_bytes", "bytes of the cache for each token", "bytes", "keys and values at the context of the text"),
    )
)
_OF_SEARCH = ("search", "tried")
_SEARCH = (
    *_COSTS,
    METRICS[5],
    Column("block_calls", "block calls for each token", heading="blocks", digits=0, curve=False, tables=_OF_SEARCH),
    Column("parameters", "parameters", heading="parameters", digits=0, curve=False, tables=_OF_SEARCH),
    Column(
        "above_winner", "above the chosen route, on the same documents", heading="above", curve=False, signed=True,
        definition="cost minus that of the chosen route, on the same documents", tables=_OF_SEARCH,
    ),
    Column(
        "above_winner_nats", "above the chosen route, on the same text", "nats", heading="above", curve=False,
        signed=True, definition="score minus that of the chosen route, on the same sequences", tables=_OF_SEARCH,
    ),
)  # fmt: skip
SEARCH_SCORES = {"kl": "kl_nats", "loss": "loss_change_nats"}
"""What a search can minimize on a text, and the metric of each."""


def search_score(by: str) -> str:
    """Return the column that a search minimizes; by a task it is the cost."""
    return SEARCH_SCORES.get(by, _COST.name)


_PROBE = tuple(
    Column(name, label, "%", 100, heading=heading, digits=1, tables=("probe", "single_neurons", "top_k"))
    for name, label, heading in (
        ("accuracy", "held-out accuracy", "held out, %"),
        ("low", "lower end of its 95 % interval", "low"),
        ("high", "upper end of its 95 % interval", "high"),
        ("on_class", "accuracy on the class", "class, %"),
        ("on_rest", "accuracy on the rest", "rest, %"),
    )
)
_WIC = tuple(
    Column(name, label, "%", 100, heading=heading, digits=1, tables=("wic",), curve=name in ("accuracy", "shuffled"))
    for name, label, heading in (
        ("accuracy", "accuracy on held-out pairs", "held out, %"),
        ("accuracy_low", "lower end of its 95 % interval", "low, %"),
        ("accuracy_high", "upper end of its 95 % interval", "high, %"),
        ("shuffled", "accuracy with shuffled labels", "shuffled, %"),
        ("majority", "share of the more frequent label", "majority, %"),
    )
)
STAGES = ("detokenization", "feature engineering", "prediction ensembling", "residual sharpening")
"""The four stages of inference, in the order of depth."""
CRITERIA = {
    "kl": "lowest KL, one layer at a time",
    "influence": "lowest block influence",
    "angular": "span with lowest angular distance",
    "task": "smallest fall of the task's metric, one layer at a time",
    "greedy": "greedy, measured again after each removal",
    "loss": "lowest rise of loss, one layer at a time",
}
"""What each criterion of pruning removes; the keys are in the column "criterion" of the costs."""

ANALYSES = {
    analysis.name: analysis
    for analysis in (
        Analysis(
            "attention", "attention to the five previous tokens",
            "Measure how much attention goes to the five previous tokens.", "text", _ATTENTION,
            {"attention": "layersurgery.figures.signals:attention"}, signals=("attention",),
        ),
        Analysis(
            "norms", "norms of attention and MLP contributions",
            "Measure the norms of what attention and MLP add to the residual stream.", "text", _NORMS,
            {"norms": "layersurgery.figures.signals:norms"}, signals=("norms",),
        ),
        Analysis(
            "lens", "logit lens after each block",
            "Decode the residual stream after each block (the logit lens).", "text", _LENS,
            {"lens": "layersurgery.figures.signals:lens"}, signals=("lens",),
        ),
        Analysis(
            "similarity", "contributions of swapped blocks",
            "Compare what blocks add when swapped and when not (cosine similarity).", "text", _SIMILARITY,
            {"similarity": "layersurgery.figures.signals:similarity"}, signals=("similarity",),
        ),
        Analysis(
            "cka", "similarity of the streams between all depths (CKA)",
            "Compare the residual stream between all pairs of depths (linear CKA).", "text", _CKA,
            {"cka": "layersurgery.figures.stream_maps:cka"}, signals=("cka",),
            describe="layersurgery.analyses.stream_signals:describe_map",
        ),
        Analysis(
            "cosine", "cosine of the streams between all depths",
            "Compare each token's residual stream between all pairs of depths (cosine similarity).", "text", (_COSINE,),
            {"cosine": "layersurgery.figures.stream_maps:cosine"}, signals=("cosine",),
            describe="layersurgery.analyses.stream_signals:describe_map",
        ),
        Analysis(
            "stream", "growth of the stream, and what is added to it",
            "Measure the size of the residual stream and of what attention and MLP add to it in comparison.", "text",
            _STREAM, {"stream": "layersurgery.figures.signals:stream"}, signals=("stream",),
        ),
        Analysis(
            "heads", "cost of turning each attention head off",
            "Measure the model with each attention head off, one at a time.", "text",
            (METRICS[0], METRICS[1], METRICS[3], METRICS[5]), {"heads": "layersurgery.figures.heads:heads"},
            run="layersurgery.analyses.head_ablation:run_heads",
            describe="layersurgery.analyses.head_ablation:describe_heads",
        ),
        Analysis(
            "neurons", "prediction and suppression neurons",
            "Find prediction and suppression neurons from the weights alone (on a CPU, one block at a time).",
            "weights", _NEURONS, {"neurons": "layersurgery.figures.signals:neurons"},
            tables=("neurons", "neuron_scores"), run="layersurgery.analyses.measurements:run_neurons",
        ),
        Analysis(
            "ablate-neurons", "predictions without neurons of one kind",
            "Turn prediction, suppression and partition neurons off, and as many random neurons of the same blocks.",
            "text", _ABLATION, {"ablate-neurons": "layersurgery.figures.neuron_ablation:ablation"},
            run="layersurgery.analyses.neuron_ablation:run_ablation",
            describe="layersurgery.analyses.neuron_ablation:describe_ablation",
        ),
        Analysis(
            "subjoiners", "attention heads that join the tokens of a word",
            "Rank attention heads by how much the last token of a four-token word attends to the word's other tokens.",
            "windows", (), {
                "subjoiners": "layersurgery.figures.subjoiners:subjoiners",
                "examples": "layersurgery.figures.subjoiners:examples",
            },
            tables=("subjoiners", "attention_to_words", "examples"),
            run="layersurgery.analyses.window_runs:run_subjoiners",
            describe="layersurgery.analyses.subjoiner_heads:describe_subjoiners",
        ),
        Analysis(
            "probe", "linear probes on prediction and suppression neurons",
            "Predict a class of next tokens (such as -ing) with linear probes on prediction and suppression neurons.",
            "windows", _PROBE, {
                "probe": "layersurgery.figures.probes:probe", "effects": "layersurgery.figures.probes:effects",
            },
            tables=("probe", "single_neurons", "top_k", "effects"),
            run="layersurgery.analyses.window_runs:run_probe",
            describe="layersurgery.analyses.neuron_probes:describe_probes",
        ),
        Analysis(
            "wic", "sense of a word, by layer (Word in Context)",
            "Predict from the stream after each layer if a word means the same in two sentences (Word in Context).",
            "pairs", _WIC, {"wic": "layersurgery.figures.probes:wic"},
            run="layersurgery.analyses.word_senses:run_wic",
            describe="layersurgery.analyses.word_senses:describe_wic",
        ),
        Analysis(
            "stages", "all signals and the four stages",
            "Measure all signals over a model's depth and find the four stages of inference.", "text",
            (_DROP_KL, _ATTENTION[0], _LENS[0], _LENS[1], _NORMS[2], _PREDICTION, _SUPPRESSION),
            {"stages": "layersurgery.figures.signals:stages"},
            tables=(
                "stages", "boundaries", "lens", "attention", "norms", "similarity", "drop", "neuron_scores", "neurons",
            ),
            signals=("lens", "attention", "norms", "similarity", "drop"),
            describe="layersurgery.analyses.inference_stages:describe_stages",
        ),
        Analysis(
            "rank", "cost of removing each layer, and scores that predict it",
            "Rank layers or branches by the measured cost of removing them, by block influence and angular distance.",
            "text", _RANK, {"rank": "layersurgery.figures.pruning:rank"}, tables=("rank", "spans", "parts"),
            signals=("drop", "change"), run="layersurgery.analyses.measurements:run_rank",
            describe="layersurgery.analyses.descriptions:describe_ranks",
        ),
        Analysis(
            "costs", "cost of removing layers by each criterion", "", "text", (*_COSTS, *_SAVED),
            {"costs": "layersurgery.figures.pruning:costs"},
            describe="layersurgery.analyses.descriptions:describe_costs",
        ),
        Analysis(
            PROPAGATION, "change of what later layers add after an edit", "", "text", _PROPAGATION,
            {PROPAGATION: "layersurgery.figures.propagation:propagation"},
        ),
        Analysis(
            "search", "routes with fewer or more blocks, found by a beam search", "", "text", _SEARCH,
            {"search": "layersurgery.figures.search:search"}, tables=("search", "tried"),
            describe="layersurgery.analyses.search_tables:describe_search",
        ),
    )
}  # fmt: skip
"""The analyses by name."""

_COLUMNS = {
    (entry.name, table): entry
    for entry in (*METRICS, *TAILS, *(entry for analysis in ANALYSES.values() for entry in analysis.columns))
    for table in entry.tables or ("",)
}
_TASK, _TASK_ENDS = "task_", ("_sem", "_change", "_change_sem", "_change_low", "_change_high")
_UNITS = {"nats": "nats", "bits": "bits", "percent": "%", "seconds": "s", "bytes": "bytes"}


def column(name: str, table: str = "") -> Column:
    """Return the column of a name; for an unknown one, a label made from the name, with the unit that ends it.

    Args:
        name: name of the column.
        table: name of the analysis's table that it is in, where the same name may mean something else.
    """
    if found := _COLUMNS.get((name, table)) or _COLUMNS.get((name, "")):
        return found
    if name.startswith(_TASK):
        metric = name.removesuffix("_change")
        rest = metric.removeprefix(_TASK)
        label = f"accuracy on {rest.removesuffix('_acc')}" if rest.endswith("_acc") else f"task {rest}"
        return Column(name, label) if metric == name else Column(name, f"change in {label}", signed=True)
    words = name.split("_")
    unit = _UNITS.get(words[-1], "") if len(words) > 1 else ""
    return Column(name, " ".join(words[:-1] if unit else words), unit)


def first_metrics(names: Iterable[object]) -> list[str]:
    """Return the columns of tasks' metrics: of a task with an accuracy only this, of another one all.

    Example:
        >>> from layersurgery.registry import first_metrics
        >>> first_metrics(["kl_nats", "task_arc_easy_acc", "task_arc_easy_acc_sem", "task_arc_easy_acc_norm"])
        ['task_arc_easy_acc']
    """
    metrics = [str(name) for name in names if str(name).startswith(_TASK) and not str(name).endswith(_TASK_ENDS)]
    tasks = [name.removesuffix("acc") for name in metrics if name.endswith("_acc")]
    return [name for name in metrics if name.endswith("_acc") or not name.startswith((*tasks, "\0"))]


def figures() -> dict[str, str]:
    """Return the function that draws each table of an analysis, by the table's name, in the order of the analyses."""
    return {table: function for analysis in ANALYSES.values() for table, function in analysis.figures.items()}


def resolve(path: str) -> Callable[..., Any]:
    """Import what "module:name" names."""
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found
