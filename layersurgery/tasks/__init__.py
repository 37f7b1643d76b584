"""Tasks of lm-eval, measured on all edited models at once."""
