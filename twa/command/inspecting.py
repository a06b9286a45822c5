"""`twa inspect`: how the checkpoints of a window lie to each other, from their inner products."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twa.command.choice import Chosen, checked, loss_of
from twa.command.mean import PIECE, Checkpoints
from twa.files.formats import parts_of
from twa.files.reading import CheckpointError
from twa.files.writing import replacing


@dataclass(frozen=True)
class Geometry:
    """How n checkpoints lie to each other, from the inner products of their differences.

    Args:
        gram: of the first checkpoint and the differences of neighbours, float64 [n, n].
    """

    gram: Tensor

    @property
    def centred(self) -> Tensor:
        """The inner products of the checkpoints less their mean, [n, n]."""
        n = len(self.gram)
        to_checkpoints = torch.ones(n, n, dtype=torch.float64).tril()
        to_checkpoints -= to_checkpoints.mean(0)
        to_checkpoints[:, 0] = 0  # the first one cancels
        return to_checkpoints @ self.gram @ to_checkpoints.T

    @property
    def distances(self) -> Tensor:
        """The distances of all pairs, [n, n]."""
        squares = self.centred.diagonal()
        between = squares[:, None] + squares - 2 * self.centred
        return between.clamp(min=0).sqrt()

    @property
    def to_mean(self) -> Tensor:
        return self.centred.diagonal().clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """The cosines of successive moves, [n - 2]."""
        moves = self.gram[1:, 1:]
        norms = moves.diagonal().sqrt()
        return moves.diagonal(1) / (norms[1:] * norms[:-1]).clamp(min=1e-300)

    @property
    def spectrum(self) -> Tensor:
        """The share of the spread along each principal direction, [n - 1], from the largest on."""
        values = torch.linalg.eigvalsh(self.centred).flip(0)[:-1].clamp(min=0)
        return values / values.sum().clamp(min=1e-300)

    @property
    def advice(self) -> str:
        """Which windows make sense, in a sentence."""
        moves = self.gram.diagonal()[1:].sqrt()
        if len(moves) < 2:
            return "Two checkpoints: compare their mean with the better of them."
        cosine, shrunk = float(self.cosines.mean()), float(moves[-1] / moves.max())
        if shrunk < 0.2:
            return (
                f"The last move is {shrunk:.2f} of the largest: the learning rate has decayed, and "
                "an average of the checkpoints before that gains little over the last one."
            )
        if cosine > 0.3:
            return (
                f"Successive moves agree (mean cosine {cosine:.2f}): the training is under way, so "
                "average the last few only."
            )
        if cosine < -0.2:
            return (
                f"Successive moves oppose each other (mean cosine {cosine:.2f}): the checkpoints "
                "scatter around a point, so the mean of all of them makes sense."
            )
        return (
            f"Successive moves are nearly independent (mean cosine {cosine:.2f}): compare the "
            "means of the last 2, 4, 8 and all checkpoints."
        )


def geometry(
    checkpoints: Checkpoints, read: Callable[[int], None]
) -> tuple[Geometry, list[str | None]]:
    """The geometry of the real and complex tensors, and in which each checkpoint has NaN.

    NaN and infinities that all have in the same places are by design; others count as 0.
    """
    n = len(checkpoints.paths)
    gram, odd = torch.zeros(n, n, dtype=torch.float64), [None] * n
    for key, value in checkpoints.tensors.items():
        if not (value.dtype.is_floating_point or value.dtype.is_complex):
            continue
        for _, pieces in checkpoints.pieces(key, max(1, 4 * PIECE // n)):
            wide = [p.float() if p.dtype.itemsize == 1 else p for p in pieces]
            rows = torch.stack([torch.view_as_real(p) if p.is_complex() else p for p in wide])
            rows = rows.double().flatten(1)
            finite = rows.isfinite()
            if not finite.all():
                for i in range(n):
                    if not finite[i].equal(finite.any(0) if n > 1 else finite[i]):
                        odd[i] = odd[i] or key
                rows.nan_to_num_(0, 0, 0)
            rows[1:] -= rows[:-1].clone()
            gram += rows @ rows.T
            read(sum(piece.nbytes for piece in pieces))
    return Geometry(gram), odd


def report(
    chosen: Sequence[Chosen], read: Callable[[int], None], figure: Path | None = None
) -> list[str]:
    """The lines that `twa inspect` prints: a row a checkpoint, the spectrum, what is odd."""
    kept, notes = checked(chosen)
    fitting = []
    for each in kept:
        try:
            Checkpoints([each.path, kept[-1].path])
            fitting.append(each)
        except CheckpointError as error:
            notes.append(str(error))
    checkpoints = Checkpoints([each.path for each in fitting])
    found, odd = geometry(checkpoints, read)
    for each, key in zip(fitting, odd, strict=True):
        if key:
            notes.append(f"{each.path}: {key} holds NaN or infinity")
    times = [max(os.stat(part).st_mtime for part in parts_of(each.path)) for each in fitting]
    for i in range(1, len(times)):
        if times[i] < times[i - 1]:
            notes.append(
                f"{fitting[i].path} is older than {fitting[i - 1].path}: of another run, or copied"
            )
    dtypes = sorted({str(v.dtype).removeprefix("torch.") for v in checkpoints.tensors.values()})
    size = checkpoints.bytes_to_read / len(fitting)
    width = max(len(str(each.path)) for each in fitting)
    losses = [loss_of(each.path) for each in fitting]
    lines = [
        f"{len(fitting)} checkpoints of {len(checkpoints.tensors)} tensors, "
        f"{size / 1e9:.3f} GB each ({', '.join(dtypes)})",
        f"{'checkpoint':{width}}     step       move    to mean  cosine     loss",
    ]
    moves = [math.nan, *found.gram.diagonal()[1:].sqrt().tolist()]
    cosines = [math.nan, math.nan, *found.cosines.tolist()]
    columns = zip(fitting, moves, found.to_mean.tolist(), cosines, losses, strict=False)
    for each, move, to_mean, cosine, loss in columns:
        step = "" if each.step is None else each.step
        cells = (shown(move, "10.4g"), shown(to_mean, "10.4g"), shown(cosine, "7.2f"))
        lines.append(
            f"{each.path!s:{width}} {step:>8} {' '.join(cells)} {shown(loss or math.nan, '8.4f')}"
        )
    if len(fitting) > 1:
        directions = int((found.spectrum.cumsum(0) < 0.9).sum()) + 1
        lines.append(f"{directions} of {len(fitting) - 1} directions have 90 % of the spread.")
        lines.append(found.advice)
    if figure is not None:
        draw(found, fitting, figure)
        lines.append(f"wrote {figure}")
    return [*lines, *(f"note: {note}" for note in notes)]


def shown(number: float, form: str) -> str:
    return " " * int(form.partition(".")[0]) if math.isnan(number) else format(number, form)


def draw(found: Geometry, chosen: Sequence[Chosen], path: Path) -> None:
    """Draws the distances of all pairs, and the spread that the leading directions hold."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CheckpointError("--figure: takes matplotlib; pip install matplotlib") from None
    picture = Figure(figsize=(9, 4), layout="constrained")
    left, right = picture.subplots(1, 2)
    image = left.imshow(found.distances.numpy(), origin="lower", cmap="viridis")
    picture.colorbar(image, ax=left, label="distance")
    steps = [str(i if each.step is None else each.step) for i, each in enumerate(chosen)]
    every = max(1, len(steps) // 8)
    left.set_xticks(range(0, len(steps), every), steps[::every])
    left.set_yticks(range(0, len(steps), every), steps[::every])
    left.set(xlabel="checkpoint", ylabel="checkpoint", title="Distances between checkpoints")
    right.plot(range(1, len(found.spectrum) + 1), (100 * found.spectrum.cumsum(0)).numpy(), "o-")
    right.axhline(90, color="grey", linewidth=0.8, linestyle="--")
    right.set(
        xlabel="principal directions", ylabel="share of the spread (%)", ylim=(0, 102),
        title="Spread in the leading directions",
    )  # fmt: skip
    with replacing(path) as temporary:
        picture.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=150)
