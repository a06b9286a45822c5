"""Models of the user's own: the function that `--model-factory MODULE:FUNCTION` names.

It is imported from the current directory, PYTHONPATH, and then the repository's root. If the user
has a module of the same name as one of ours, ours is removed from `sys.modules` for good: the
scripts have imported it by then, and what imports that name later (a forward pass, `torch.compile`)
means the user's.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from utils import UserError

_ROOT = Path(__file__).resolve().parents[1]


def build(name: str, example: torch.Tensor, shape: tuple[int, ...]) -> nn.Module:
    """The model that `module:function` returns, called without arguments and tried once.

    A model that returns an object with `logits`, as those of transformers do, returns these alone
    from then on.

    Args:
        example: a batch that it must take: images, float [B, C, H, W], or tokens, int64 [B, T].
        shape: of the logits that it must give: [B, classes], or [B, T, vocabulary].

    Raises:
        UserError: the function is not there or fails, or returns something else than a model with
            parameters to train that maps `example` to logits of this `shape`.
    """
    module, _, function = name.partition(":")
    name = f"--model-factory {name}"
    removed = _prefer_the_users()
    try:
        model = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever the user's code may raise
        raise UserError(
            f"{name}: cannot be imported from the current directory or PYTHONPATH and called "
            f"({_one_line(error)})"
        ) from None
    if not isinstance(model, nn.Module):
        raise UserError(f"{name}: returns a {type(model).__name__}, not an nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{name}: returns a model without parameters to train")
    model.register_forward_hook(_logits)
    given = "images" if example.is_floating_point() else "tokens"
    try:
        with torch.no_grad():
            logits = model.eval()(example)
    except Exception as error:
        size, reason = tuple(example.shape), _one_line(error)
        raise UserError(f"{name}: does not take {given} of shape {size} ({reason})") from None
    if not isinstance(logits, torch.Tensor):
        raise UserError(f"{name}: gives a {type(logits).__name__}, not a tensor of logits")
    if logits.shape != shape:
        raise UserError(
            f"{name}: gives logits of shape {list(logits.shape)} for {given} of shape "
            f"{list(example.shape)}, and the data set needs {list(shape)}"
        )
    for key, ours in removed.items():  # what is sent to worker processes is looked up by its name
        sys.modules.setdefault(key, ours)
    return model


def _logits(_, __, output: object) -> object:
    return getattr(output, "logits", output)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@dataclass(frozen=True)
class _UsersFirst:
    """A finder for `sys.meta_path`: searches the user's folders, then `sys.path`.

    `sys.path` itself stays as it is, because worker processes get a copy of it.
    """

    folders: tuple[str, ...]

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [*self.folders, *sys.path]) if path is None else None


def _prefer_the_users() -> dict[str, ModuleType]:
    """Puts the user's modules before ours, of which it removes those with a name of theirs.

    Returns:
        The submodules that were removed.
    """
    entries = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    folders = tuple(os.path.abspath(entry) for entry in entries if Path(entry).resolve() != _ROOT)
    finder = _UsersFirst(folders)
    if finder not in sys.meta_path:
        sys.meta_path.insert(sys.meta_path.index(PathFinder), finder)
    removed = {}
    for name, module in list(sys.modules.items()):
        spec = PathFinder.find_spec(name, folders) if _is_ours(name, module) else None
        if spec is None or os.path.realpath(spec.origin or "") == os.path.realpath(module.__file__):
            continue
        if spec.loader is None:  # a folder without __init__.py, which ours would come before
            if not any(list(Path(path).glob("*.py")) for path in spec.submodule_search_locations):
                continue  # checkpoints, perhaps
            sys.modules[name] = module_from_spec(spec)
        else:
            del sys.modules[name]
        for key in [key for key in sys.modules if key.startswith(f"{name}.")]:
            removed[key] = sys.modules.pop(key)
    return removed


def _is_ours(name: str, module: ModuleType) -> bool:
    """Whether this is a module or package in the repository's root or in a folder there."""
    file = getattr(module, "__file__", None)
    if file is None or name == "__main__" or "." in name:
        return False
    return _ROOT in Path(file).resolve().parents[:2]
