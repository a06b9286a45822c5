"""`Subspace`: a basis of the subspace that a window of checkpoints spans, and products with it.

The n checkpoints, flattened, are the rows of `W ∈ R^{n×D}`. The basis `P = T W` has orthonormal
rows. T comes from n×n inner products in float64 (`twa.extraction`), so two passes over the columns
are enough: one for the inner products, one to apply T, both in chunks that fit the cache. Where
checkpoints are nearly dependent, the inner products are computed again, up to three times.
"""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twa import extraction
from twa.files.checkpoints import Checkpoint, CheckpointError, check_window
from twa.files.windows import stamp
from twa.ranks.replicas import Replicas
from twa.ranks.sharding import first_row, local
from twa.storage.columns import Blocks, Columns
from twa.storage.matrix import Matrix
from twa.storage.memory import BITS, CHUNK, Plan, free_memory
from twa.storage.precision import full_precision
from twa.storage.window import Window

if TYPE_CHECKING:
    import torch.distributed as dist

EXTRACTS = ("PCA", "Schmidt")
GRANULARITIES = ("model", "layer", "channel")
UNITS = ("direction", "block")


class Subspace:
    """A basis of the subspace that checkpoints span, and products with it.

    Coefficients c stand for the weights `w = o + Pᵀ (u ∘ c)` in each block, with orthonormal rows
    of P, the origin o and the units u:

    - "PCA": the rows of P are the principal directions p_i of the window, centred on its mean. The
      origin is the mean. The units are the standard deviations σ_i of the checkpoints along p_i
      (their root mean square about the mean); see `unit`.
    - "Schmidt": the rows of P come from Gram–Schmidt in the order of the checkpoints (Section 3 of
      Li et al., ICLR 2023). Here o = 0 and u = 1, so the unit is that of the weights.

    Args:
        model: its trainable parameters are the columns, and the basis is on their device. If FSDP2
            (`fully_shard`) has sharded it, the columns are this rank's shards, D is their number,
            and every rank has to make the same calls.
        checkpoints: n paths (see `twa.files.formats.load`) or `state_dict`s, in the order of
            training. A `state_dict` may be in a container and have the prefixes of wrappers;
            buffers and frozen parameters are ignored. Each checkpoint is read once if the basis is
            built in place (32 bits and all directions). Otherwise it is read in up to eight parts,
            and blocks larger than a part are read once for each pass over them.
        extract: "PCA" or "Schmidt".
        components: the number of leading principal directions to keep in each block; a block that
            has fewer keeps all of its own. None keeps all. For "PCA" only.
        bits: the size of a stored element of P: 32, 8 or 4. Below 32 bits the rows are orthonormal
            up to rounding, and `project` remains the exact adjoint of `expand`.
        granularity: the blocks, each of which has a basis and coefficients of its own: "model",
            "layer" or "channel". A layer is a module that owns parameters; one that owns only
            vectors, such as batch norm, joins the layer before it. A channel is an output channel
            of a weight; the vectors of a layer form one block.
        unit: "direction": a coefficient is in units of its own σ_i, so over the checkpoints it has
            mean 0 and variance 1, and steps are larger where the checkpoints varied more. "block":
            in units of the root mean square of the σ_i of its block, so steps are equally large in
            all directions. For "PCA" only.
        process_group: the ranks that have the same model, or the same shards of it. All use the
            first rank's directions: where the spread is the same in several directions, another
            machine may compute others.

    Attributes:
        parameters: the model's trainable parameters, in the order of the columns.
        scale: u, float32 [len(self)]; None for "Schmidt".
        unit: as given.
        mean: the mean of the checkpoints, [D], float64 if a parameter is, else float32; None for
            "Schmidt".
        names: the checkpoints (path, or `checkpoints[3]`), without copies of others.
        dropped: the checkpoints (path, or `checkpoints[3]`) that "Schmidt" dropped because in every
            block they depend linearly on the ones before them.

    Raises:
        CheckpointError: a checkpoint cannot be read, does not fit the model, or contains NaN or
            infinity.
        MemoryError: the basis does not fit into the free memory.
        ValueError: an argument is out of its range; there are no checkpoints, or for "PCA" no two
            that differ; the model is on `meta`, has no trainable parameters, or some that are
            not in its `state_dict`; or the parameters, arguments or checkpoints of a rank of
            `process_group` differ from the first rank's.
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
        columns = self._columns = Columns(model, granularity)
        self._shards, self._replicas = columns.shards, Replicas(process_group)
        self.parameters, device = columns.parameters, columns.parameters[0].device
        if device.type == "meta":
            raise ValueError("the model is on meta: give it a device first, by model.to_empty")
        basis = (extract, components, bits, granularity, unit)
        self._replicas.check({"model": columns.layout, "number of checkpoints": n, "basis": basis})
        self._plan = Plan(n, extract, components, bits, device, columns.dtype)
        free = self._shards.share(free_memory(device), device, self._replicas.count)
        self._plan.check(columns.total, free, self._shards.count)
        self._build()
        self._stamps = [stamp(checkpoint) for checkpoint in self._checkpoints]

    @full_precision
    def _build(self) -> None:
        """Computes the basis, block by block, and stores it."""
        plan, columns, several = self._plan, self._columns, self._replicas.count > 1
        window = Window(columns, self._checkpoints, plan, whole=plan.in_place, hashed=several)
        self._matrix = self._allocate(window)
        self.mean, self.names = None, window.names
        if self._extract == "PCA":  # In place, the matrix leaves the window's last row free.
            self.mean = window.rows[-1] if plan.in_place else self.empty(plan.dtype)
        units = torch.zeros(columns.count, plan.height, dtype=torch.float32, device="cpu")
        used = torch.zeros(plan.n, dtype=torch.float32, device="cpu")
        for batch in window.batches():
            transform, of_batch, kept, dtype = self._transform(batch, window)
            self._fill(batch, window, transform, dtype)
            used += kept.cpu().any(dim=0)
            if self._shards.first or not batch.shared:  # One rank reports a shared block.
                units[batch.numbers] = of_batch.float().cpu()
        if several:
            names = (f"checkpoint {Path(name).name}" for name in window.names)
            hashes = self._shards.sum(window.hashes).tolist()
            self._replicas.check(dict(zip(names, hashes, strict=True)))
        self._number_coefficients(units)
        used = self._shards.sum(used.to(self.parameters[0].device)).tolist()
        self.dropped = [name for name, use in zip(window.names, used, strict=True) if not use]
        if self.dropped and self._shards.first:
            warnings.warn(
                f"{len(self.dropped)} of {plan.n} checkpoints depend linearly on the ones before "
                f"them and were dropped from the basis: {', '.join(self.dropped)}",
                stacklevel=4,
            )

    def _allocate(self, window: Window) -> Matrix:
        """The matrix P, whose elements are not yet set; in place of `window.rows` if it fits."""
        plan, columns, device = self._plan, self._columns, self.parameters[0].device
        if plan.bits < 32:
            from twa.storage.compressed import CompressedMatrix

            return CompressedMatrix(plan.bits, plan.height, columns.blocks, columns.count, device)
        if plan.in_place:
            rows = window.rows[: plan.height]
        else:
            rows = torch.empty(plan.height, columns.total, dtype=torch.float32, device=device)
        return Matrix(rows, columns.blocks, columns.count)

    def _transform(
        self, batch: Blocks, window: Window
    ) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
        """Computes how P and u of the blocks in `batch` come from the checkpoints.

        Returns:
            T with `P = T X` for the differences X of neighbouring checkpoints, float64
            [blocks, height, n]; u, float64 [blocks, height], 0 for rows that a block does not have;
            which checkpoints are in the basis, bool [blocks or 1, n]; and the dtype for `T X`.
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
            # On a CPU float32 is faster.
            single = window.rows.device.type == "cpu" and window.rows.dtype == torch.float32
            transform, kept, dtype = extraction.gram_schmidt(products, single)
            kept = self._replicas.broadcast(kept)
            units = (transform != 0).any(dim=2).double()
        return *map(self._replicas.broadcast, (transform, units)), kept, dtype

    def _fill(self, batch: Blocks, window: Window, transform: Tensor, dtype: torch.dtype) -> None:
        """Stores the rows `T X` of the blocks in `batch`, and their mean."""
        if self.mean is not None:
            transform = torch.cat([transform, extraction.mean_row(transform)], dim=1)
        for start, differences in window.differences(batch, dtype):
            rows = transform.to(dtype) @ differences
            rows = rows.transpose(0, 1).flatten(1).to(self._plan.dtype)
            rows = rows.to(self.parameters[0].device)
            self._matrix.fill(start, rows[: self._plan.height].float())
            if self.mean is not None:
                self.mean[start : start + rows.shape[1]] = rows[-1]

    def _number_coefficients(self, units: Tensor) -> None:
        """Numbers the coefficients, one for each row that a block has.

        `units` is u [blocks, height], 0 for rows that do not exist or that another rank reports.
        """
        self._shape = units.shape
        units = self._shards.sum(units.to(self.parameters[0].device)).flatten()
        self._index = units.nonzero()[:, 0]
        if self._extract == "PCA" and not len(self):
            raise ValueError(
                "the checkpoints do not differ: there is nothing to average (a state_dict that is "
                "not copied changes with its model)"
            )
        self.scale = units[self._index] if self._extract == "PCA" else None

    def __len__(self) -> int:
        """The number of coefficients of all blocks together."""
        return len(self._index)

    @property
    def shards(self) -> int:
        """The number of ranks that the model is sharded among; 1 if it is not sharded."""
        return self._shards.count

    @property
    def dtype(self) -> torch.dtype:
        """float64 if a parameter is float64 or complex128, else float32."""
        return self._plan.dtype

    @property
    def nbytes(self) -> int:
        """The memory of the stored basis and the mean on this rank, in bytes."""
        return self._matrix.nbytes + (0 if self.mean is None else self.mean.nbytes)

    @full_precision
    def project(self, gradients: Tensor, extras: Tensor | None = None) -> Tensor:
        """`u ∘ P g`: the gradient with respect to the coefficients.

        Args:
            gradients: float32 [D], in the order of the columns.
            extras: float32 numbers to sum in place, in the same all-reduce, over the ranks that
                the model is sharded among.

        Returns:
            float32 [len(self)], the coefficients of all blocks one after the other.
        """
        products = self._matrix.project(gradients).flatten()
        if extras is None:
            self._shards.sum(products)
        else:
            products = self._shards.sum(torch.cat([products, extras]))
            extras.copy_(products[-len(extras) :])
        products = self._existing(products[: self._shape.numel()])
        return products if self.scale is None else products * self.scale

    @full_precision
    def expand(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """`Pᵀ (u ∘ c)`: the weights of coefficients c, less the origin.

        Args:
            coefficients: float32 [len(self)].
            out: the result, to write to. A loop should reuse one vector: allocating it can take
                longer than the product.

        Returns:
            float32 [D], in the order of the columns.
        """
        out = self.empty() if out is None else out
        scaled = coefficients if self.scale is None else coefficients * self.scale
        self._matrix.expand(self._by_block(scaled), out)
        return out

    @full_precision
    def coordinates(self, weights: Tensor) -> Tensor:
        """The coefficients of the point of the subspace that is nearest to `weights`.

        Takes float32 or float64 [D], in the order of the columns, and returns float32 [len(self)].
        """
        weights = (weights if self.mean is None else weights - self.mean).float()
        square = 1 if self.scale is None else self.scale.square()
        coefficients = self.project(weights) / square
        # Projecting the remainder corrects the rounding of sums as long as the model.
        rest = self.expand(coefficients)
        torch.sub(weights, rest, out=rest)
        return coefficients + self.project(rest) / square

    @full_precision
    def limit(self, coefficients: Tensor, radius: float) -> None:
        """Scales, in place, the coefficients of blocks whose root mean square exceeds `radius`."""
        squares = self._by_block(coefficients).square().sum(1)
        sizes = self._by_block(torch.ones_like(coefficients)).sum(1)
        factors = radius / (squares / sizes).sqrt()
        factors = factors.clamp(max=1)[:, None].expand(self._shape)
        coefficients *= self._existing(factors.flatten())

    @full_precision
    def averaging_weights(self, coefficients: Tensor) -> Tensor:
        """α with `w = Σ α_i w_i`, where w is the origin plus `expand(coefficients)`.

        It reads the checkpoints again: to store n numbers for each direction of each block could
        take more memory than a compressed basis.

        Returns:
            float64 on the CPU, [checkpoints] at granularity "model", else [blocks, checkpoints].
            They sum to 1 for "PCA". They are zero where a checkpoint was dropped. The checkpoints
            are those in `names`.

        Raises:
            CheckpointError: a file of a checkpoint has changed, or cannot be read any more.
        """
        for checkpoint, name, before in zip(
            self._checkpoints, self.names, self._stamps, strict=True
        ):
            if stamp(checkpoint) != before:
                raise CheckpointError(
                    f"{name}: has changed since the basis was built, so its weight is not known"
                )
        window = Window(self._columns, self._checkpoints, self._plan)
        coefficients = self._by_block(coefficients).cpu().double()
        weights = torch.zeros(len(coefficients), self._plan.n, dtype=torch.float64, device="cpu")
        for batch in window.batches():
            transform, units, kept, _ = self._transform(batch, window)
            rows = extraction.of_checkpoints(units[:, :, None] * transform)
            rows = rows.masked_fill_(~kept[:, None].to(rows.device), 0).cpu()
            if self._shards.first or not batch.shared:
                weights[batch.numbers] = (coefficients[batch.numbers, None] @ rows)[:, 0]
        if self._shards.count > 1:  # NCCL needs its device. (MPS, without float64, has one rank.)
            weights = self._shards.sum(weights.to(self.parameters[0].device)).cpu()
        if self.mean is not None:
            weights += 1 / weights.shape[1]
        return weights[0] if self._granularity == "model" else weights

    def by_name(self, averaging_weights: Tensor) -> dict[str, Tensor]:
        """α, as `averaging_weights` returns it, by the names of the parameters.

        Each value is float64 [checkpoints, ...] and broadcasts with the parameter, so that
        `w = Σ α[i] * w_i`.
        """
        return self._columns.by_name(averaging_weights.reshape(-1, self._plan.n))

    def empty(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised vector for the columns, [D]."""
        return torch.empty(self._columns.total, dtype=dtype, device=self.parameters[0].device)

    @torch.no_grad()
    def flatten(self, tensors: Iterable[Tensor | None], out: Tensor | None = None) -> Tensor:
        """`tensors`, one for each parameter, as one vector in the order of the columns.

        They have the shapes of `self.parameters` and any dtype; None stands for zeros. A complex
        number takes two columns. The result is float32 [D], or written to `out` if that is given.
        """
        out = self.empty() if out is None else out
        parts, values = [], []
        all_parts = self._columns.split(out)
        for part, tensor, parameter in zip(all_parts, tensors, self.parameters, strict=True):
            if tensor is None:
                part.zero_()
            else:
                dense = local(tensor).to_dense()  # An embedding's gradient may be sparse.
                parts.append(part)
                values.append(self._columns.arranged(dense, parameter))
        torch._foreach_copy_(parts, values)
        return out

    @torch.no_grad()
    def assign(self, start: Tensor, moved: Tensor) -> None:
        """Writes the sum of `start` and `moved`, [D], to the model's parameters.

        The sum may be formed in `moved`.
        """
        self._shards.reshard()
        own = [self._columns.arranged(local(p), p) for p in self.parameters]
        if any(weights.device.type != "cpu" for weights in own):
            # One launch for all of them. The weights may be on several accelerators.
            total = moved.add_(start) if moved.dtype == start.dtype else start + moved
            torch._foreach_copy_(own, list(self._columns.split(total)))
            return
        # On the CPU one pass over memory counts more than the number of calls.
        parts = (self._columns.split(flat) for flat in (start, moved))
        for weights, *terms in zip(own, *parts, strict=True):
            torch.add(*terms, out=weights)

    @torch.no_grad()
    def fingerprint(self, flat: Tensor) -> Tensor:
        """A hash of the parameters' names and shapes and of the float32 bits of `flat` [D].

        It depends neither on the number of ranks nor on the device. Int64 scalar on the CPU.
        """
        total = torch.zeros((), dtype=torch.int64, device=flat.device)
        widths = self._columns.widths
        for parameter, columns in zip(self.parameters, flat.split(widths), strict=True):
            first = first_row(parameter) * math.prod(parameter.shape[1:])
            first *= 1 + parameter.is_complex()
            for part in columns.float().view(torch.int32).split(CHUNK):
                places = torch.arange(first, first + len(part), device=flat.device)
                total += (part * (places * 0x9E3779B1 + 1)).sum()  # modulo 2^64
                first += len(part)
        names = hashlib.sha256(self._columns.layout.encode()).digest()[:8]
        return self._shards.sum(total).cpu() ^ int.from_bytes(names, "big", signed=True)

    def _existing(self, rows: Tensor) -> Tensor:
        """The numbers of rows that exist, from one for each of `height` rows of each block."""
        return rows if len(self) == len(rows) else rows[self._index]

    def _by_block(self, coefficients: Tensor) -> Tensor:
        """`coefficients` as [blocks, height], zero where a block has no such row."""
        if len(self) == self._shape.numel():
            return coefficients.view(self._shape)
        padded = coefficients.new_zeros(self._shape.numel())
        padded[self._index] = coefficients
        return padded.view(self._shape)


def _check_arguments(n, extract, components, bits, granularity, unit) -> None:
    choices = {"extract": EXTRACTS, "bits": BITS, "granularity": GRANULARITIES, "unit": UNITS}
    given = (extract, bits, granularity, unit)
    for (name, allowed), value in zip(choices.items(), given, strict=True):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
    if n == 1 and extract == "PCA":
        raise ValueError("extract 'PCA' takes two checkpoints or more: one has no spread")
    for name, used in (("components", components is not None), ("unit", unit == "block")):
        if extract == "Schmidt" and used:
            raise ValueError(f"{name} belongs to extract 'PCA', not to 'Schmidt'")
    if components is not None and components < 1:
        raise ValueError(f"components must be 1 or more, not {components!r}")
