"""Share checkpoints and results through repositories on the Hub."""
