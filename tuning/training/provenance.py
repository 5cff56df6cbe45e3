"""Where a run comes from: code, packages, devices, data and command, without the secrets that were given on the way."""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy", "tuning")
HIDDEN = "***"

# The last word of a key that holds a secret, as in --config.hub.token, WANDB_API_KEY or db-password; num_tokens and eos_token hold none.
SECRET = re.compile(
    r"(^|[._-])(token|secret|passw(or)?d|passphrase|credentials?|api[_-]?key|(access|private|secret|auth)[_-]?key)$", re.IGNORECASE
)
HARMLESS = re.compile(
    r"(^|[._-])(bos|eos|pad|unk|sep|cls|mask|image|audio|start|end|stop|first|last|per|num|max|min|by|new|special)[_-]token$", re.IGNORECASE
)
KNOWN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")  # Hugging Face tokens; user:password in an address


def collect(argv: Sequence[str], data_digests: Mapping[str, str]) -> dict[str, Any]:
    """Everything as values that JSON takes.

    argv          the command line
    data_digests  {name of a data source: digest of its content}
    `git` is absent where the code does not stand in a checkout, a package where it is not installed.
    """
    devices = jax.devices()
    facts = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": redact(argv),
        "data": dict(data_digests),
        "python": platform.python_version(),
        "packages": _packages(),
        "platform": platform.platform(),
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
    }
    git = _git(pathlib.Path(__file__).resolve())
    return {**facts, "git": git} if git else facts


def redact(argv: Sequence[str]) -> list[str]:
    """A command line with `***` for secrets: values of keys that name one, values of environment variables that hold one, known forms."""
    clean, hide = [], False
    for word in argv:
        key, equals, value = word.partition("=")
        if hide and not word.startswith("--"):
            word, hide = HIDDEN, False
        elif equals and is_secret(key):
            word = f"{key}={HIDDEN if value else ''}"
        else:
            hide = not equals and word.startswith("-") and is_secret(word)
        clean.append(redact_text(word))
    return clean


def redact_text(text: str) -> str:
    """A text without the values of secret environment variables (also in base64 or URL-encoded) and without known forms of secrets."""
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= 6:
            encoded = base64.b64encode(value.encode()).decode()
            for form in (value, urllib.parse.quote(value, safe=""), encoded, encoded.rstrip("=")):
                text = text.replace(form, HIDDEN)
    return KNOWN.sub(HIDDEN, text)


def is_secret(key: str) -> bool:
    """Whether a key or an environment variable names a secret."""
    return SECRET.search(key) is not None and HARMLESS.search(key) is None


def _packages() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(file: pathlib.Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks a file, and whether anything in it was changed since; None if there is none."""

    def git(*command: str) -> str:
        run = ["git", "-C", str(file.parent), *command]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # an installed copy may lie inside somebody else's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": git("status", "--porcelain") != ""}
    except (OSError, subprocess.SubprocessError):
        return None
