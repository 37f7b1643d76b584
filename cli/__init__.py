"""Command line of layersurgery, installed as `layersurgery_cli`."""
