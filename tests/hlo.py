"""Counts the arithmetic of a compiled program from its HLO text: every dot, each loop body times its trip count."""

import math
import re


def dot_flops(text: str) -> float:
    """FLOPs of all dots of a compiled module. ValueError for a loop whose trip count is not in the text."""
    bodies = _computations(text)
    entry = next(name for name, (_, is_entry) in bodies.items() if is_entry)
    return _flops(entry, bodies)


def _computations(text: str) -> dict[str, tuple[list[str], bool]]:
    found: dict[str, tuple[list[str], bool]] = {}
    name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line)
        if head:
            name = head[2]
            found[name] = ([], bool(head[1]))
        elif name and line.startswith("  "):
            found[name][0].append(line.strip())
    return found


def _flops(name: str, bodies: dict) -> float:
    lines = bodies[name][0]
    shapes = {m[1]: _dims(m[2]) for line in lines if (m := re.match(r"(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]", line))}
    total = 0.0
    for line in lines:
        if dot := re.match(
            r"(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]*)\]\S* dot\((?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+),.*lhs_contracting_dims=\{([\d,]*)\}", line
        ):
            contracted = math.prod(shapes[dot[2]][axis] for axis in _dims(dot[3]))
            total += 2 * math.prod(_dims(dot[1])) * contracted
        elif " while(" in line:
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            body = re.search(r"body=%?([\w.\-]+)", line)
            if not trips or not body:
                raise ValueError(f"A loop without a known trip count: {line[:200]}")
            total += int(trips[1]) * _flops(body[1], bodies)
        elif " custom-call(" in line and re.search(r"matmul|gemm|dot", line):
            raise ValueError(f"A matmul in a custom call is not counted: {line[:200]}")
        else:
            for called in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line):
                total += _flops(called, bodies)
    return total


def _dims(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
