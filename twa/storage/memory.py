"""`Plan`: how a basis is built, and how much memory that takes."""

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

# The elements of a chunk: in float64 they fit the cache of a CPU; a GPU needs more to be busy.
CHUNK, CHUNK_OF_ACCELERATORS = 2**19, 2**24
# The most columns in a float32 sum: the rounding of longer sums would show in the basis.
LONGEST = 2**13
# A basis that is not built in place is built from a part of the columns of W at a time: an eighth,
# or SMALL elements (256 MB) if that is more, because opening files takes time as well.
PARTS = 8
SMALL = 2**26


@dataclass(frozen=True)
class Plan:
    """How a basis is built, and how many bytes it takes.

    Attributes:
        n: the number of checkpoints.
        extract, components, bits: as for `Subspace`.
        device: the model's device.
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
        """The largest number of rows that a block of the basis can have."""
        if self.extract == "Schmidt":
            return self.n
        return self.n - 1 if self.components is None else min(self.components, self.n - 1)

    @property
    def build_device(self) -> torch.device:
        """The device on which the basis is built: the CPU for MPS, which has no float64."""
        return CPU if self.device.type == "mps" else self.device

    @property
    def in_place(self) -> bool:
        """Whether the basis overwrites the checkpoints that were read."""
        same = self.bits == 32 == 8 * self.dtype.itemsize and self.build_device == self.device
        return same and self.height >= self.n - 1

    def chunk(self, blocks: list[Blocks]) -> int:
        """The number of columns in a chunk: whole tiles, and the widest of adjacent blocks."""
        on_cpu = self.build_device.type == "cpu"
        chunk = (CHUNK if on_cpu else CHUNK_OF_ACCELERATORS) // self.n
        if self.device.type == "cpu" and self.extract == "Schmidt":  # which may use float32
            chunk = min(chunk, LONGEST)
        narrow = [group.width for group in blocks if group.count > 1 and group.width < PIECE]
        return max([TILE, chunk // TILE * TILE, *narrow])

    def part(self, total: int, chunk: int = 1) -> int:
        """The number of columns, of `total`, that are read at a time if not all are."""
        return min(total, max(chunk, math.ceil(total / PARTS), SMALL // self.n))

    def basis_bytes(self, total: int) -> int:
        """The bytes of a basis of `total` columns, as `Subspace.nbytes`.

        It counts one scale for every `TILE` elements; many small blocks have a few more.
        """
        scales = 0 if self.bits == 32 else 4 * math.ceil(total / TILE)
        mean = self.dtype.itemsize * total if self.extract == "PCA" else 0
        return self.height * (total * self.bits // 8 + scales) + mean

    def build_bytes(self, total: int) -> int:
        """The bytes that building it takes: the basis, and the columns that are read beside it."""
        read = 0 if self.in_place else self.dtype.itemsize * self.n * self.part(total)
        return self.basis_bytes(total) + read

    def check(self, total: int, free: float | None, shards: int) -> None:
        """Raises a `MemoryError` that names remedies if the basis does not fit.

        A rank, one of `shards`, has `total` columns and `free` bytes; None if that is unknown.
        """

        def needed(n: int, bits: int) -> int:
            plan = replace(self, n=n, bits=bits)
            return plan.build_bytes(total) + 2 * 4 * total  # a gradient and the weights

        n, bits = self.n, self.bits
        if free is None or needed(n, bits) <= free:
            return
        fewer = [f"{k} checkpoints" for k in range(2, n) if needed(k, bits) <= free]
        smaller = [f"bits={b}" for b in BITS if b < bits and needed(n, b) <= free]
        more = math.ceil(shards * needed(n, bits) / max(1, free))
        remedies = [*fewer[-1:], *smaller[:1], f"{more} ranks with as much memory each"]
        share = f" (one of {shards} shards)" if shards > 1 else ""
        raise MemoryError(
            f"a basis of {n} checkpoints of {total:,} weights{share} at {bits} bits takes "
            f"{needed(n, bits) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {self.device}; "
            f"{' or '.join(remedies)} would fit"
        )


def free_memory(device: torch.device) -> int | None:
    """The number of bytes that can be allocated on `device`; None if unknown."""
    if device.type == "cpu":
        return min([psutil.virtual_memory().available, *free_in_control_groups()])
    # Some backends have no such functions, or have them and raise.
    with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError):
        backend = torch.get_device_module(device)
        cached = backend.memory_reserved(device) - backend.memory_allocated(device)
        return backend.mem_get_info(device)[0] + cached
    return None


def free_in_control_groups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """The bytes that each memory limit of this process's control groups leaves free.

    Containers and batch systems on Linux limit memory in this way, in version 1 or 2 of the
    interface. The page cache counts as free: the kernel drops it when memory is needed. The groups
    are mounted at `root`; the file `own` names those of this process.
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
