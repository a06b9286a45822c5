"""Trainable Weight Averaging (Li et al., ICLR 2023): train the coefficients of a weight average.

    from twa import TWA, Recipe, Subspace, best_start

`Recipe` is what most people use: it finds the start point, makes the optimizer and keeps the best
of what came out. `TWA` is the optimizer alone, and `Subspace` the basis that it moves in. The
module `twa.reference` is the method on a page.
"""

from twa.files.reading import CheckpointError
from twa.optimizer import TWA
from twa.recipe import Recipe, best_start, rate_of
from twa.subspace import Subspace

__version__ = "0.3.0"
__all__ = ["TWA", "CheckpointError", "Recipe", "Subspace", "best_start", "rate_of"]
