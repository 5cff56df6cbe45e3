"""Text that every Python carries: its language reference (`pydoc_data.topics`) and the docstrings of its standard library."""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "pydoc_data"}


def docstrings() -> Iterator[tuple[str | None, str]]:
    """(signature of a function, or None for modules and classes; docstring) for everything in the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # deliberately broken files
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
                function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                yield f"def {node.name}({ast.unparse(node.args)})" if function else None, text.strip()


def held_out(answer: str) -> bool:
    """One answer in ten, chosen by its text: the same on every machine, and no answer stands on both sides."""
    return hashlib.sha256(answer.encode()).digest()[0] % 10 == 0


def write(directory: Path) -> dict[str, int]:
    """Writes text.jsonl (for the base model), train.jsonl and eval.jsonl (signature -> first line of the docstring); returns row counts."""
    from pydoc_data.topics import topics

    pairs = {(signature, text.splitlines()[0].strip()) for signature, text in docstrings() if signature}
    pairs = sorted(pair for pair in pairs if len(pair[1]) > 8)
    secret = {answer for _, answer in pairs if held_out(answer)}
    texts = dict.fromkeys(list(topics.values()) + [text for _, text in docstrings()])
    # The base model must not have read the answers it is later asked for.
    texts = [text for text in texts if not secret & {line.strip() for line in text.splitlines()}]
    rows = {
        "text": [{"text": text} for text in texts],
        "train": [{"prompt": s, "completion": a} for s, a in pairs if a not in secret],
        "eval": [{"prompt": s, "completion": a} for s, a in pairs if a in secret],
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, items in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return {name: len(items) for name, items in rows.items()}


def train_tokenizer(data: Path, directory: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer of the text and the training pairs, saved as Hugging Face has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = [json.loads(line) for name in ("text", "train") for line in (data / f"{name}.jsonl").open(encoding="utf-8")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|end|>", "<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for line in lines for text in line.values()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.save_pretrained(directory)
