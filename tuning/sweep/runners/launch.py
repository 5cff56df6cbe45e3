"""Launch files: the templates of launch/, filled in, shown or written, and handed to whoever runs them.

In a template `${name}`, in small letters, is filled in by a runner; whatever else starts with $ is the shell's own.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tuning.core import parts
from tuning.sweep.runners.runner import Job

ROOT = Path(__file__).resolve().parents[3]  # of the repository


def fill(standard: str, given: str, values: Mapping[str, str]) -> str:
    """The text of launch/STANDARD, or of the file GIVEN in its place, with the values. ValueError for a name that has none."""
    path = Path(given) if given else ROOT / "launch" / standard
    if not path.is_file():
        raise ValueError(
            f"There is no template {path}. launch/{standard} of the repository is the usual one; --runner.template=FILE names yours."
        )

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(
                f"{path}: nothing is known to fill in for {match[0]}.{parts.suggestion(match[1], values)} There are: {', '.join(values)}."
            )
        return values[match[1]]

    return re.sub(r"\$\{([a-z_]+)\}", value, path.read_text())


def shell(value: object) -> str:
    """A value, or a list of words, quoted for a shell."""
    return shlex.join(map(str, value)) if isinstance(value, list) else shlex.quote(str(value))


def name(job: Job, given: str) -> str:
    """What the sweep is called where names are small letters, digits and hyphens, and short."""
    made = given or re.sub(r"[^a-z0-9]+", "-", f"tuning-{job.directory.name}".lower())[:40].strip("-")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", made):
        raise ValueError(
            f"--runner.name={made} must be small letters, digits and hyphens, begin with a letter, and have at most 40 of them."
        )
    return made


def elsewhere(job: Job, directory: str) -> Path:
    """Where the workers see the sweep's directory: here, if nothing else is given."""
    if directory and not directory.startswith("/"):
        raise ValueError(f"--runner.directory={directory} must be the whole path, from /, under which the workers see {job.directory}.")
    return Path(directory) if directory else job.directory


def ready(job: Job, files: Mapping[Path, str], commands: Sequence[Sequence[str]], program: str) -> bool:
    """Writes the files, so that the commands can be executed; in a dry run it shows all of them instead, and returns False.

    ValueError if the program that the commands need is not on this machine.
    """
    if job.dry_run:
        for path, text in files.items():
            job.say(f"# {path}\n{text}")
        for command in commands:
            job.say(f"$ {shlex.join(command)}")
        return False
    if shutil.which(program) is None:
        raise ValueError(f"{program} is not on this machine's PATH. Start the sweep where it is; --dry_run shows what would be executed.")
    (job.directory / "workers").mkdir(parents=True, exist_ok=True)  # where logs go
    for path, text in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return True


def submit(job: Job, files: Mapping[Path, str], commands: Sequence[Sequence[str]]) -> int:
    """Writes the files and executes the commands, one after the other until one fails; returns its exit status, or 0."""
    if ready(job, files, commands, commands[0][0]):
        for command in commands:
            job.say(f"$ {shlex.join(command)}")
            if status := subprocess.run(command, check=False).returncode:
                return status
    return 0
