"""Estimate the time of the paper's protocol on GPUs from configs alone, at an assumed rate.

The protocol is swap and drop of every layer on a million tokens, in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, PhiConfig

from layersurgery.plans.variants import variants
from layersurgery.sweeps.estimate import Estimate, estimate

# PEAK_FLOPS is from NVIDIA's data sheet of the H100 SXM: dense bfloat16, without sparsity. SHARE is an assumption.
PEAK_FLOPS, SHARE, MEMORY = 989e12, 0.4, 76e9
TOKENS = 1_000_000
GPUS = (1, 8, 64)


def _pythia(width: int, depth: int, heads: int, vocabulary: int) -> Any:
    return GPTNeoXConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=vocabulary,
    )


def _gpt2(width: int, depth: int, heads: int) -> Any:
    return GPT2Config(n_embd=width, n_layer=depth, n_head=heads)


def _phi(width: int, depth: int) -> Any:
    return PhiConfig(hidden_size=width, num_hidden_layers=depth, intermediate_size=4 * width, num_attention_heads=32)


def _llama(width: int, depth: int, heads: int, mlp_width: int) -> Any:
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=8,
        intermediate_size=mlp_width, vocab_size=128256,
    )  # fmt: skip


MODELS = {
    "pythia-410m": (_pythia(1024, 24, 16, 50304), 2048),
    "pythia-1.4b": (_pythia(2048, 24, 16, 50304), 2048),
    "pythia-2.8b": (_pythia(2560, 32, 32, 50304), 2048),
    "pythia-6.9b": (_pythia(4096, 32, 32, 50432), 2048),
    "gpt2": (_gpt2(768, 12, 12), 1024),
    "gpt2-medium": (_gpt2(1024, 24, 16), 1024),
    "gpt2-large": (_gpt2(1280, 36, 20), 1024),
    "gpt2-xl": (_gpt2(1600, 48, 25), 1024),
    "phi-1": (_phi(2048, 24), 2048),
    "phi-1_5": (_phi(2048, 24), 2048),
    "phi-2": (_phi(2560, 32), 2048),
    "Llama-3.1-70B": (_llama(8192, 80, 64, 28672), 2048),
    "Llama-3.1-405B": (_llama(16384, 126, 128, 53248), 2048),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one model.

    Attributes:
        name: of the model.
        estimate: of its sweep.
        fits: all weights fit on the GPU; if not, the blocks are in main memory.
    """

    name: str
    estimate: Estimate
    fits: bool

    def hours(self, gpus: int) -> float:
        """Return the time at the assumed rate, with the text divided between the GPUs."""
        return self.estimate.flops / (gpus * SHARE * PEAK_FLOPS) / 3600


def estimate_cost(name: str) -> Cost:
    """Estimate a model's cost with the largest batch that fits.

    All weights are on the GPU if they leave enough memory, else the blocks are in main memory.

    Raises:
        SystemExit: no batch fits.
    """
    config, context = MODELS[name]
    edits = variants("swap,drop", config.num_hidden_layers)
    estimated = None
    for fits in (True, False):
        blocks = (
            "gpt_neox.layers"
            if config.model_type == "gpt_neox"
            else "transformer.h"
            if config.model_type == "gpt2"
            else "model.layers"
        )
        for batch in (16, 8, 4, 2, 1):
            estimated = estimate(
                config, edits, tokens=TOKENS, context=context, dtype="bfloat16", batch_size=batch,
                device_map={"": 0} if fits else {"": 0, blocks: "cpu"},
            )  # fmt: skip
            if estimated.peak["0"] <= MEMORY:
                return Cost(name, estimated, fits)
    assert estimated is not None
    raise SystemExit(f"{name} does not fit in {MEMORY / 1e9:.0f} GB: {estimated.peak}")


COLUMNS = (
    "model",
    "parameters",
    "PFLOP",
    "weights, GB",
    "batch",
    "streams, GB",
    "read a batch, GB",
    *(f"{n} GPU{'s'[: n != 1]}" for n in GPUS),
)


def rows() -> list[list[str]]:
    """Return a row of cells for each model, and one for the paper's eleven together."""
    costs = [estimate_cost(name) for name in MODELS]
    paper_models, others = costs[:11], costs[11:]
    petaflops = sum(cost.estimate.flops for cost in paper_models) / 1e15
    total = ["the paper's eleven", "", f"{petaflops:,.0f}", "", "", "", ""]
    total += [_format_hours(sum(cost.hours(gpus) for cost in paper_models)) for gpus in GPUS]
    return [*map(_make_row, paper_models), total, *map(_make_row, others)]


def _make_row(cost: Cost) -> list[str]:
    estimated = cost.estimate
    return [
        cost.name,
        f"{estimated.parameters / 1e9:.3g} B",
        f"{estimated.flops / 1e15:,.0f}",
        f"{sum(estimated.weights.values()) / 1e9:.3g}",
        str(estimated.sequences),
        f"{estimated.memory.streams / 1e9:.2g}",
        "" if cost.fits else f"{estimated.bytes_loaded_per_batch / 1e9:.3g}",
        *(_format_hours(cost.hours(gpus)) for gpus in GPUS),
    ]


def print_table() -> None:
    """Print the rows as a Markdown table."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in rows():
        print(f"| {' | '.join(row)} |")


def _format_hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min" if hours * 60 >= 1 else f"{3600 * hours:.0f} s"
