"""Resumable states: all that a run needs to go on as if it had not stopped."""

import random
from pathlib import Path

import numpy as np
import torch

from training import ranks
from training.files import save
from twa.files.checkpoints import check_finite, load_into
from twa.files.formats import load, verify
from utils import UserError

# 1: without progress within an epoch; 2: fewer settings; 3: no fingerprint of TWA; 4: settings
# were chosen by name; 5: the coefficients lay beside the state of the optimizer, not in it.
FORMAT = 6


def save_state(path: Path, epoch: int, settings: dict, **parts) -> None:
    """Saves the state of a run after `epoch` epochs.

    Called on every rank; the first one writes. Another number of ranks can go on from it; the same
    number does so to the bit, as it holds what is each rank's own, random states and buffers.
    Weights that hold NaN or infinity are not saved: a `NotFiniteError` names the first.

    Args:
        settings: plain values that must be the same when the run goes on.
        parts: "model", and what else has a `state_dict()`: optimizer, schedule, …
    """
    own = {
        "random": random_states(),
        "buffers": [b.cpu() for b in ranks.buffers_of(parts["model"])],
    }
    state = {
        "format": FORMAT,
        "epoch": epoch,
        "settings": settings,
        "random": own["random"],
        "ranks": ranks.gather(own) if ranks.world() > 1 else [],
        **{name: part.state_dict() for name, part in parts.items() if name != "model"},
        "model": ranks.state_dict_of(parts["model"]),
    }
    if ranks.rank() == 0:
        check_finite(state["model"], f"{path} is left as it was")
        save(state, path)


def read_state(path: Path, settings: dict, flag: str) -> dict:
    """What `save_state` saved.

    Args:
        settings: as for `save_state`.
        flag: what names the directory of the state on the command line.

    Raises:
        UserError: the file is no such state, or one of another format or setting.
        CheckpointError: the file cannot be read.
    """
    if ranks.rank() == 0:  # reads all of it; the others read their part
        verify(path)
    state = load(path)
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path}: is not a resumable state")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path}: has format {state['format']}, this version reads format {FORMAT}; "
            f"go on with the version that wrote it, or give another {flag} to start anew"
        )
    # Earlier versions did not save what the data are.
    saved = {"data_dir": settings.get("data_dir")} | state["settings"]
    for key, value in settings.items():
        if saved.get(key) != value:
            raise UserError(
                f"{path}: was saved with {key} {saved.get(key)}, "
                f"but this run has {key} {value}; give that, or another {flag} to start anew"
            )
    return state


def load_state(path: Path, settings: dict, flag: str, **parts) -> int:
    """Restores what `save_state` saved; returns the epochs that are done.

    Args:
        settings, flag: as for `read_state`.
        parts: as for `save_state`.

    Raises:
        UserError, CheckpointError: as `read_state`; or the state is that of other parts.
    """
    state = read_state(path, settings, flag)
    model = parts.pop("model")
    load_into(model, state["model"], name=str(path))
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: the state of the {name} does not fit ({error})") from None
    everyones = state.get("ranks", [])  # which earlier versions did not save
    if len(everyones) != ranks.world():
        set_random_states(state["random"])
        return state["epoch"]
    own = everyones[ranks.rank()]
    set_random_states(own["random"])
    for buffer, saved in zip(ranks.buffers_of(model), own["buffers"], strict=True):
        buffer.copy_(saved)
    return state["epoch"]


def random_states() -> dict:
    """The state of every generator that `utils.set_seed` seeds, as plain tensors and numbers.

    An accelerator's generator is part of it where the backend has one to read.
    """
    name, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        states[kind] = torch.get_device_module(kind).get_rng_state()
    return states


def set_random_states(states: dict) -> None:
    """Restores what `random_states` returned."""
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        if kind in states:
            torch.get_device_module(kind).set_rng_state(states[kind])
