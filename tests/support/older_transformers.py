"""Write the logits of checkpoints with the transformers of another environment; not imported, but run as a script.

Each directory holds `tokens.pt`, and a text in `text.txt` if it has a tokenizer. The script writes `older.pt`: the
transformers version, the logits and the token ids of the text.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers


def main(directories: list[str]) -> None:
    """Write `older.pt` into each directory."""
    for name in directories:
        directory = Path(name)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not report["missing_keys"], report
        ids = None
        if (directory / "text.txt").exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
            ids = tokenizer((directory / "text.txt").read_text("utf-8"))["input_ids"]
        with torch.no_grad():
            logits = model.eval().float()(torch.load(directory / "tokens.pt")).logits
        torch.save({"version": transformers.__version__, "logits": logits, "ids": ids}, directory / "older.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
