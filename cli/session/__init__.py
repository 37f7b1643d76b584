"""One model and one text, held for several measurements."""
