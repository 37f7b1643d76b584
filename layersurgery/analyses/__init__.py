"""Questions to a model, one in each file: each returns a table, and none draws."""
