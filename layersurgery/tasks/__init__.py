"""Measure tasks of lm-eval, and requests of your own, on all edited models at once.

>>> import layersurgery as ls
>>> mine = ls.tasks.requests([("The capital of France is", " Paris")], name="capitals")
>>> model, tokenizer = ls.load("smollm2-135m")
>>> frame = ls.sweep(model, "drop 20", tasks=mine, tokenizer=tokenizer)
>>> bool((frame.task_capitals_log_likelihood < 0).all())
True
"""

from .own_requests import OwnRequests, requests

__all__ = ["OwnRequests", "requests"]
