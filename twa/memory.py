"""How much memory is free, asked before much of it is taken."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def available(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device`; None where the system does not say.

    On Linux the smaller of what the machine has left and what the control group (a container, a
    batch job) allows; elsewhere the physical memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type != "cpu":
        return None
    limits = [_machine(), *_control_groups()]
    return min((limit for limit in limits if limit is not None), default=None)


def _machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _control_groups() -> list[int]:
    """What this process's control group (version 2) and each one above it have left."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    root = Path("/sys/fs/cgroup")
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    left = []
    for group in [root / own, *(root / own).parents]:
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            statistics = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
        except (OSError, ValueError):
            continue
        if limit != "max":
            # Pages of files are counted, but given up when memory is needed.
            left.append(int(limit) - used + int(statistics.get("inactive_file", 0)))
    return left
