"""Runs a script with torchvision's vision transformers made small, whatever their names say.

python reduced.py SCRIPT ARGUMENTS…
torchrun --standalone --nproc_per_node 2 reduced.py SCRIPT ARGUMENTS…
"""

import runpy
import sys
from pathlib import Path

from torchvision.models import vision_transformer

SIZES = {"num_layers": 2, "num_heads": 2, "hidden_dim": 48, "mlp_dim": 96}


class Reduced(vision_transformer.VisionTransformer):
    def __init__(self, **sizes):
        super().__init__(**sizes | SIZES)


if __name__ == "__main__":
    vision_transformer.VisionTransformer = Reduced
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
