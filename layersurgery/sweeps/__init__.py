"""Measure many edited models in one pass over the data."""
