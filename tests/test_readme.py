"""The README's table of methods is that of the code; `UPDATE_README=1` writes it anew."""

import inspect
import os
import re
import sys
from pathlib import Path

from tuning.cli import train
from tuning.methods import METHODS

README = Path(__file__).resolve().parents[1] / "README.md"
TABLE = re.compile(r"\| `method\.name` .*?\n\n", re.DOTALL)


def table() -> str:
    """A row for each method: the first sentence of its file, and its keys."""
    lines = ["| `method.name` | what it is | keys |", "|---|---|---|"]
    for name, method in METHODS.items():
        what = (sys.modules[method.__module__].__doc__ or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
        keys = ", ".join(f"`{key}`" for key in list(inspect.signature(method).parameters)[1:])
        lines.append(f"| `{name}` | {what} | {keys} |")
    return "\n".join(lines) + "\n\n"


def test_the_readme_lists_every_method_with_its_keys():
    text = README.read_text(encoding="utf-8")
    if os.environ.get("UPDATE_README"):
        README.write_text(TABLE.sub(lambda _: table(), text, count=1), encoding="utf-8")
        text = README.read_text(encoding="utf-8")
    found = TABLE.search(text)
    assert found is not None and found[0] == table()


def test_the_help_of_train_lists_every_method():
    assert f"  method              {', '.join(METHODS)}\n" in train.EPILOG
