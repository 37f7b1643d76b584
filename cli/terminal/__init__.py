"""Output on the terminal: messages, tables, charts and progress bars."""
