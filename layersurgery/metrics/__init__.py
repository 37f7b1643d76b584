"""Compare predictions token by token: definitions, kernels, and sums over sequences."""
