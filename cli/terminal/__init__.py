"""Print to the terminal: messages, tables, charts and progress bars."""
