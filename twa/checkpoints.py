"""Checkpoints for your own scripts: load one into a model, and average several."""

from twa.files.checkpoints import NotFiniteError, average, load_into
from twa.files.reading import CheckpointError
from twa.files.states import load_state_dict

__all__ = ["CheckpointError", "NotFiniteError", "average", "load_into", "load_state_dict"]
