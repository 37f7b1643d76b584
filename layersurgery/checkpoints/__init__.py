"""Edit the files of a checkpoint without loading the model."""
