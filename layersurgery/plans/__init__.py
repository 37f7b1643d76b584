"""Describe edits as plain values: routes, edits, plans and families. No torch."""
