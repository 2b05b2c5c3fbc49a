"""What a run used: the machine, and the peak memory and CPU time of a notebook's kernel."""

import atexit
import os
import platform
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from steerkit.files import write_json

USAGE_FILE = "STEERKIT_USAGE"  # environment variable: where a notebook's kernel writes its usage


def machine() -> dict[str, Any]:
    """Cores this process may use, CPU and GPU names, memory in GiB; nothing that names a person."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    cpu = names[0] if names else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cores": cores, "cpu": cpu, "memory_gib": round(memory, 1), "gpu": gpu}


def peak_memory() -> dict[str, float | None]:
    """Peak memory of this process so far, in GiB: resident, and allocated by torch on the GPU."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss on Linux starts at the parent's peak
        kib = int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    else:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kib //= 1024 if sys.platform == "darwin" else 1
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_initialized() else None
    return {"peak_gib": round(kib / 2**20, 2), "gpu_peak_gib": gpu and round(gpu, 2)}


def load_ipython_extension(shell: Any) -> None:
    """In a kernel that `steerkit run` starts: write peak memory and CPU time when it ends.

    CPU time, because other processes on the machine do not lengthen it as they do the clock's.
    """

    def write() -> None:
        usage = {"cpu_seconds": round(time.process_time(), 1), "memory": peak_memory()}
        write_json(Path(os.environ[USAGE_FILE]), usage)

    atexit.register(write)
