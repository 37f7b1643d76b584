"""Build plans from functions or from text, combine them, look at their routes, and measure them.

Run it with: python examples/02_compose_a_plan.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

import layersurgery as ls

# The same plan, written in three ways. This part needs no model and no torch.
plan = ls.swap(12) + ls.drop(20) + ls.repeat(range(8, 10))
assert plan == ls.Plan.parse("swap 12 13; drop 20; repeat 8:10")
assert plan == ls.Plan.parse("swap 12 13  # one edit per line, with comments\ndrop 20\nrepeat 8:10")

# The route of a plan is the order in which the blocks run, for a given depth. Equal routes mean equal models.
print(f"{plan}\n  of 30 blocks: {plan.route(30)}")
print(f"  swapped twice: {(ls.swap(12) + ls.swap(12)).route(30)}")

# Edits name blocks of the given model, not positions. After the first edit block 7 is gone; block 8 is still block 8.
print(f"  drop 7; drop 8: {ls.Plan.parse('drop 7; drop 8').route(30)}")

# An invalid plan is refused before any tensor is changed, and the error says how to correct it.
for wrong in ("drop 30", "drop 7; swap 7 9", "swpa 3 4"):
    try:
        print(ls.Plan.parse(wrong).route(30))
    except ls.PlanError as error:
        print(f"  {wrong}: {error}")

model, tokenizer = ls.load("smollm2-135m")
text = tokenizer(topics["for"] + topics["while"], return_tensors="pt").input_ids[:, :128]
plans: dict[str, ls.Plan | str] = {
    "the plan above": plan,
    "a span twice": ls.repeat(range(8, 12)),
    "the middle backwards": ls.reverse(range(12, 18)),
    "one layer moved": ls.move(12, after=16),
    "two without attention": ls.skip_attention(20, 21),
    "two without MLP": ls.skip_mlp(20, 21),
    "every second of eight": ls.drop(*range(12, 20, 2)),
}
# One pass measures all plans. Plans with the same first blocks share the work for these blocks.
frame = ls.sweep(model, plans, text).set_index("name")
print(frame[["depth", "route", "kl_nats", "agreement"]].round(2).to_string())

# Contexts can be combined. The second plan numbers the blocks of the edited model: its block 0 was block 1 before.
with ls.operate(model, ls.drop(0)), ls.operate(model, ls.skip_mlp(0)):
    print(f"inside both: {len(model.model.layers)} blocks")
print(f"outside: {len(model.model.layers)}")
