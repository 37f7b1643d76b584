"""Hold one model and one text for several measurements."""
