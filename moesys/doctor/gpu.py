"""What nvidia-smi says about the GPUs of this machine. None without it."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moesys.doctor.command import output
from moesys.doctor.finding import GIB, Finding, Where, fail, ok, warn

HOT_C = 85
BUSY_BYTES = GIB
FIELDS = (
    *("index", "name", "driver_version", "persistence_mode", "temperature.gpu", "clocks.sm"),
    *("clocks.max.sm", "clocks_throttle_reasons.active", "ecc.errors.uncorrected.volatile.total"),
    *("ecc.errors.uncorrected.aggregate.total", "retired_pages.pending", "memory.total"),
    *("memory.used", "pcie.link.width.current", "pcie.link.width.max"),
)
THROTTLES = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
"""Bits of the active reasons that are no choice of an administrator (NVML's nvmlClocksEventReasons)."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A None is what this GPU or driver does not report."""

    index: int
    name: str
    driver: str
    is_persistent: bool | None
    temperature_c: int | None
    clock_mhz: int | None
    max_clock_mhz: int | None
    throttle_bits: int | None
    new_ecc_errors: int | None
    """Uncorrected, since the driver was loaded."""
    all_ecc_errors: int | None
    """Uncorrected, in its life."""
    is_retiring: bool | None
    """Bad memory is taken out of use at the next reset."""
    memory_bytes: int
    used_bytes: int
    lanes: int | None
    max_lanes: int | None


def parse(csv: str) -> list[Gpu]:
    """Of `nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits`."""
    return [_gpu([word.strip() for word in line.split(",")]) for line in csv.splitlines() if line]


def judge_gpus(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """One line for all that are well, one for each thing that is not."""
    if not gpus:
        yield fail(
            "GPU health",
            "nvidia-smi is there and shows no GPU",
            "see dmesg for NVRM or Xid; reload the driver, reboot the node, or take it out",
        )
        return
    yield ok(
        "GPU driver", f"{gpus[0].driver}, {len(gpus)} GPUs, {', '.join({gpu.name for gpu in gpus})}"
    )
    found = [finding for gpu in gpus for finding in judge_gpu(gpu)]
    if not found:
        hottest = max((gpu.temperature_c or 0 for gpu in gpus), default=0)
        yield ok("GPU health", f"no errors, no throttling, at most {hottest} C")
    yield from found


def judge_gpu(gpu: Gpu) -> Iterator[Finding]:
    """What is wrong with this one."""
    name = f"GPU {gpu.index}"
    if gpu.new_ecc_errors:
        yield fail(
            f"{name} memory",
            f"{gpu.new_ecc_errors} uncorrected ECC errors since the driver was loaded",
            f"exclude the node; nvidia-smi --gpu-reset -i {gpu.index}, and replace it if they return",
        )
    elif gpu.is_retiring:
        yield fail(
            f"{name} memory",
            "bad memory waits to be taken out of use",
            f"nvidia-smi --gpu-reset -i {gpu.index} with no job on it, or reboot the node",
        )
    elif gpu.all_ecc_errors:
        yield warn(
            f"{name} memory",
            f"{gpu.all_ecc_errors} uncorrected ECC errors in its life, none since the driver was loaded",
            "watch it; replace it if the number grows",
        )
    reasons = [text for bit, text in THROTTLES.items() if (gpu.throttle_bits or 0) & bit]
    if reasons:
        yield fail(
            f"{name} clocks",
            f"slowed down ({', '.join(reasons)}) to {gpu.clock_mhz} of {gpu.max_clock_mhz} MHz",
            "exclude the node until its cooling and power supply were looked at",
        )
    elif (gpu.temperature_c or 0) >= HOT_C:
        yield warn(
            f"{name} temperature",
            f"{gpu.temperature_c} C",
            "look at the node's cooling and its inlet",
        )
    if gpu.lanes and gpu.max_lanes and gpu.lanes < gpu.max_lanes:
        yield warn(
            f"{name} PCIe",
            f"{gpu.lanes} of {gpu.max_lanes} lanes",
            "reseat the card or its riser: copies from and to the host take longer",
        )
    if gpu.used_bytes > BUSY_BYTES:
        yield warn(
            f"{name} in use",
            f"{gpu.used_bytes / GIB:.1f} of {gpu.memory_bytes / GIB:.0f} GiB are taken",
            "end what a former job left: nvidia-smi --query-compute-apps=pid,name --format=csv",
        )
    if gpu.is_persistent is False:
        yield warn(
            f"{name} persistence",
            "off: the driver unloads between jobs, and the first start takes seconds longer",
            "nvidia-smi -pm 1, or the service nvidia-persistenced",
        )


def gpus(where: Where) -> list[Finding]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    csv = output(query, timeout_s=10.0)
    if csv is None:
        return [judge_silent_driver()]
    return list(judge_gpus(parse(csv)))


def judge_silent_driver() -> Finding:
    return fail(
        "GPU health",
        "nvidia-smi is there and fails",
        "run nvidia-smi: a driver and library of two versions want a reboot; see dmesg for NVRM or Xid",
    )


def _gpu(words: list[str]) -> Gpu:
    values = dict(zip(FIELDS, words, strict=True))

    def number(field: str) -> int | None:
        try:
            return int(values[field], 0)
        except ValueError:  # [N/A], [Not Supported]
            return None

    def flag(field: str) -> bool | None:
        return {"Enabled": True, "Yes": True, "Disabled": False, "No": False}.get(values[field])

    mib = 2**20
    return Gpu(
        index=int(values["index"]),
        name=values["name"],
        driver=values["driver_version"],
        is_persistent=flag("persistence_mode"),
        temperature_c=number("temperature.gpu"),
        clock_mhz=number("clocks.sm"),
        max_clock_mhz=number("clocks.max.sm"),
        throttle_bits=number("clocks_throttle_reasons.active"),
        new_ecc_errors=number("ecc.errors.uncorrected.volatile.total"),
        all_ecc_errors=number("ecc.errors.uncorrected.aggregate.total"),
        is_retiring=flag("retired_pages.pending"),
        memory_bytes=(number("memory.total") or 0) * mib,
        used_bytes=(number("memory.used") or 0) * mib,
        lanes=number("pcie.link.width.current"),
        max_lanes=number("pcie.link.width.max"),
    )
