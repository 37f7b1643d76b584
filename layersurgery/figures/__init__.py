"""Draw a table as a matplotlib figure."""
