"""The checks that need no torch: quick, and they say what is wrong where torch is what is missing."""

from moesys.doctor import clock, disk, gpu, host, network, software
from moesys.doctor.finding import Check

NODE_CHECKS: tuple[Check, ...] = (
    Check(name="packages", limit_s=10.0, find=software.packages),
    Check(name="compilers", limit_s=12.0, find=software.compilers),
    Check(name="cores", limit_s=5.0, find=host.cores),
    Check(name="memory", limit_s=5.0, find=host.memory),
    Check(name="shared memory", limit_s=5.0, find=host.shared_memory),
    Check(name="limits", limit_s=5.0, find=host.limits),
    Check(name="GPU health", limit_s=15.0, find=gpu.gpus),
    Check(name="interfaces", limit_s=5.0, find=network.interfaces_and_routes),
    Check(name="own name", limit_s=20.0, find=network.name),
    Check(name="disk", limit_s=30.0, find=disk.disk),
    Check(name="files and quota", limit_s=15.0, find=disk.files_and_quota),
    Check(name="clock", limit_s=10.0, find=clock.clock),
)
"""What each node of a cluster looks at too."""

HOST_CHECKS: tuple[Check, ...] = (
    *NODE_CHECKS,
    Check(name="ports", limit_s=5.0, find=network.ports),
)
