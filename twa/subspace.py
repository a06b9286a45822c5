"""`Subspace`: a basis of the subspace that a window of checkpoints spans, and products with it.

The n checkpoints, flattened, are the rows of `W ∈ R^{n×D}`, and the basis is the orthonormal rows
of `P = T W`. T comes from n×n inner products in float64 (`twa.extraction`), so the long dimension
is passed over twice, in cache-sized chunks: once for the inner products, once to apply T. Where
checkpoints are nearly dependent, the inner products are computed again, up to three times.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twa import extraction
from twa.files.checkpoints import Checkpoint, check_window
from twa.ranks.replicas import Replicas
from twa.ranks.sharding import first_row, local
from twa.storage.columns import Blocks, Columns
from twa.storage.matrix import Storage
from twa.storage.memory import BITS, CHUNK, Plan, free_memory
from twa.storage.window import Window

if TYPE_CHECKING:
    import torch.distributed as dist

EXTRACTS = ("PCA", "Schmidt")
GRANULARITIES = ("model", "layer", "channel")
UNITS = ("direction", "block")


def _full_precision(method: Callable) -> Callable:
    """`method` without gradients, and without the caller's autocast and TF32."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        kinds = {"cpu", self.parameters[0].device.type}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(_ieee_products())
            return method(self, *args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    """Context in which products of float32 matrices are not rounded to TF32 or bfloat16."""
    matmul = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    if not hasattr(matmul[0], "fp32_precision"):  # torch < 2.9 has one setting for all backends
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    precisions = [backend.fp32_precision for backend in matmul]
    try:
        for backend in matmul:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(matmul, precisions, strict=True):
            backend.fp32_precision = precision


class Subspace:
    """A basis of the subspace that checkpoints span, and products with it.

    Coefficients c stand for the weights `w = o + Pᵀ (u ∘ c)`, P with orthonormal rows, block by
    block. `extract` says which:

    - "PCA": the rows of P are the principal directions p_i of the window, centred on its mean; the
      origin o is the mean. The units u are those of the window's spread, the standard deviation σ_i
      of the checkpoints along p_i (their root mean square about the mean): see `unit`.
    - "Schmidt": the rows of P come from Gram–Schmidt in the order of the checkpoints (Section 3 of
      Li et al., ICLR 2023); u = 1 and o = 0, so the unit is that of the weights.

    Args:
        model: its trainable parameters are the columns, and their device is the basis's. Where
            FSDP2 (`fully_shard`) has sharded them, the shards of a rank are its columns, and D
            below is their number; what is called here is then called on every rank.
        checkpoints: n paths (see `twa.files.formats.load`) or `state_dict`s, alone or in a
            container and under prefixes of wrappers, in the order of training; buffers and
            frozen parameters are ignored. They are read one at a time, and once where the basis is
            built in place (32 bits and all directions); else in up to eight parts, and blocks
            larger than a part once for each pass over them.
        extract: "PCA" or "Schmidt", as above.
        components: the number of leading principal directions to keep in each block (a block with
            fewer keeps these); None keeps all. For "PCA" only.
        bits: of a stored element of P, 32, 8 or 4. Below 32 the rows are orthonormal up to the
            rounding of their elements, and `project` remains the exact adjoint of `expand`.
        granularity: "model", "layer" or "channel": the blocks, each of which has a basis and
            coefficients of its own. A layer is a module that owns parameters; one that owns only
            vectors, such as batch norm, joins the layer before it. A channel is an index of a
            weight's first dimension; the vectors of a layer form one block.
        unit: what a coefficient counts in: "direction", the spread σ_i along its own direction, so
            that over the checkpoints it has mean 0 and variance 1; or "block", the root mean square
            of the σ_i of its block. By σ_i a step goes where the checkpoints went; by the block's
            it goes as far along every direction. For "PCA" only.
        process_group: the ranks that hold the same model (or the same shards of it), if there are
            several. They take over the first one's directions: those that another machine
            computes may be others where the spread is the same in several.

    Attributes:
        parameters: the model's trainable parameters behind the columns, in order.
        scale: u, float32 [len(self)]; None for "Schmidt".
        unit: as given.
        mean: the mean of the checkpoints, [D], float64 if a parameter is, else float32; None for
            "Schmidt".
        dropped: the checkpoints (path, or `checkpoints[3]`) that "Schmidt" left out because
            in every block they depend linearly on the ones before them.

    Raises:
        CheckpointError: a checkpoint cannot be read, does not fit the model, or holds NaN or
            infinity.
        MemoryError: the basis does not fit into the memory that is free.
        ValueError: an argument is out of its range; there are no checkpoints, or for "PCA" no two
            that differ; the model is on `meta`, has no trainable parameters, or some that are
            not in its `state_dict`; a rank of `process_group` has other parameters,
            arguments or checkpoints than the first.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Iterable[Checkpoint],
        *,
        extract: str = "PCA",
        components: int | None = None,
        bits: int = 32,
        granularity: str = "model",
        unit: str = "direction",
        process_group: dist.ProcessGroup | None = None,
    ):
        self._checkpoints = check_window(model, checkpoints)
        n = len(self._checkpoints)
        _check_arguments(n, extract, components, bits, granularity, unit)
        self._extract, self._granularity, self.unit = extract, granularity, unit
        self._columns = Columns(model, granularity)
        self._ranks, self._replicas = self._columns.ranks, Replicas(process_group)
        self.parameters = self._columns.parameters
        device = self.parameters[0].device
        if device.type == "meta":
            raise ValueError("the model is on meta: give it a device first, by model.to_empty")
        self._replicas.check(
            {
                "model": self._columns.layout,
                "number of checkpoints": n,
                "basis": (extract, components, bits, granularity, unit),
            }
        )
        self._plan = Plan(n, extract, components, bits, device, self._columns.dtype)
        free = self._ranks.share(free_memory(device), device, self._replicas.count)
        self._plan.check(self._columns.total, free, self._ranks.count)
        self._build()

    def _build(self) -> None:
        """Computes the basis, block by block, and stores it."""
        plan, columns, device = self._plan, self._columns, self.parameters[0].device
        chunk, several = plan.chunk(columns.blocks), self._replicas.count > 1
        window = Window(columns, self._checkpoints, plan, plan.width(columns.total, chunk), several)
        rows = window.rows
        if not plan.in_place:
            height = plan.height if plan.bits == 32 else 0
            rows = torch.empty(height, columns.total, dtype=torch.float32, device=device)
        self._storage = Storage(
            plan.bits, plan.height, columns.blocks, columns.count, rows[: plan.height]
        )
        self.mean = None
        if self._extract == "PCA":  # In place, its directions leave the last row for the mean.
            self.mean = rows[-1] if plan.in_place else self.empty(plan.dtype)
        used = torch.zeros(plan.n, dtype=torch.float32, device="cpu")
        units = torch.zeros(columns.count, plan.height, dtype=torch.float32, device="cpu")
        for batch in columns.batches(chunk):
            transform, of_batch, kept, dtype = self._transform(batch, window)
            self._fill(batch, window, transform, dtype)
            used += kept.cpu().any(dim=0)
            if self._counts(batch):
                units[batch.numbers] = of_batch.float().cpu()
        if several:
            names = (f"checkpoint {Path(name).name}" for name in window.names)
            hashes = self._ranks.sum(window.hashes).tolist()
            self._replicas.check(dict(zip(names, hashes, strict=True)))
        self._number_coefficients(units)
        used = self._ranks.sum(used.to(device)).tolist()
        self.dropped = [name for name, use in zip(window.names, used, strict=True) if not use]
        if self.dropped and self._ranks.first:
            warnings.warn(
                f"{len(self.dropped)} of {plan.n} checkpoints depend linearly on the ones before "
                f"them and were dropped from the basis: {', '.join(self.dropped)}",
                stacklevel=4,
            )

    @_full_precision
    def _transform(
        self, batch: Blocks, window: Window
    ) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
        """How the basis of the blocks in `batch` is made of their checkpoints.

        Returns:
            T with `P = T X` for the differences X of neighbours, float64 [blocks, height, n];
            u, float64 [blocks, height], 0 for rows that a block does not have; which checkpoints
            are in the basis, bool [blocks or 1, n]; and the dtype in which to compute `T X`.
        """
        products = functools.partial(window.products, batch)
        dtype, kept = torch.float64, torch.ones(1, len(window.rows), dtype=torch.bool)
        if self._extract == "PCA":
            rounding = torch.finfo(window.rows.dtype).eps / torch.finfo(torch.float32).eps
            transform, units = extraction.principal_directions(
                products, self._plan.height, extraction.DEPENDENT * rounding
            )
            if self.unit == "block":
                units = extraction.root_mean_squares(units)
        else:
            # On a CPU float32 is the faster.
            single = window.rows.device.type == "cpu" and window.rows.dtype == torch.float32
            transform, kept, dtype = extraction.gram_schmidt(products, single)
            kept = self._replicas.broadcast(kept)
            units = (transform != 0).any(dim=2).double()
        transform, units = map(self._replicas.broadcast, (transform, units))
        return transform, units, kept, dtype

    @_full_precision
    def _fill(self, batch: Blocks, window: Window, transform: Tensor, dtype: torch.dtype) -> None:
        """Stores the rows `T X` of the blocks in `batch`, and their mean."""
        if self.mean is not None:
            transform = torch.cat([transform, extraction.mean_row(transform)], dim=1)
        for start, differences in window.differences(batch, dtype):
            rows = transform.to(dtype) @ differences
            rows = rows.transpose(0, 1).flatten(1).to(self._plan.dtype)
            rows = rows.to(self.parameters[0].device)
            self._storage.fill(start, rows[: self._plan.height].float())
            if self.mean is not None:
                self.mean[start : start + rows.shape[1]] = rows[-1]

    def _counts(self, batch: Blocks) -> bool:
        """Whether this rank accounts for `batch`: one rank does for a block that several share."""
        return self._ranks.first or not batch.shared

    def _number_coefficients(self, units: Tensor) -> None:
        """Numbers the rows that exist: a block of low rank has fewer than others.

        Args:
            units: u [blocks, height], 0 where a block has no such row and in blocks that another
                rank accounts for.
        """
        self._shape = units.shape
        units = self._ranks.sum(units.to(self.parameters[0].device)).flatten()
        index = units.nonzero()[:, 0]
        if self._extract == "PCA" and not len(index):
            raise ValueError(
                "the checkpoints do not differ: there is nothing to average (a state_dict that is "
                "not copied changes with its model)"
            )
        self._length = len(index)
        self._index = index if self._length < len(units) else None
        self.scale = units[index] if self._extract == "PCA" else None

    def __len__(self) -> int:
        """The number of coefficients, all blocks together."""
        return self._length

    @property
    def shards(self) -> int:
        """The number of ranks that the model is sharded among, 1 if it is not."""
        return self._ranks.count

    @property
    def dtype(self) -> torch.dtype:
        """float64 if a parameter is float64 or complex128, else float32."""
        return self._plan.dtype

    @property
    def nbytes(self) -> int:
        """The memory of the stored basis in bytes, with scales and the mean; on this rank."""
        return self._storage.nbytes + (0 if self.mean is None else self.mean.nbytes)

    @_full_precision
    def project(self, gradients: Tensor, extras: Tensor | None = None) -> Tensor:
        """`u ∘ P g`: the gradient with respect to the coefficients.

        Args:
            gradients: float32 [D], in the order of the columns.
            extras: a few more numbers, float32, to sum in place, in the same all-reduce, over the
                ranks that share the model.

        Returns:
            float32 [len(self)], for the coefficients of all blocks one after the other.
        """
        products = self._storage.project(gradients).flatten()
        if extras is None:
            self._ranks.sum(products)
        else:
            summed = self._ranks.sum(torch.cat([products, extras]))
            products = summed[: len(products)]
            extras.copy_(summed[len(products) :])
        products = products if self._index is None else products[self._index]
        return products if self.scale is None else products * self.scale

    @_full_precision
    def expand(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """`Pᵀ (u ∘ c)`: weights from coefficients c, less the origin.

        Args:
            coefficients: float32 [len(self)].
            out: float32 [D] to write to. Allocating a result can take longer than the product, so
                a loop should use one vector again and again.

        Returns:
            float32 [D], in the order of the columns; `out` if given.
        """
        out = self.empty() if out is None else out
        scaled = coefficients if self.scale is None else coefficients * self.scale
        self._storage.expand(self._by_block(scaled), out)
        return out

    @_full_precision
    def coordinates(self, weights: Tensor) -> Tensor:
        """The coefficients of the point of the subspace that is nearest to `weights`.

        Args:
            weights: float32 or float64 [D], in the order of the columns.

        Returns:
            float32 [len(self)].
        """
        weights = (weights if self.mean is None else weights - self.mean).float()
        square = 1 if self.scale is None else self.scale.square()
        coefficients = self.project(weights) / square
        # Again for the remainder: it corrects the rounding of sums as long as the model.
        rest = self.expand(coefficients)
        torch.sub(weights, rest, out=rest)
        return coefficients + self.project(rest) / square

    @_full_precision
    def limit(self, coefficients: Tensor, radius: float) -> None:
        """Scales, in place, the coefficients of blocks whose root mean square exceeds `radius`."""
        padded = self._by_block(coefficients)
        sizes = self._by_block(torch.ones_like(coefficients)).sum(1)
        factors = radius / (padded.square().sum(1) / sizes).sqrt()
        factors = factors.clamp(max=1)[:, None].expand(self._shape).flatten()
        coefficients *= factors if self._index is None else factors[self._index]

    @_full_precision
    def averaging_weights(self, coefficients: Tensor) -> Tensor:
        """α with `w = Σ α_i w_i`, where `w` is the origin plus `expand(coefficients)`.

        It reads the checkpoints again: to keep n numbers for each direction of each block could
        take more memory than a compressed basis.

        Args:
            coefficients: float32 [len(self)].

        Returns:
            float64 on the CPU, [checkpoints] at granularity "model", else [blocks, checkpoints].
            They sum to 1 for "PCA". Zero where a checkpoint was dropped.
        """
        plan, columns = self._plan, self._columns
        chunk = plan.chunk(columns.blocks)
        window = Window(columns, self._checkpoints, plan, plan.part(columns.total, chunk))
        coefficients = self._by_block(coefficients).cpu().double()
        weights = torch.zeros(columns.count, plan.n, dtype=torch.float64, device="cpu")
        for batch in columns.batches(chunk):
            transform, units, kept, _ = self._transform(batch, window)
            rows = extraction.of_checkpoints(units[:, :, None] * transform)
            rows = rows.masked_fill_(~kept[:, None].to(rows.device), 0).cpu()
            if self._counts(batch):
                weights[batch.numbers] = (coefficients[batch.numbers, None] @ rows)[:, 0]
        if self._ranks.count > 1:  # NCCL needs its device. (MPS, without float64, has one rank.)
            weights = self._ranks.sum(weights.to(self.parameters[0].device)).cpu()
        if self.mean is not None:
            weights += 1 / weights.shape[1]
        return weights[0] if self._granularity == "model" else weights

    def empty(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised vector for the columns, [D]."""
        return torch.empty(self._columns.total, dtype=dtype, device=self.parameters[0].device)

    @torch.no_grad()
    def flatten(self, tensors: Iterable[Tensor | None], out: Tensor | None = None) -> Tensor:
        """`tensors`, one for each parameter, as one vector in the order of the columns.

        A complex number takes two columns, its real and its imaginary part.

        Args:
            tensors: in the shapes of `self.parameters`, any dtype; None stands for zeros.
            out: [D] to write to, as for `expand`.

        Returns:
            float32 [D]; `out` if given.
        """
        out = self.empty() if out is None else out
        parts = self._columns.split(out)
        for part, tensor, parameter in zip(parts, tensors, self.parameters, strict=True):
            if tensor is None:
                part.zero_()
            else:
                dense = local(tensor).to_dense()  # An embedding's gradient may be sparse.
                part.copy_(self._columns.arranged(dense, parameter))
        return out

    @torch.no_grad()
    def assign(self, start: Tensor, moved: Tensor) -> None:
        """Writes the sum of both, [D], into the model's parameters."""
        self._ranks.reshard()
        parts = (self._columns.split(flat) for flat in (start, moved))
        for parameter, *terms in zip(self.parameters, *parts, strict=True):
            own = self._columns.arranged(local(parameter), parameter)
            if own.device == start.device:
                torch.add(*terms, out=own)
            else:  # of a model that is spread over several accelerators
                own.copy_(torch.add(*terms))

    @torch.no_grad()
    def fingerprint(self, flat: Tensor) -> Tensor:
        """A hash of the parameters' names and shapes and of `flat` [D], to the bit of float32.

        It depends neither on the number of ranks nor on the device. Int64 scalar on the CPU.
        """
        total = torch.zeros((), dtype=torch.int64, device=flat.device)
        widths = self._columns.widths
        for parameter, columns in zip(self.parameters, flat.split(widths), strict=True):
            first = first_row(parameter) * math.prod(parameter.shape[1:])
            first *= 1 + parameter.is_complex()
            for part in columns.float().view(torch.int32).split(CHUNK["cpu"]):
                places = torch.arange(first, first + len(part), device=flat.device)
                total += (part * (places * 0x9E3779B1 + 1)).sum()  # modulo 2^64
                first += len(part)
        names = hashlib.sha256(self._columns.layout.encode()).digest()[:8]
        return self._ranks.sum(total).cpu() ^ int.from_bytes(names, "big", signed=True)

    def _by_block(self, coefficients: Tensor) -> Tensor:
        """`coefficients` as [blocks, height], zero where a block has no such row."""
        if self._index is None:
            return coefficients.view(self._shape)
        padded = coefficients.new_zeros(self._shape.numel())
        padded[self._index] = coefficients
        return padded.view(self._shape)


def _check_arguments(n, extract, components, bits, granularity, unit) -> None:
    for name, value, allowed in (
        ("extract", extract, EXTRACTS),
        ("bits", bits, BITS),
        ("granularity", granularity, GRANULARITIES),
        ("unit", unit, UNITS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
    if n == 1 and extract == "PCA":
        raise ValueError("extract 'PCA' takes two checkpoints or more: one has no spread")
    for name, given in (("components", components is not None), ("unit", unit == "block")):
        if extract == "Schmidt" and given:
            raise ValueError(f"{name} belongs to extract 'PCA', not to 'Schmidt'")
    if components is not None and components < 1:
        raise ValueError(f"components must be 1 or more, not {components!r}")
