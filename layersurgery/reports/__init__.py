"""Write one self-contained HTML page from directories of results."""
