"""What users would otherwise run: one script for each way, in an environment of its own, all with the same arguments and result."""
