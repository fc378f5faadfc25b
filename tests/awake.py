"""Networks whose layers that start at zero do not hide what stands behind them."""

from torch import nn


def awake(network: nn.Module) -> nn.Module:
    """Randomise all weights; in float64 and eval mode."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.double().eval()
