"""`Window`: checkpoints as the rows of a matrix, some columns of which are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from twa.files.checkpoints import Checkpoint, CheckpointError, name_of
from twa.files.reading import mapped
from twa.ranks.replicas import hash_of
from twa.storage.columns import Blocks, Columns
from twa.storage.memory import Plan


class Window:
    """The n checkpoints, flattened: `W ∈ R^{n×D}`.

    Args:
        columns: the layout of the D columns.
        checkpoints: n paths or `state_dict`s.
        plan: says how many columns are worked on at a time, and on which device.
        width: the number of columns in memory.
        hashed: whether to hash what is read.

    Attributes:
        rows: the columns in memory, [n, width] of the plan's dtype.
        names: the names of the checkpoints in messages.
        hashes: of what was read of each checkpoint, int64 [n].
    """

    def __init__(
        self,
        columns: Columns,
        checkpoints: Sequence[Checkpoint],
        plan: Plan,
        width: int,
        hashed: bool = False,
    ):
        chunk, device = plan.chunk(columns.blocks), plan.build_device
        self.names = [name_of(checkpoint, i) for i, checkpoint in enumerate(checkpoints)]
        # All of them have to fit before the first is read. Opening a file again takes longer than
        # anything else here, so what takes no memory is kept for its first reading.
        self._opened: list[dict | None] = []
        for checkpoint, name in zip(checkpoints, self.names, strict=True):
            state = columns.fit(checkpoint, name)
            self._opened.append(state if all(map(mapped, state.values())) else None)
        self.rows = torch.empty(len(checkpoints), width, dtype=plan.dtype, device=device)
        # For all chunks of differences: allocating each takes longer than computing it.
        self._buffer = torch.empty(len(checkpoints) * chunk, dtype=torch.float64, device=device)
        self._columns, self._checkpoints, self._chunk = columns, checkpoints, chunk
        self._start = self._stop = self._new = 0  # columns in memory; the first one not hashed yet
        self._hashed = hashed
        self.hashes = torch.zeros(len(checkpoints), dtype=torch.int64, device=device)

    def differences(self, batch: Blocks, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """X: the first checkpoint, and the difference of each other one from the one before it.

        Yields the columns of `batch` in chunks, or all at once if they are of more than one block
        (which then fit into a chunk): the first column, and [blocks, n, columns]. Each chunk
        overwrites the last.
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

        Args:
            transform: T, float64 [blocks, rows, n]; None for the rows of X.
            dtype: of the factors; their sums are float64.

        Returns:
            float64 [blocks, rows, rows]. All ranks call it, and get the sum of a shared block.
        """
        rank = len(self.rows) if transform is None else transform.shape[1]
        total = self._buffer.new_zeros(batch.count, rank, rank)
        for _, rows in self.differences(batch, dtype):
            if transform is not None:
                rows = transform @ rows
            total += rows @ rows.mT
        if batch.shared:
            self._columns.ranks.sum(total)
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
        if self._hashed and self._stop > self._new:  # Columns may be read more than once.
            self.hashes += hash_of(rows[:, max(self._new - start, 0) :])
            self._new = self._stop
