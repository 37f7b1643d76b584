"""Measure text into tables on disk, resumable, with one process or many."""
