"""Remove a fifth of a model in three ways, heal each result in two ways, and compare them on text that none has seen.

Writes prune-and-heal.csv, a row at a time, and prune-and-heal.png. What is in the table is not measured again.
Run it with: python examples/06_prune_and_heal.py   (about 40 minutes on two cores)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

import layersurgery as ls


@torch.no_grad()
def evaluate(model: Any, text: torch.Tensor, questions: list[torch.Tensor]) -> dict[str, float]:
    """Return the perplexity of a text, and the share of questions whose right answer (row 0) is the most likely."""
    losses = [float(model(part, labels=part).loss) for part in torch.split(text, 4)]
    chances = [
        model(ids).logits[:, 31:-1].log_softmax(-1).gather(-1, ids[:, 32:, None]).sum((1, 2)) for ids in questions
    ]
    right = [int(chance.argmax()) == 0 for chance in chances]
    return {"perplexity": float(torch.tensor(losses).mean().exp()), "accuracy": sum(right) / len(right)}


def heal(healing: str, teacher: Any, plan: ls.Plan, text: torch.Tensor, steps: int) -> Any:
    """Return the edited model as it is, with linear maps, or trained to predict as the unedited one."""
    model = ls.load("smollm2-135m", dtype="float32").model
    if healing == "linear":
        return ls.heal_linear(teacher, plan, text).operate_(model)
    model = ls.operate_(model, plan)
    if healing == "trained":
        model = ls.heal(model, teacher, text, steps=steps, batch_size=1, evaluate_every=steps).model
    return model.eval()


def main(choose: int = 1024, fit: int = 16384, steps: int = 200, test: int = 2048, count: int = 64) -> pd.DataFrame:
    """Compare them; the arguments are numbers of tokens, of steps of 128 tokens, and of questions."""
    torch.manual_seed(0)
    teacher, tokenizer = ls.load("smollm2-135m", dtype="float32")
    pages = [topics[name] for name in sorted(topics)]
    parts = ["\n\n".join(pages[::4]), "\n\n".join(page for at, page in enumerate(pages) if at % 4)]
    unseen, seen = (tokenizer(part, return_tensors="pt").input_ids[0] for part in parts)
    sequences = seen[: len(seen) // 128 * 128].view(-1, 128)
    # A question is 32 tokens, and its right answer the next 16. The others follow three other places of these pages.
    places = torch.randint(len(unseen) - 48, (count, 4)).tolist()
    ask = [torch.stack([torch.cat([unseen[at[0] :][:32], unseen[i + 32 :][:16]]) for i in at]) for at in places]
    choosing = sequences[: choose // 128]
    fitting = {"none": choosing, "linear": sequences[: fit // 128], "trained": sequences[: steps + 16]}
    choices: dict[str, Callable[[], Any]] = {
        "one-shot": lambda: ls.prune(teacher, choosing, remove=6),
        "greedy": lambda: ls.prune(teacher, choosing, remove=6, greedy=True),
        "branches": lambda: ls.prune(teacher, choosing, budget="params=20%", of="branches"),
    }
    path = Path("prune-and-heal.csv")
    rows: list[dict[str, Any]] = pd.read_csv(path).to_dict("records") if path.exists() else []
    known = {(row["choice"], row["healing"]) for row in rows}
    used = sum(weight.numel() for weight in teacher.parameters())

    def add(choice: str, healing: str, parameters: int, plan: str, model: Any) -> None:
        row = {"choice": choice, "healing": healing, "parameters": parameters, "plan": plan}
        rows.append(row | evaluate(model, unseen[:test].view(-1, 128), ask))
        pd.DataFrame(rows).to_csv(path, index=False)

    if ("unedited", "none") not in known:
        add("unedited", "none", used, "", teacher)
    for choice, choose_parts in choices.items():
        if missing := [healing for healing in fitting if (choice, healing) not in known]:
            pruning = choose_parts()
            saved = int(pruning.costs.query("criterion == 'kl'").parameters_saved_if_skipped.max())
        for healing in missing:
            try:
                model = heal(healing, teacher, pruning.plan, fitting[healing], steps)
            except ls.UnsupportedEditError as error:  # a map is fitted before a dropped block, into a whole MLP
                print(f"{choice}, {healing}: {error}")
            else:
                add(choice, healing, used - saved, str(pruning.plan), model)
    draw(pd.DataFrame(rows)).savefig("prune-and-heal.png", dpi=120)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """Draw both measures over the parameters that are used: a shape for each choice, a color for each healing."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    shapes = {"unedited": "*", "one-shot": "o", "greedy": "s", "branches": "^"}
    colors = {"none": "#b04a3a", "linear": "#3a6fb0", "trained": "#2c8c57"}
    for axes, measure in zip(figure.subplots(1, 2), ("perplexity", "accuracy"), strict=True):
        for row in table.itertuples():
            color = "black" if row.choice == "unedited" else colors[row.healing]
            axes.plot(
                row.parameters / 1e6, getattr(row, measure), shapes[row.choice], color=color, mfc="none", ms=10, mew=2
            )
        axes.set(xlabel="parameters in use (million)", ylabel=measure)
        axes.grid(color="#e0e0e0")
    figure.axes[0].set(yscale="log", yticks=(ticks := [20, 30, 40, 60, 100, 160]), yticklabels=ticks)
    figure.axes[0].minorticks_off()
    for name, shape in shapes.items():
        axes.plot([], [], shape, color="gray", mfc="none", mew=2, label=name)
    for name, color in colors.items():
        axes.plot([], [], "_", color=color, mew=4, label=f"healing: {name}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


if __name__ == "__main__":
    print(main().drop(columns="plan").to_string(index=False))
