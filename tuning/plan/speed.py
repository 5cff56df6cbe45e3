"""From FLOPs to time, money and energy, each with the source it stands on; what has no source is None, and says why.

Utilisation is causal: model FLOPs as training/flops.py counts them (attention causal, frozen leaves and rematerialisation not counted),
by the peak of dense bfloat16. Published throughputs that were counted by other rules are counted anew; those in 8 bits are left out, since
no one peak is theirs.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tuning.core import chips, parts
from tuning.core.chips import CHIPS, Chip
from tuning.hub import files
from tuning.training import workdir, writer

APART = 4.0  # models that differ by more than this factor in size tell nothing of one another's utilisation


class Throughput(NamedTuple):
    """What others measured: bfloat16, rows packed full.

    chip     a key of CHIPS
    method   full or lora (rank 16 on all projections)
    model    a key of MODELS
    length   tokens in a row
    devices, tokens_per_second   JAX devices, and tokens/s of each
    mfu      the share of the peak that this is
    """

    chip: str
    method: str
    model: str
    length: int
    devices: int
    tokens_per_second: float
    mfu: float
    source: str


class Model(NamedTuple):
    """How many parameters a model of hub/known.py has in all, and whether it is a mixture of experts."""

    parameters: int
    routed: bool = False


MODELS = {
    "Qwen/Qwen2.5-7B": Model(7_615_616_512),
    "Qwen/Qwen2.5-32B": Model(32_763_876_352),
    "Qwen/Qwen3-30B-A3B": Model(30_532_122_624, routed=True),
    "meta-llama/Llama-2-7b-hf": Model(6_738_415_616),
    "meta-llama/Llama-2-70b-hf": Model(68_976_648_192),
    "meta-llama/Llama-3.1-8B": Model(8_030_261_248),
    "meta-llama/Llama-3.1-70B": Model(70_553_706_496),
    "meta-llama/Llama-3.1-405B": Model(405_853_388_800),
    "mistralai/Mixtral-8x7B-v0.1": Model(46_702_792_704, routed=True),
}

AUTOMODEL = "NVIDIA-NeMo/Automodel, docs/performance-summary.mdx"
TOOLBOX = "NVIDIA/JAX-Toolbox, docs/frameworks/maxtext/README.md"
MAXTEXT = "AI-Hypercomputer/maxtext, docs/reference/models/tiering.md"
RECIPES = "AI-Hypercomputer/tpu-recipes, training/ironwood/README.md"

PUBLISHED = tuple(
    Throughput(*row)
    for row in (
        ("h100", "lora", "meta-llama/Llama-3.1-8B", 4096, 1, 12_472.87, 0.4224, AUTOMODEL),
        ("h100", "lora", "Qwen/Qwen2.5-7B", 4096, 1, 14_110.05, 0.4421, AUTOMODEL),
        ("h100", "lora", "meta-llama/Llama-3.1-70B", 4096, 8, 1_091.85, 0.3261, AUTOMODEL),
        ("h100", "lora", "meta-llama/Llama-3.1-70B", 4096, 16, 984.85, 0.2941, AUTOMODEL),
        ("h100", "lora", "Qwen/Qwen2.5-32B", 4096, 8, 2_250.31, 0.3113, AUTOMODEL),
        ("h100", "lora", "Qwen/Qwen2.5-32B", 4096, 16, 2_072.89, 0.2867, AUTOMODEL),
        ("h100", "full", "meta-llama/Llama-2-7b-hf", 4096, 8, 11_361, 0.4924, TOOLBOX),
        ("h100", "full", "meta-llama/Llama-3.1-70B", 8192, 64, 866.77, 0.3937, AUTOMODEL),
        ("h100", "full", "Qwen/Qwen3-30B-A3B", 4096, 8, 12_040, 0.2810, AUTOMODEL),
        ("v5p", "full", "meta-llama/Llama-2-70b-hf", 4096, 512, 692, 0.6458, MAXTEXT),
        ("v5p", "full", "mistralai/Mixtral-8x7B-v0.1", 4096, 256, 2_909, 0.5052, MAXTEXT),
        ("v6e", "full", "meta-llama/Llama-3.1-8B", 8192, 256, 7_207, 0.4041, MAXTEXT),
        ("v6e", "full", "meta-llama/Llama-2-70b-hf", 4096, 256, 900, 0.4200, MAXTEXT),
        ("v6e", "full", "meta-llama/Llama-3.1-70B", 8192, 256, 960, 0.4698, MAXTEXT),
        ("v6e", "full", "meta-llama/Llama-3.1-405B", 8192, 256, 123, 0.3382, MAXTEXT),
        ("v6e", "full", "mistralai/Mixtral-8x7B-v0.1", 4096, 256, 3_899, 0.3386, MAXTEXT),
        # Published for chips, which are two devices each.
        ("tpu7x", "full", "meta-llama/Llama-3.1-70B", 8192, 128, 2_686.98 / 2, 0.5232, RECIPES),
        ("tpu7x", "full", "meta-llama/Llama-3.1-70B", 131_072, 512, 963.03 / 2, 0.3892, RECIPES),
        ("tpu7x", "full", "meta-llama/Llama-3.1-405B", 8192, 512, 499.77 / 2, 0.5468, RECIPES),
    )
)


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Model FLOPs utilisation, a share of 1, and what it was measured on; None, and why."""

    mfu: float | None
    source: str


def efficiency(chip: Chip, parameters: int, method: str, length: int, devices: int, routed: bool = False) -> Efficiency:
    """The utilisation of the nearest published run on that chip: the same way of tuning first, then the nearest size, length and number.

    parameters  of the model, in all; routed, whether it is a mixture of experts: neither kind stands for the other
    method      full or lora, whichever the FLOPs are more like; the source says what was measured
    """
    same = [row for row in PUBLISHED if row.chip == chip.name]
    apart = {name: _ratio(model.parameters, parameters) for name, model in MODELS.items() if model.routed == routed}
    near = [row for row in same if apart.get(row.model, math.inf) <= math.log(APART)]
    if not near:
        what = f"{'a mixture of experts' if routed else 'a dense model'} of about {parameters / 1e9:.3g}B parameters"
        has = f"there is {', '.join(dict.fromkeys(row.model for row in same))}" if same else "there is none at all"
        return Efficiency(None, f"no throughput of {what} on {chip.name} is on file ({has}); measure a run, and give its directory")
    nearness = lambda row: (row.method != method, apart[row.model], _ratio(row.length, length), _ratio(row.devices, devices))  # noqa: E731
    row = min(near, key=nearness)
    ran = f"{row.method} tuning of {row.model} in bfloat16, {row.length} tokens a row, {row.devices} devices"
    return Efficiency(row.mfu, f"{ran}: {row.tokens_per_second:,.0f} tokens/s each ({row.source})")


def _ratio(a: float, b: float) -> float:
    """How far apart two numbers are, as the logarithm of their ratio."""
    return abs(math.log(a / b))


def measured(run: Path, chip: Chip) -> Efficiency:
    """The utilisation that a run of ours had: the median over its lines but the first, whose time has the compilation in it.

    ValueError if the directory is not a run's, or if it ran on something else.
    """
    if not workdir.is_run(run):
        raise ValueError(f"{run} is not a run's directory: it has no provenance.json. Give the --workdir of a run.")
    where = files.read_json(run / "provenance.json")["devices"]
    if chips.of(where["kind"]) != chip:
        raise ValueError(f"The run in {run} was on {where['count']} x {where['kind']}, which tells nothing of {chip.name}. Plan for that.")
    values = [line["time/mfu"] for line in writer.read(run / writer.METRICS) if line.get("time/mfu")][1:]
    if not values:
        return Efficiency(None, f"{run} has no time/mfu after its first line: it is too short, or {chip.name} has no peak")
    return Efficiency(statistics.median(values), f"{run}: median of {len(values)} lines, {where['count']} x {where['kind']}")


@dataclasses.dataclass(frozen=True)
class Prices:
    """What one JAX device costs for an hour, by the names of CHIPS; None where no price is known."""

    file: str
    date: str | None
    currency: str | None
    per_device_hour: Mapping[str, float | None]


def read_prices(file: Path) -> Prices:
    """A price table as JSON; prices.json beside this file is an empty one. ValueError for what is wrong in it."""
    if not file.is_file():
        raise ValueError(f"{file}: there is no such price table. Copy {Path(__file__).with_name('prices.json')} and fill it in.")
    raw = files.read_json(file)
    if wrong := sorted((set(raw) ^ {"date", "currency", "per_device_hour"}) - {"explanation"}):
        raise ValueError(
            f"{file}: {wrong[0]} is {'not a key of a price table' if wrong[0] in raw else 'missing'}. It has date, currency, "
            "per_device_hour and, if you like, explanation."
        )
    if not isinstance(table := raw["per_device_hour"], dict):
        raise ValueError(f"{file}: per_device_hour={table!r} must be an object with a price or null for each chip.")
    for name, price in table.items():
        if name not in CHIPS:
            raise ValueError(f"{file}: per_device_hour has {name!r}, not one of {', '.join(CHIPS)}.{parts.suggestion(name, CHIPS)}")
        if price is not None and (isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < math.inf):
            raise ValueError(f"{file}: the price of {name} is {price!r}; it must be a number of at least 0, or null.")
    if any(price is not None for price in table.values()):
        if not isinstance(raw["currency"], str) or not raw["currency"]:
            raise ValueError(f'{file}: currency={raw["currency"]!r}, but there are prices. Say which, as in "USD".')
        try:
            datetime.date.fromisoformat(raw["date"])
        except (TypeError, ValueError):
            raise ValueError(f'{file}: date={raw["date"]!r} must be the day of the prices, as in "2026-01-31".') from None
    return Prices(str(file), raw["date"], raw["currency"], table)


def seconds_per_step(flops: float, chip: Chip, devices: int, efficiency: Efficiency) -> float | None:
    """Time of an update of `flops` model FLOPs in all; None without a peak or a utilisation."""
    if chip.peak_flops is None or efficiency.mfu is None:
        return None
    return flops / (devices * chip.peak_flops * efficiency.mfu)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run takes. `sources` says of every figure what it stands on, or why it is None.

    seconds_per_step   of an update
    tokens_per_second  of all devices
    hours              of all steps, without compiling, evaluating and saving
    cost               in `currency`, of the devices
    kilowatt_hours     at most, of the devices
    """

    seconds_per_step: float | None
    tokens_per_second: float | None
    hours: float | None
    cost: float | None
    currency: str | None
    kilowatt_hours: float | None
    sources: dict[str, str]


def estimate(
    flops: float, tokens: float, steps: int, chip: Chip, devices: int, efficiency: Efficiency, prices: Prices | None = None
) -> Estimate:
    """Time, money and energy of `steps` updates of `flops` model FLOPs and `tokens` tokens each, on all devices together."""
    seconds = seconds_per_step(flops, chip, devices, efficiency)
    timed = efficiency.source if chip.peak_flops else f"{chip.name} has no peak on file"
    hours = None if seconds is None else seconds * steps / 3600

    def spent(per_hour: float | None, why: str) -> tuple[float | None, str]:
        if per_hour is None or hours is None:
            return None, why if per_hour is None else timed
        return per_hour * devices * hours, why

    cost, priced = spent(*_price(chip, prices))
    energy, powered = spent(*_power(chip))
    return Estimate(
        seconds, None if seconds is None else tokens / seconds, hours, cost, prices.currency if prices else None, energy,
        {**dict.fromkeys(("seconds_per_step", "tokens_per_second", "hours"), timed), "cost": priced, "kilowatt_hours": powered},
    )  # fmt: skip


def _price(chip: Chip, prices: Prices | None) -> tuple[float | None, str]:
    """What a device costs for an hour, and where that is from."""
    if prices is None:
        return None, "no price table was given"
    if (price := prices.per_device_hour.get(chip.name)) is None:
        return None, f"no price for {chip.name} in {prices.file}"
    return price, f"{price} {prices.currency} per device and hour on {prices.date} ({prices.file})"


def _power(chip: Chip) -> tuple[float | None, str]:
    """Kilowatts of a device, and where that is from."""
    if chip.watts is None:
        return None, f"no power of {chip.name} is on file"
    return chip.watts / 1000, f"{chip.watts:g} W per device at most ({chip.sources['watts']}), without hosts, network and cooling"
