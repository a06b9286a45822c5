"""He initialisation (He et al., "Delving Deep into Rectifiers", 2015, arXiv:1502.01852)."""

from torch import nn


def he_normal_(model: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / fan_out), in place, and zero its bias.

    Batch norms and linear layers keep PyTorch's defaults.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
