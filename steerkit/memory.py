"""Memory: the peak of this process, and what a model of a given shape needs."""

import atexit
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from steerkit.results import write_json

PEAK_FILE = "STEERKIT_PEAK"  # environment variable: where a notebook's kernel writes its peak


def peak() -> dict[str, float | None]:
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
    """For a kernel that `steerkit run` starts: write the peak when the kernel ends."""
    atexit.register(lambda: write_json(Path(os.environ[PEAK_FILE]), peak()))
