"""Facts for every branch of every local judge, and the level that each must come to."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moesys.doctor import (
    checkpoint,
    clock,
    disk,
    exchange,
    gpu,
    host,
    network,
    runner,
    software,
    torch_build,
)
from moesys.doctor.finding import GIB, Finding, Level


@dataclass(frozen=True)
class Case:
    level: Level
    """Of the worst finding."""
    says: str
    """A part of its detail."""
    findings: Sequence[Finding]


def case(level: Level, says: str, *findings: Finding) -> Case:
    return Case(level, says, findings)


ETH = network.Interface(
    name="eth0", is_up=True, mtu=1500, mbit_per_s=1000, addresses=("10.0.0.1", "fe80::1")
)
LO = network.Interface(name="lo", is_up=True, mtu=65536, mbit_per_s=None, addresses=("127.0.0.1",))
DOWN = replace(ETH, name="ib0", is_up=False)
GPU = gpu.Gpu(
    index=3,
    name="NVIDIA H200",
    driver="580.1",
    is_persistent=True,
    temperature_c=40,
    clock_mhz=1980,
    max_clock_mhz=1980,
    throttle_bits=1,
    new_ecc_errors=0,
    all_ecc_errors=0,
    is_retiring=False,
    memory_bytes=140 * GIB,
    used_bytes=0,
    lanes=16,
    max_lanes=16,
)


def gpu_case(level: Level, says: str, **facts: object) -> Case:
    return case(level, says, *gpu.judge_gpus([replace(GPU, **facts)]))  # type: ignore[arg-type]


CASES = [
    case("ok", "3.12.1", software.judge_python((3, 12), "3.12.1 at python")),
    case("fail", "3.10.9", software.judge_python((3, 10), "3.10.9 at python")),
    case("fail", "3.14.0", software.judge_python((3, 14), "3.14.0 at python")),
    case("ok", "2.13.0+cpu", software.judge_torch("2.13.0+cpu")),
    case("fail", "2.9.1", software.judge_torch("2.9.1")),
    case("fail", "not installed", software.judge_torch(None)),
    case("ok", "numpy 2.1", software.judge_core({"numpy": "2.1"})),
    case("fail", "rich is missing", software.judge_core({"numpy": "2.1", "rich": None})),
    case("ok", "wandb 1; absent: triton", software.judge_optional({"wandb": "1", "triton": None})),
    case("ok", "none; absent: none", software.judge_optional({})),
    case("ok", "not known", software.judge_constraints({"numpy": "2.1"}, None)),
    case("ok", "as in", software.judge_constraints({"numpy": "2.1", "x": None}, {"numpy": "2.1"})),
    case(
        "warn",
        "numpy 2.1 (2.4.6 is tested)",
        software.judge_constraints({"numpy": "2.1"}, {"numpy": "2.4.6"}),
    ),
    case("ok", "absent", software.judge_apex(None)),
    case("ok", "NVIDIA's", software.judge_apex({"optimizers"})),
    case("fail", "a web toolkit", software.judge_apex({"i18n"})),
    case("ok", "g++ 12", software.judge_cxx("g++", "g++ 12")),
    case("warn", "icpx is not found", software.judge_cxx("icpx", "")),
    case("ok", "release 13", software.judge_nvcc("release 13", True)),
    case("ok", "CPUs only", software.judge_nvcc("", False)),
    case("warn", "on a machine with GPUs", software.judge_nvcc("", True)),
    case("ok", "8 of 16 usable", host.judge_cores(8, 16, None, "4")),
    case("warn", "limited to the time of 1.5", host.judge_cores(8, 16, 1.5, None)),
    case("warn", "OMP_NUM_THREADS 64", host.judge_cores(8, 16, 8.0, "64")),
    case("ok", "20.0 of 24.0", host.judge_memory(20 * GIB, 24 * GIB, None)),
    case(
        "ok",
        "4.0 of 24.0 GiB available, limited by",
        host.judge_memory(20 * GIB, 24 * GIB, 4 * GIB),
    ),
    case("warn", "1.0 of 24.0", host.judge_memory(20 * GIB, 24 * GIB, GIB)),
    case("warn", "1.0 of 24.0", host.judge_memory(GIB, 24 * GIB, None)),
    case("ok", "8.0 of 8.0", host.judge_shared_memory(8 * GIB, 8 * GIB)),
    case("warn", "0.1 of 0.1", host.judge_shared_memory(2**26, 2**26)),
    case("warn", "0.0 of 8.0", host.judge_shared_memory(8 * GIB, 0)),
    case("fail", "no such thing", host.judge_shared_memory(None, 0, "no such thing")),
    case("ok", "unlimited", host.judge_open_files(-1, -1)),
    case("ok", "4096", host.judge_open_files(4096, 4096)),
    case("warn", "1024", host.judge_open_files(1024, 1_048_576)),
    case("warn", "at most 2048", host.judge_open_files(1024, 2048)),
    case("ok", "unlimited", host.judge_processes(-1)),
    case("warn", "100", host.judge_processes(100)),
    case("ok", "no InfiniBand", host.judge_locked_memory(65536, False)),
    case("ok", "unlimited", host.judge_locked_memory(-1, True)),
    case("fail", "1 GiB", host.judge_locked_memory(GIB, True)),
    case("ok", "eth0 mtu 1500 1 Gbit/s 10.0.0.1", network.judge_interfaces([LO, ETH], ["eth0"])),
    case("warn", "none is up", network.judge_interfaces([LO, DOWN], [])),
    case("warn", "mtu 1000", network.judge_interfaces([replace(ETH, mtu=1000)], [])),
    case("warn", "100 Gbit/s", network.judge_interfaces([replace(ETH, mbit_per_s=100_000)], [])),
    case("ok", "through eth0", network.judge_route(["eth0"], [LO, ETH])),
    case("ok", "nor a network", network.judge_route([], [LO, DOWN])),
    case("warn", "wrong one", network.judge_route([], [LO, ETH])),
    case("ok", "eth0", network.judge_choice("GLOO_SOCKET_IFNAME", "eth0", [LO, ETH])),
    case(
        "fail",
        "up are lo, eth0",
        network.judge_choice("GLOO_SOCKET_IFNAME", "eth", [LO, ETH, DOWN]),
    ),
    case("ok", "eth: eth0", network.judge_choice("NCCL_SOCKET_IFNAME", "eth", [LO, ETH])),
    case("ok", "^lo: eth0", network.judge_choice("NCCL_SOCKET_IFNAME", "^lo", [LO, ETH])),
    case("fail", "=eth", network.judge_choice("NCCL_SOCKET_IFNAME", "=eth", [LO, ETH])),
    case("ok", "none", network.judge_infiniband([])),
    case("ok", "ACTIVE", network.judge_infiniband([("mlx5_0:1", "4: ACTIVE", "400 Gb/sec")])),
    case("fail", "DOWN", network.judge_infiniband([("mlx5_0:1", "1: DOWN", "10 Gb/sec")])),
    case(
        "warn",
        "mlx5_1:1 1: DOWN",
        network.judge_infiniband(
            [("mlx5_0:1", "4: ACTIVE", "400 Gb/sec"), ("mlx5_1:1", "1: DOWN", "10 Gb/sec")]
        ),
    ),
    case(
        "ok",
        "n1 is 127.0.1.1, 10.0.0.1",
        network.judge_name("n1", ["127.0.1.1", "10.0.0.1"], 0.0, None),
    ),
    case("warn", "n1 is 127.0.1.1", network.judge_name("n1", ["127.0.1.1"], 0.0, None)),
    case("ok", "gloo goes by", network.judge_name("n1", ["127.0.1.1"], 0.0, "eth0")),
    case("fail", "no address", network.judge_name("n1", [], 0.0, None)),
    case("warn", "no address", network.judge_name("n1", [], 0.0, "eth0")),
    case("warn", "after 5.0 s", network.judge_name("n1", ["10.0.0.1"], 5.0, None)),
    case("ok", "29500 is free", network.judge_port(29500, True)),
    case("warn", "29500 is in use", network.judge_port(29500, False)),
    case("ok", "32768 to 60999", network.judge_port_range(32768, 60999)),
    case("warn", "101 in all", network.judge_port_range(50000, 50100)),
    case("ok", "writes 200 MB/s", disk.judge_disk("d", 9 * GIB, 200, 900, True)),
    case("warn", "0.5 GiB free", disk.judge_disk("d", GIB // 2, 200, 900, True)),
    case("warn", "writes 20 MB/s", disk.judge_disk("d", 9 * GIB, 20, 900, True)),
    case("fail", "not what was written", disk.judge_disk("d", 9 * GIB, 200, 900, False)),
    case("fail", "5 bytes needed, 3 free", disk.judge_disk_error("d", errno.ENOSPC, 5, 3)),
    case("fail", "not for you", disk.judge_disk_error("d", errno.EDQUOT, 5, 3)),
    case("fail", "Read-only", disk.judge_disk_error("d", errno.EROFS, 5, 3)),
    case("fail", "Permission denied", disk.judge_disk_error("d", errno.EACCES, 5, 3)),
    case("ok", "not limited", disk.judge_files("d", 0, 0)),
    case("ok", "50,000 of 60,000", disk.judge_files("d", 50_000, 60_000)),
    case("warn", "5 of 60,000", disk.judge_files("d", 5, 60_000)),
    case("fail", "0 of 60,000", disk.judge_files("d", 0, 60_000)),
    case("ok", "no quota", disk.judge_quota(None)),
    case("ok", "within", disk.judge_quota("/home 100 200 300")),
    case("warn", "/home 250*", disk.judge_quota("Filesystem blocks\n/home 250* 200 300 6days")),
    case("ok", "does not say", clock.judge_sync(None)),
    case("ok", "synchronised", clock.judge_sync(True)),
    case("warn", "not synchronised", clock.judge_sync(False)),
    case("ok", "within 1 s", clock.judge_file_clock("d", -0.2)),
    case("warn", "5.0 s behind", clock.judge_file_clock("d", -5.0)),
    case("fail", "90.0 s ahead of", clock.judge_file_clock("d", 90.0)),
    gpu_case("ok", "at most 40 C"),
    gpu_case("ok", "at most 0 C", temperature_c=None, throttle_bits=None, lanes=None),
    case("fail", "shows no GPU", *gpu.judge_gpus([])),
    case("fail", "fails", gpu.judge_silent_driver()),
    gpu_case("fail", "2 uncorrected ECC errors since", new_ecc_errors=2),
    gpu_case("fail", "waits to be taken out", is_retiring=True),
    gpu_case("warn", "1 uncorrected ECC errors in its life", all_ecc_errors=1),
    gpu_case("fail", "(hardware slowdown, hardware thermal", throttle_bits=0x48, clock_mhz=300),
    gpu_case("warn", "91 C", temperature_c=91),
    gpu_case("warn", "4 of 16 lanes", lanes=4),
    gpu_case("warn", "30.0 of 140 GiB are taken", used_bytes=30 * GIB),
    gpu_case("warn", "off", is_persistent=False),
    case("ok", "compiled for cpu", torch_build.judge_ops("moesys.ops: compiled for cpu", True)),
    case("warn", "not built", torch_build.judge_ops("reference: not built, run `make`", False)),
    case("ok", "sees H200", torch_build.judge_torch_gpus(["H200"], True, "2.13")),
    case("fail", "sees no GPU", torch_build.judge_torch_gpus([], True, "2.13 (a CPU build)")),
    case("ok", "on CPUs", torch_build.judge_torch_gpus([], False, "2.13")),
    case("ok", "NCCL 2.27", torch_build.judge_backends(True, True, 2, "2.27")),
    case("ok", "NCCL no", torch_build.judge_backends(True, False, 0, "")),
    case("fail", "gloo no", torch_build.judge_backends(False, True, 2, "2.27")),
    case("fail", "NCCL no", torch_build.judge_backends(True, False, 2, "")),
    case("ok", "1.0 s", exchange.judge_exchange("gloo", "", 1.0)),
    case("fail", "no end", exchange.judge_exchange("gloo", "no end within 20 s", 20.0)),
    case("fail", "no end", exchange.judge_exchange("nccl", "no end within 20 s", 20.0)),
    case("ok", "a flipped bit found", checkpoint.judge_checkpoint("", True, True, 0.1)),
    case("fail", "no space", checkpoint.judge_checkpoint("no space\nmore", False, False, 0.1)),
    case("fail", "was read", checkpoint.judge_checkpoint("", False, True, 0.1)),
    case("fail", "bit was not found", checkpoint.judge_checkpoint("", True, False, 0.1)),
    case("warn", "OSError: x", runner.judge_crash("memory", OSError("x"))),
    case("fail", "within 5 s", runner.judge_overtime("disk", 5.0)),
]
