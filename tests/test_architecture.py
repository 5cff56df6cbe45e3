"""The floors and fences of the house, held by reading the source; the reader itself is tried on bad examples."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A file imports from lower floors and from its own room; rooms on one floor do not know one another.
FLOORS = {
    "core": 0,
    "nn": 1,
    "models": 2, "methods": 2, "objectives": 2, "data": 2,
    "hub": 3, "training": 3, "decode": 3,
    "source": 4, "evals": 4, "rl": 4,
    "build": 5,
    "weights": 6,
    "export": 7, "plan": 7, "adapted": 7,
    "loaded": 8,
    "api": 9,  # the door from Python
    "sweep": 10,
    "cli": 11,
    "__main__": 12,  # the door from the shell
}  # fmt: skip

# Where under tuning/ a library may be imported; nowhere if the list is empty.
FENCES = {
    "orbax": ["training/checkpoint.py"],
    "tensorboardX": ["training/writer.py"],
    "ml_collections": ["cli/"],
    "optuna": ["sweep/"],
    "matplotlib": ["sweep/"],
    "wandb": ["training/sinks.py"],
    "mlflow": ["training/sinks.py"],
    "datasets": ["data/"],
    "transformers": ["hub/", "data/"],
    "huggingface_hub": ["hub/", "data/"],
    "safetensors": ["hub/", "data/"],
    "tokenizers": ["hub/", "data/"],
    "sentencepiece": ["hub/", "data/"],
    "torch": [],
    "peft": [],
}
TYPES_ANYWHERE = {"transformers", "huggingface_hub", "safetensors", "tokenizers", "sentencepiece"}  # under TYPE_CHECKING

FUNCTION_LINES = 60
FILE_LINES = 400


def problems(path: str, source: str) -> list[str]:
    """What is wrong with a file of tuning/, one line each; `path` is relative to tuning/, as in `nn/norm.py`."""
    if not source.strip():
        return []  # the __init__.py of a room says nothing
    try:
        module = ast.parse(source)
    except SyntaxError as error:
        return [f"{path}:{error.lineno}: not Python {sys.version_info.major}.{sys.version_info.minor}: {error.msg}"]
    return [*form(path, source, module), *imports(path, module)]


def form(path: str, source: str, module: ast.Module) -> list[str]:
    """Docstrings, lengths and prints."""
    found = []
    if not (ast.get_docstring(module, clean=False) or "").split("\n")[0].strip():
        found.append(f"{path}: the first line of its docstring says what the file is")
    if (lines := len(source.splitlines())) > FILE_LINES:
        found.append(f"{path}: {lines} lines, more than {FILE_LINES}")
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES:
                found.append(f"{path}: {node.name} has {lines} lines, more than {FUNCTION_LINES}")
        talks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if talks and not (path.startswith("cli/") or Path(path).name in ("__main__.py", "console.py")):
            found.append(f"{path}:{node.lineno}: print outside cli/")
    return found


def imports(path: str, module: ast.Module) -> list[str]:
    """Floors, fences, and the one form of import."""
    found = []
    for node, for_types, at_import in imported(module):
        here = f"{path}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"{here}: a relative import; write `from tuning.x import y`")
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for name in names:
            library = name.split(".")[0]
            if library != "tuning":
                found += [f"{here}: {wrong}" for wrong in fence(path, library, for_types)]
            elif isinstance(node, ast.Import):
                found.append(f"{here}: `import {name}`; write `from tuning.x import y`")
            else:
                rooms = name.split(".")[1:2] or [alias.name for alias in node.names]
                found += [f"{here}: {wrong}" for room in rooms for wrong in floor(path, room)]
        eager = at_import and not for_types and any(name.split(".")[0] not in STANDARD for name in names)
        if path == "__init__.py" and eager:
            found.append(f"{here}: tuning/__init__.py imports only when it is asked, inside a function")
    return found


STANDARD = {"__future__", "importlib", "typing"}


def imported(module: ast.Module):
    """(import, whether it stands under TYPE_CHECKING, whether it runs when the file is imported) of all imports."""

    def walk(node: ast.AST, for_types: bool, at_import: bool):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, for_types, at_import
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, True, at_import)
            for child in node.orelse:
                yield from walk(child, for_types, at_import)
        else:
            at_import = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, for_types, at_import)

    return walk(module, False, True)


def fence(path: str, library: str, for_types: bool) -> list[str]:
    """Whether a library may be imported here."""
    if library not in FENCES or (for_types and library in TYPES_ANYWHERE):
        return []
    if any(path == place or (place.endswith("/") and path.startswith(place)) for place in FENCES[library]):
        return []
    return [f"{library} belongs in {' and '.join(FENCES[library]) or 'tests'} only"]


def floor(path: str, room: str) -> list[str]:
    """Whether a file may import from a room of tuning/."""
    own = path.split("/")[0].removesuffix(".py")
    if own == "__init__":
        return []
    if missing := [name for name in (own, room) if name not in FLOORS]:
        return [f"tuning/{missing[0]} has no floor; rooms are {', '.join(FLOORS)}"]
    if room == own or FLOORS[room] < FLOORS[own]:
        return []
    return [f"{own} (floor {FLOORS[own]}) imports from {room} (floor {FLOORS[room]})"]


FILES = sorted(path.relative_to(ROOT / "tuning").as_posix() for path in (ROOT / "tuning").rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_the_file_keeps_to_its_floor_and_its_fences(path):
    assert problems(path, (ROOT / "tuning" / path).read_text()) == []


def test_every_room_has_a_floor():
    assert {path.split("/")[0].removesuffix(".py") for path in FILES} - {"__init__"} <= set(FLOORS)


DOC = '"""What this file is."""\n'
LONG = "def f():\n" + "    x = 1\n" * FUNCTION_LINES

BAD = [
    ("nn/a.py", "import jax", "docstring"),
    ("nn/a.py", '"""\nThe first line is empty."""', "docstring"),
    ("core/a.py", DOC + "from tuning.nn import norm", r"core \(floor 0\) imports from nn \(floor 1\)"),
    ("nn/a.py", DOC + "from tuning.models.decoder import Decoder", "floor 2"),
    ("methods/a.py", DOC + "from tuning.models import decoder", "floor 2"),
    ("models/a.py", DOC + "from tuning.objectives import tokens", "floor 2"),
    ("data/a.py", DOC + "def f():\n    from tuning.methods import lora", "floor 2"),
    ("objectives/a.py", DOC + "from tuning.data import loader", "floor 2"),
    ("training/a.py", DOC + "from tuning.hub import files", "floor 3"),
    ("api.py", DOC + "from tuning.sweep import space", "floor 10"),
    ("decode/a.py", DOC + "from tuning.evals import loss", "floor 4"),
    ("evals/a.py", DOC + "from tuning import build", "floor 5"),
    ("build.py", DOC + "from tuning import api", "floor 9"),
    ("export.py", DOC + "from tuning.plan import cost", "floor 7"),
    ("sweep/a.py", DOC + "from tuning.cli import train", "floor 11"),
    ("nn/a.py", DOC + "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tuning.data import loader", "floor 2"),
    ("nn/a.py", DOC + "from tuning import train", "tuning/train has no floor"),
    ("novelty/a.py", DOC + "from tuning.core import tree", "tuning/novelty has no floor"),
    ("nn/a.py", DOC + "from . import norm", "relative"),
    ("nn/a.py", DOC + "from .norm import RMSNorm", "relative"),
    ("nn/a.py", DOC + "import tuning.core.tree", "write `from tuning.x import y`"),
    ("nn/a.py", DOC + "import jax, tuning", "write `from tuning.x import y`"),
    ("training/loop.py", DOC + "import orbax.checkpoint as ocp", "orbax belongs in training/checkpoint.py only"),
    ("training/loop.py", DOC + "from tensorboardX import SummaryWriter", "tensorboardX belongs in training/writer.py only"),
    ("training/loop.py", DOC + "def f():\n    import wandb", "wandb belongs in training/sinks.py only"),
    ("training/writer.py", DOC + "def f():\n    import mlflow", "mlflow belongs in training/sinks.py only"),
    ("cli/compare.py", DOC + "def f():\n    from matplotlib import figure", "matplotlib belongs in sweep/ only"),
    ("cli/sweep.py", DOC + "def f():\n    import optuna", "optuna belongs in sweep/ only"),
    ("build.py", DOC + "from ml_collections import ConfigDict", "ml_collections belongs in cli/ only"),
    ("build.py", DOC + "def f():\n    import transformers", "transformers belongs in hub/ and data/ only"),
    ("evals/a.py", DOC + "from safetensors import safe_open", "safetensors belongs in"),
    ("evals/a.py", DOC + "import huggingface_hub", "huggingface_hub belongs in"),
    ("evals/a.py", DOC + "import tokenizers", "tokenizers belongs in"),
    ("evals/a.py", DOC + "import sentencepiece", "sentencepiece belongs in"),
    (
        "evals/a.py",
        DOC + "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import transformers",
        "transformers belongs in",
    ),
    ("hub/a.py", DOC + "import datasets", "datasets belongs in data/ only"),
    ("hub/a.py", DOC + "import torch", "torch belongs in tests only"),
    ("hub/a.py", DOC + "import typing\nif typing.TYPE_CHECKING:\n    import torch", "torch belongs in tests only"),
    ("cli/a.py", DOC + "from peft.tuners import lora", "peft belongs in tests only"),
    ("__init__.py", DOC + "from tuning.api import train", "only when it is asked"),
    ("__init__.py", DOC + "try:\n    import jax\nexcept ImportError:\n    pass", "only when it is asked"),
    ("training/a.py", DOC + "def f():\n    print(1)", r"training/a.py:3: print outside cli/"),
    ("nn/a.py", DOC + "def f(:", "nn/a.py:2: not Python 3"),
    ("nn/a.py", DOC + LONG, "f has 61 lines"),
    ("nn/a.py", DOC + "class A:\n" + "\n".join("    " + line for line in LONG.splitlines()), "f has 61 lines"),
    ("nn/a.py", DOC + "x = 1\n" * FILE_LINES, "401 lines"),
]


@pytest.mark.parametrize("path, source, message", BAD, ids=range(len(BAD)))
def test_a_bad_file_has_exactly_its_own_problem(path, source, message):
    found = problems(path, source)
    assert len(found) == 1
    assert re.search(message, found[0])


GOOD = [
    ("nn/__init__.py", ""),
    ("core/a.py", DOC + "import jax\nfrom tuning.core.types import Tree"),
    ("models/a.py", DOC + "from tuning.nn import norm\nfrom tuning.models.decoder import Decoder\nfrom tuning.core import tree"),
    ("training/checkpoint.py", DOC + "import orbax.checkpoint as ocp"),
    ("training/writer.py", DOC + "import tensorboardX"),
    ("hub/a.py", DOC + "import transformers, safetensors, tokenizers, sentencepiece, huggingface_hub"),
    ("data/a.py", DOC + "import transformers, datasets"),
    ("evals/a.py", DOC + "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import PreTrainedTokenizerBase"),
    ("build.py", DOC + "from tuning.evals import loss\nfrom tuning.methods import lora"),
    ("cli/a.py", DOC + "import ml_collections\nfrom tuning import api, build\nprint(1)"),
    ("sweep/runners/a.py", DOC + "from tuning import api, build\nfrom tuning.sweep.runners.runner import Job\nimport optuna, matplotlib"),
    ("training/sinks.py", DOC + "def f():\n    import wandb, mlflow"),
    ("training/console.py", DOC + "print(1)"),
    ("__main__.py", DOC + "from tuning.cli import main"),
    ("__init__.py", DOC + "import importlib\ndef __getattr__(name):\n    from tuning.api import train\n    return train"),
    ("nn/a.py", DOC + LONG.replace("    x = 1\n", "", 1)),
    ("nn/a.py", DOC + "x = 1\n" * (FILE_LINES - 1)),
    ("nn/a.py", DOC + "text = 'import torch'"),
]


@pytest.mark.parametrize("path, source", GOOD, ids=range(len(GOOD)))
def test_a_good_file_has_no_problem(path, source):
    assert problems(path, source) == []
