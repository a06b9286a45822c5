"""Trainable Weight Averaging (Li et al., ICLR 2023): train the coefficients of a weight average.

    from twa import TWA, Subspace, best_start

`TWA` is the optimizer that a training loop uses; `best_start` finds where it should begin, and
`Subspace` is the basis that it moves in.
"""

from twa.files.checkpoints import CheckpointError
from twa.optimizer import TWA, rate_of
from twa.recipe import best_start
from twa.subspace import Subspace

__version__ = "0.2.0"
__all__ = ["TWA", "CheckpointError", "Subspace", "best_start", "rate_of"]
