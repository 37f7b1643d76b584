"""Draw tables as matplotlib figures."""
