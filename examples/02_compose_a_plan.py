"""Plans are values: build them from functions or from text, look at them before anything happens, add them, and try them.

Run it with: python examples/02_compose_a_plan.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

import layersurgery as ls

# The same plan three times. Nothing here needs a model, or torch.
plan = ls.swap(12) + ls.drop(20) + ls.repeat(range(8, 10))
assert plan == ls.Plan.parse("swap 12 13; drop 20; repeat 8:10")
assert plan == ls.Plan.parse("swap 12 13  # a line each, with comments\ndrop 20\nrepeat 8:10")

# A route is what comes of a plan at a given depth: the order in which blocks are visited. Models are the same if their routes are.
print(f"{plan}\n  of 30 blocks: {plan.route(30)}")
print(f"  twice swapped: {(ls.swap(12) + ls.swap(12)).route(30)}")

# Edits name blocks of the model as it was given, and not positions: 7 is gone after the first edit, and 8 is still called 8.
print(f"  drop 7; drop 8: {ls.Plan.parse('drop 7; drop 8').route(30)}")

# What makes no sense is refused before a tensor is touched, and the error says what to write instead.
for wrong in ("drop 30", "drop 7; swap 7 9", "swpa 3 4"):
    try:
        print(ls.Plan.parse(wrong).route(30))
    except ls.PlanError as error:
        print(f"  {wrong}: {error}")

model, tokenizer = ls.load("smollm2-135m")
text = tokenizer(topics["for"] + topics["while"], return_tensors="pt").input_ids[:, :128]
mine: dict[str, ls.Plan | str] = {
    "the plan above": plan,
    "a span twice": ls.repeat(range(8, 12)),
    "the middle backwards": ls.reverse(range(12, 18)),
    "one layer travels": ls.move(12, after=16),
    "two without attention": ls.skip_attention(20, 21),
    "two without MLP": ls.skip_mlp(20, 21),
    "every second of eight": ls.drop(*range(12, 20, 2)),
}
# One pass: plans that begin alike share the work up to where they part.
found = ls.sweep(model, mine, text).set_index("name")
print(found[["depth", "route", "kl_nats", "agreement"]].round(2).to_string())

# Contexts compose. Inside the second, numbers are those of the model as it stands: block 0 is what was block 1.
with ls.operate(model, ls.drop(0)), ls.operate(model, ls.skip_mlp(0)):
    print(f"inside both: {len(model.model.layers)} blocks")
print(f"outside: {len(model.model.layers)}")
