"""`Window`: the checkpoints as rows of a matrix, of which it reads some columns at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from twa.files.checkpoints import Checkpoint, CheckpointError, name_of
from twa.files.reading import mapped
from twa.storage.columns import Blocks, Columns
from twa.storage.memory import Plan


class Window:
    """The n checkpoints, flattened: `W ∈ R^{n×D}`.

    Args:
        columns: the layout of the D columns.
        checkpoints: n paths or `state_dict`s.
        plan: how many columns are read at a time, and on which device.
        whole: whether to read all columns at once.
        hashed: whether to hash what is read.

    Attributes:
        rows: the columns in memory, [n, width] of the plan's dtype.
        names: the checkpoints' names in messages.
        hashes: a hash of what was read of each checkpoint, int64 [n].
    """

    def __init__(
        self, columns: Columns, checkpoints: list[Checkpoint], plan: Plan, whole=False, hashed=False
    ):
        self._columns, self._checkpoints, self._hashed = columns, checkpoints, hashed
        self._chunk, n, device = plan.chunk(columns.blocks), len(checkpoints), plan.build_device
        self.names = [name_of(checkpoint, i) for i, checkpoint in enumerate(checkpoints)]
        # All checkpoints have to fit before one is read. Opening a file again takes longer than
        # anything else here, so those that take no memory stay open until they are first read.
        self._opened: list[dict | None] = []
        for checkpoint, name in zip(checkpoints, self.names, strict=True):
            state = columns.fit(checkpoint, name)
            self._opened.append(state if all(map(mapped, state.values())) else None)
        width = columns.total if whole else plan.part(columns.total, self._chunk)
        self.rows = torch.empty(n, width, dtype=plan.dtype, device=device)
        self._start = self._stop = 0  # the columns in memory
        # All chunks share this: allocating one takes longer than computing it.
        self._buffer = torch.empty(n * self._chunk, dtype=torch.float64, device=device)
        self.hashes = torch.zeros(n, dtype=torch.int64, device=device)
        self._first_unhashed = 0

    def batches(self) -> Iterator[Blocks]:
        """The blocks, in batches that fit a chunk; a block that is wider is a batch of its own."""
        return (batch for group in self._columns.blocks for batch in group.split(self._chunk))

    def differences(self, batch: Blocks, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """X: the first checkpoint, and the difference of each other one from the one before it.

        Yields the first column and X [blocks, n, columns], for all columns of `batch` at once or,
        if it is a single block, chunk by chunk. Each chunk overwrites the last.
        """
        if batch.stop - batch.start <= self.rows.shape[1]:
            self._read(batch.start, batch.stop)
        step = self._chunk if batch.count == 1 else batch.stop - batch.start
        buffer = self._buffer.view(dtype)
        for start in range(batch.start, batch.stop, step):
            stop = min(start + step, batch.stop)
            self._read(start, stop)
            rows = self.rows[:, start - self._start : stop - self._start]
            rows = rows.unflatten(1, (batch.count, -1)).transpose(0, 1)
            differences = buffer[: rows.numel()].view(rows.shape).copy_(rows)
            differences[:, 1:] -= rows[:, :-1]
            yield start, differences

    def products(self, batch: Blocks, transform: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`X Xᵀ` of each block, or `(T X)(T X)ᵀ` computed from the rows `T X` themselves.

        Every rank has to call it: shared blocks are summed over the ranks. It raises a
        `CheckpointError` if a checkpoint contains NaN or infinity.

        Args:
            transform: T, float64 [blocks, rows, n]; None for X itself.
            dtype: the dtype of the factors; the result is float64 [blocks, rows, rows].
        """
        height = len(self.rows) if transform is None else transform.shape[1]
        total = self._buffer.new_zeros(batch.count, height, height)
        for _, rows in self.differences(batch, dtype):
            if transform is not None:
                rows = transform @ rows
            total += rows @ rows.mT
        if batch.shared:
            self._columns.shards.sum(total)
        finite = total.diagonal(dim1=1, dim2=2).isfinite().all(dim=0)
        if not finite.all():
            raise CheckpointError(f"{self.names[finite.int().argmin()]}: holds NaN or infinity")
        return total

    def _read(self, start: int, stop: int) -> None:
        """Reads the columns from `start` on, unless those up to `stop` are in memory."""
        if self._start <= start and stop <= self._stop:
            return
        self._start = start
        self._stop = min(start + self.rows.shape[1], self._columns.total)
        rows = self.rows[:, : self._stop - start]
        for i in tqdm(range(len(rows)), desc="reading checkpoints", leave=False, disable=None):
            state, self._opened[i] = self._opened[i], None
            state = state or self._columns.fit(self._checkpoints[i], self.names[i])
            self._columns.read(state, start, rows[i])
        if self._hashed and self._stop > self._first_unhashed:  # Columns may be read again.
            self.hashes += _hash(rows[:, max(self._first_unhashed - start, 0) :])
            self._first_unhashed = self._stop


def _hash(rows: Tensor) -> Tensor:
    """A hash of each of `rows` [n, columns], float32, that ignores the order of columns: int64."""
    parts = rows.view(torch.int32).split(2**19, dim=1)
    return torch.stack([part.sum(1, dtype=torch.int64) for part in parts]).sum(0)
