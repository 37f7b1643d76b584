"""Run blocks one by one, capture activations, and fit a model to its devices."""
