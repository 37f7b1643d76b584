"""Find what a Hugging Face model is made of: blocks, branches, config fields."""
