"""Measure tasks of lm-eval on all edited models at once."""
