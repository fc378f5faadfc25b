"""Control by a picture: a trainable copy of the encoder between zero convolutions (Zhang et al. 2023, ControlNet)."""

from copy import deepcopy

from torch import Tensor, nn

from .layers import zero_init
from .shapes import Images, Labels, Network, Time
from .unet import UNet


class ZeroConv(nn.Conv2d):
    """A convolution W h + b that starts at zero (Zhang et al. 2023, section 3.1).

    With g the gradient at its output: dW = g h^T and db = g, so the layer itself learns at once; dh = W^T g = 0, so
    what stands before it learns only after it has moved.
    """

    def __init__(self, channels: int, out_channels: int, side: int = 1):
        super().__init__(channels, out_channels, side, padding=side // 2)
        zero_init(self)


class ControlNet(nn.Module):
    """residuals = Z_out(encoder copy(stem(xt) + Z_in(hint))) (Zhang et al. 2023, eq. 2), one for each skip connection
    and one for the middle, as `UNet.forward` takes them. All start at zero.

    Made from a trained U-Net, which may be frozen already: the copy is trainable all the same.
    """

    def __init__(self, unet: UNet, hint_channels: int):
        super().__init__()
        self.hint_channels = hint_channels
        self.copy = deepcopy(unet).requires_grad_()  # a copy of frozen weights would be frozen, and never learn
        del self.copy.up_blocks, self.copy.ups, self.copy.norm, self.copy.head  # the decoder stays with the base
        width = unet.widths[0]
        self.hint_encoder = nn.Sequential(
            nn.Conv2d(hint_channels * unet.patch**2, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
        )
        self.zero_in = ZeroConv(width, width, side=3)
        self.zero_out = nn.ModuleList(ZeroConv(width, width) for width in (*unet.widths, unet.widths[-1]))

    def forward(
        self,
        xt: Images,
        t: Time,
        hint: Tensor,
        *,
        label: Labels | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """hint (b, hint_channels, h, w), as high and wide as xt -> one residual per width and one for the middle.

        Raises ValueError, naming the shapes, for another hint and for whatever the U-Net itself does not take.
        """
        expected = (len(xt), self.hint_channels, *xt.shape[2:])
        if hint.shape != expected:
            raise ValueError(f"with xt {tuple(xt.shape)} the hint must be {expected}, got {tuple(hint.shape)}")
        added = self.zero_in(self.hint_encoder(self.copy.fold(hint)))
        skips, middle, _ = self.copy.encode(xt, t, label=label, context=context, mask=mask, added=added)
        return [zero(h) for zero, h in zip(self.zero_out, [*skips, middle], strict=True)]


def controlled(unet: UNet, controlnet: ControlNet, hint: Tensor, strength: float = 1.0) -> Network:
    """(xt, t, *, label, context, mask) -> output of the U-Net with `strength` times the residuals; 0 is the U-Net.

    Hint (b, hint_channels, h, w), one for each example.
    """

    def network(xt: Images, t: Time, **conditions: Tensor | None) -> Images:
        residuals = controlnet(xt, t, hint, **conditions)
        return unet(xt, t, residuals=[strength * residual for residual in residuals], **conditions)

    return network


class Controlled(nn.Module):
    """A frozen U-Net and its ControlNet as one network."""

    frozen = "unet"

    def __init__(self, unet: UNet, controlnet: ControlNet):
        super().__init__()
        self.unet, self.controlnet = unet.requires_grad_(False), controlnet

    @property
    def null(self) -> int:
        """The label that stands for no class."""
        return self.unet.null

    def forward(
        self, xt: Images, t: Time, *, hint: Tensor, strength: float = 1.0, **conditions: Tensor | None
    ) -> Images:
        """As `controlled`."""
        return controlled(self.unet, self.controlnet, hint, strength)(xt, t, **conditions)
