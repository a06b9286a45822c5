"""Means of LoRA adapters: the mean of their products BA, which is not the product of the means.

The products `s_i B_i A_i`, with the scaling s_i of each adapter, are summed exactly by stacking:
`Σ α_i s_i B_i A_i = [α_1 s_1 B_1 … α_n s_n B_n] [A_1; …; A_n]`, of rank `Σ r_i`. A smaller rank is
the best approximation by a singular value decomposition.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from twa.files.checkpoints import check_finite
from twa.files.formats import adapter_config
from twa.files.reading import CheckpointError, tensor_of
from twa.files.states import weights_of

# The names of A in PEFT's files, of which those of B are made; of Linear and Conv, of Embedding.
A, B = re.compile(r"\.lora_(embedding_)?A(\.weight)?$"), r".lora_\1B\2"


def is_adapter(path: Path) -> bool:
    return path.is_dir() and bool(adapter_config(path))


def check(paths: Sequence[Path]) -> None:
    """Raises a `CheckpointError` for an adapter whose mean is not one of products of LoRA."""
    for path in paths:
        config = adapter_config(path)
        if not config:
            raise CheckpointError(f"{path}: is no adapter of PEFT, and {paths[-1]} is one")
        if config.get("peft_type") != "LORA":
            raise CheckpointError(
                f"{path}: is an adapter of kind {config.get('peft_type')}; only LoRA is averaged"
            )
        if config.get("use_dora"):
            raise CheckpointError(
                f"{path}: is an adapter of DoRA, whose magnitudes are no products: merge each into "
                "its model (merge_and_unload), and average these"
            )


def write(
    paths: Sequence[Path], weights: Sequence[float], target: Path, rank: int | None = None
) -> float:
    """Writes the mean `Σ α_i s_i B_i A_i / Σ α_i` of LoRA adapters into the folder `target`.

    Biases and `modules_to_save` are averaged as they are.

    Args:
        weights: α, [len(paths)].
        rank: of the result; None for the sum of the ranks, which is exact.

    Returns:
        the error of a smaller rank, relative to the products, in the Frobenius norm.

    Raises:
        CheckpointError: the adapters are of different modules, or hold NaN or infinity.
    """
    states, configs = [], [adapter_config(path) for path in paths]
    for path in paths:
        state = {k: tensor_of(v).double() for k, v in weights_of(path, str(path)).items()}
        check_finite(state, str(path))
        if states and state.keys() != states[0].keys():
            odd = min(state.keys() ^ states[0].keys())
            raise CheckpointError(f"{path}: {odd} is in it or in {paths[0]}, and not in both")
        states.append(state)
    dtypes = {k: v.dtype for k, v in weights_of(paths[-1], str(paths[-1])).items()}
    alphas = [weight / math.fsum(weights) for weight in weights]
    mean: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    lost = whole = 0.0
    for key in states[-1]:
        module = A.sub("", key)
        if A.search(key):
            other = module + A.search(key).expand(B)
            scales = [
                _scaling(c, module, len(s[key])) for c, s in zip(configs, states, strict=True)
            ]
            factors = [alpha * scale for alpha, scale in zip(alphas, scales, strict=True)]
            left = torch.cat([f * s[other] for f, s in zip(factors, states, strict=True)], 1)
            right = torch.cat([state[key] for state in states])
            left, right, missing, total = _of_rank(left, right, rank)
            lost, whole = lost + missing, whole + total
            mean[other], mean[key], ranks[module] = left, right, len(right)
        elif key not in mean and ".lora_" not in key:
            mean[key] = sum(a * s[key] for a, s in zip(alphas, states, strict=True))
    save_file(
        {key: mean[key].to(dtypes[key]).contiguous() for key in states[-1]},
        target / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = configs[-1] | _config_of(ranks)
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return math.sqrt(lost / whole) if whole else 0.0


def _scaling(config: Mapping, module: str, rank: int) -> float:
    """By what PEFT scales the product of this module's matrices."""
    name = module.removeprefix("base_model.model.")
    patterns = (config.get("alpha_pattern") or {}).items()
    matching = (a for key, a in patterns if re.match(rf"(.*\.)?({key})$", name))
    alpha = next(matching, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _config_of(ranks: Mapping[str, int]) -> dict:
    """The fields of PEFT's configuration for adapters of these ranks, with a scaling of 1."""
    common = max(ranks.values())
    odd = {
        re.escape(module.removeprefix("base_model.model.")): rank
        for module, rank in ranks.items()
        if rank != common
    }
    return {
        **{"r": common, "lora_alpha": common, "use_rslora": False},
        **{"rank_pattern": odd, "alpha_pattern": dict(odd), "inference_mode": True},
    }


def _of_rank(left: Tensor, right: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float, float]:
    """`left @ right` in `rank` dimensions; the squares of what is lost and of the whole.

    `left` is [out, r, ...] and `right` is [r, in, ...], as of convolutions.
    """
    if rank is None or rank >= len(right):
        return left, right, 0.0, 1.0
    flat_left, flat_right = left.flatten(1), right.flatten(1)
    q_left, r_left = torch.linalg.qr(flat_left)
    q_right, r_right = torch.linalg.qr(flat_right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    roots = s[:rank].sqrt()
    new_left = (q_left @ u[:, :rank] * roots).reshape(len(left), rank, *left.shape[2:])
    new_right = (roots[:, None] * v[:rank] @ q_right.T).reshape(rank, *right.shape[1:])
    return new_left, new_right, float(s[rank:].square().sum()), float(s.square().sum())
