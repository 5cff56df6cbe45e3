"""What the TPU compiler takes of memory, in a tenth of the time that compiling takes.

The compiler decides where every buffer lies before it makes machine code, which is most of the work, and XLA can be asked to write that
decision down. So the step is compiled in a process of its own, which is ended once that is written.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuning import build
from tuning.core import config as configs
from tuning.plan import compile, hlo, topology
from tuning.plan.compile import Compiled

MODULE = "jit_step"
ASSIGNED, USED = "*.after_optimizations-buffer-assignment.txt", "*.after_optimizations-memory-usage-report.txt"
PROGRAM = "*.after_optimizations_after_buffer_assignment.txt"


def assigned(config: Mapping[str, Any], where: topology.Topology) -> Compiled:
    """The memory, the largest buffers and the exchanges of a config's step, of a program that is not finished: there is no executable.

    A step that is too large for the device has them too. RuntimeError, with what the process said, if it ends before they are there.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tuning-plan-") as folder:
        dumps = Path(folder) / "dumps"
        asked = Path(folder) / "config.json"
        asked.write_text(json.dumps(configs.plain(build.resolve(config))))
        flags = f"--xla_dump_to={dumps} --xla_dump_hlo_as_text --xla_dump_hlo_module_re={MODULE}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
        command = [sys.executable, "-m", "tuning.plan.assigned", str(asked), where.name]
        with (Path(folder) / "said").open("w+") as said:
            child = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
            try:
                found = _awaited(child, dumps)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            if found is None:
                said.seek(0)
                raise RuntimeError(f"The compiler ended before its memory was assigned: {said.read()[-2000:]}")
        assignment, used, text = found
    temporaries = sum(int(n) for n, rest in re.findall(r"^allocation \d+: size (\d+),?(.*)$", assignment, re.M) if _is_temporary(rest))
    total = re.search(r"Total bytes: (\d+)", used)
    assert total is not None
    program = hlo.Program(text)
    return Compiled(
        int(total[1]) - temporaries, 0, 0, temporaries, int(total[1]), time.monotonic() - began, hlo.totals(program.collectives()),
        program.largest(), text, None,
    )  # fmt: skip


def _awaited(child: subprocess.Popen, dumps: Path) -> list[str] | None:
    """The three texts, once all of them are written; None if the process ends without them."""
    while True:
        ended = child.poll() is not None
        files = [next(iter(dumps.glob(pattern)), None) for pattern in (ASSIGNED, USED, PROGRAM)]
        if all(files):
            before = [file.stat().st_size for file in files if file]
            time.sleep(0.5)
            if ended or before == [file.stat().st_size for file in files if file]:
                return [file.read_text() for file in files if file]
        elif ended:
            return None
        time.sleep(0.2)


def _is_temporary(rest: str) -> bool:
    """Whether an allocation is one of temporaries in main memory (colors are others)."""
    return "preallocated-temp" in rest and "color" not in rest


if __name__ == "__main__":
    resolved, name = build.revived(json.loads(Path(sys.argv[1]).read_text())), sys.argv[2]
    compile.compile(build.parts(resolved, sketch=topology.parse(name).targets()))
