"""`Plan`: how a basis is built within the memory that is free, and what it takes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from twa.storage.columns import Blocks
from twa.storage.matrix import PIECE, TILE

BITS = (32, 8, 4)
CPU = torch.device("cpu")

# Elements worked on at a time: in float64 they stay in the cache of a CPU; a GPU wants more.
CHUNK = {"cpu": 2**19, "cuda": 2**24}
# Columns in a float32 sum at most: the rounding of longer ones would show in the basis.
LONGEST = 2**13
# A basis that cannot be built in place is built from a part of the columns of W at a time: one of
# so many parts, or SMALL elements (256 MB) if that is more, as opening files takes time as well.
PARTS = 8
SMALL = 2**26


@dataclass(frozen=True)
class Plan:
    """How a basis of n checkpoints is built, and the bytes that it takes.

    Attributes:
        n: checkpoints of the window.
        extract, components, bits: as of `Subspace`.
        device: that of the model.
        dtype: of the checkpoints in memory, and of their mean.
    """

    n: int
    extract: str = "PCA"
    components: int | None = None
    bits: int = 32
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    @property
    def height(self) -> int:
        """The most rows that a block of the basis has."""
        if self.extract == "Schmidt":
            return self.n
        return self.n - 1 if self.components is None else min(self.components, self.n - 1)

    @property
    def build_device(self) -> torch.device:
        """Where the basis is built: for MPS, which has no float64, on the CPU."""
        return CPU if self.device.type == "mps" else self.device

    @property
    def in_place(self) -> bool:
        """Whether the basis overwrites the rows that were read."""
        same = self.bits == 32 == 8 * self.dtype.itemsize and self.build_device == self.device
        return same and self.height >= self.n - 1

    def chunk(self, blocks: list[Blocks]) -> int:
        """The number of columns worked on at a time: tiles, and any block but a single one."""
        chunk = CHUNK.get(self.device.type, CHUNK["cpu"]) // self.n
        if self.device.type == "cpu" and self.extract == "Schmidt":  # the one that may try float32
            chunk = min(chunk, LONGEST)
        narrow = [group.width for group in blocks if group.count > 1 and group.width < PIECE]
        return max([TILE, chunk // TILE * TILE, *narrow])

    def width(self, total: int, chunk: int = 1) -> int:
        """The number of columns, of `total`, that are in memory while the basis is built."""
        return total if self.in_place else self.part(total, chunk)

    def part(self, total: int, chunk: int = 1) -> int:
        """The number of columns, of `total`, that are in memory where few are enough."""
        return min(total, max(chunk, math.ceil(total / PARTS), SMALL // self.n))

    def basis_bytes(self, total: int) -> int:
        """What a basis of `total` columns takes, as `Subspace.nbytes`.

        Many small blocks have a few more scales, of which there is one for each tile in a row.
        """
        scales = 0 if self.bits == 32 else 4 * math.ceil(total / TILE)
        mean = self.dtype.itemsize * total if self.extract == "PCA" else 0
        return self.height * (total * self.bits // 8 + scales) + mean

    def build_bytes(self, total: int) -> int:
        """What building it takes: the basis, and the columns that are in memory beside it."""
        beside = 0 if self.in_place else self.dtype.itemsize * self.n * self.width(total)
        return self.basis_bytes(total) + beside

    def check(self, total: int, free: float | None, shards: int) -> None:
        """Raises `MemoryError` if too little memory is free; says what would fit.

        Args:
            total: columns on this rank.
            free: bytes; None if unknown.
            shards: ranks that the model is sharded among.
        """

        def needed(n: int, bits: int) -> int:
            plan = replace(self, n=n, bits=bits)
            return plan.build_bytes(total) + 2 * 4 * total  # and a gradient, and the weights

        n, bits = self.n, self.bits
        if free is None or needed(n, bits) <= free:
            return
        remedies = []
        fewer = max((k for k in range(2, n) if needed(k, bits) <= free), default=None)
        if fewer:
            remedies.append(f"{fewer} checkpoints")
        smaller = [b for b in BITS if b < bits and needed(n, b) <= free]
        if smaller:
            remedies.append(f"bits={smaller[0]}")
        more = math.ceil(shards * needed(n, bits) / max(1, free))
        remedies.append(f"{more} ranks with as much memory each")
        share = f" (one of {shards} shards)" if shards > 1 else ""
        raise MemoryError(
            f"a basis of {n} checkpoints of {total:,} weights{share} at {bits} bits takes "
            f"{needed(n, bits) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {self.device}; "
            f"{' or '.join(remedies)} would fit"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device`; None if unknown."""
    backend = torch.get_device_module(device)
    if hasattr(backend, "mem_get_info"):
        cached = backend.memory_reserved(device) - backend.memory_allocated(device)
        return backend.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    return min([psutil.virtual_memory().available, *left_by_control_groups()])


def left_by_control_groups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """What each memory limit of this process's control groups leaves free, in bytes.

    Containers and batch systems on Linux limit memory so, in version 1 or 2 of the interface. The
    page cache counts as free, as the kernel drops it when memory is needed.

    Args:
        root: where the groups are mounted.
        own: the file that names this process's groups.
    """
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, prefix = (root / "memory", "total_") if controllers else (root, "")
        names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # A limit of an outer group counts as well.
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
                numbers = dict(n.split() for n in (folder / "memory.stat").read_text().splitlines())
                cache = sum(int(numbers[f"{prefix}{kind}active_file"]) for kind in ("", "in"))
                yield max(0, limit - used + cache)
            if folder == top:
                break
