"""One self-contained page of everything that results directories hold."""
