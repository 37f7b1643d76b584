"""Edit a loaded model in memory, and undo it exactly."""
