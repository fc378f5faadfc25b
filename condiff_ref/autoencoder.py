"""A small variational autoencoder (Kingma & Welling 2014): the two ends of latent diffusion (Rombach et al. 2022)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from .layers import group_norm
from .schedules import draw_noise
from .shapes import Images, PerExample, Time

Latents = Float[Tensor, "b z i j"]
CHUNK = 1000  # images encoded at once to measure the scale


class Autoencoder(nn.Module):
    """Pictures (b, channels, h, w) to latents (b, latent_channels, h / factor, w / factor) and back.

    `encode` and `decode` speak of latents times `scale`, which `measure_scale` sets so that their variance is 1, as
    diffusion schedules take for granted; a network between them never sees others. `padding`: pixels put around the
    picture, as its border goes on, and cut off again, so that 28 becomes 32, which halves more often. Raises ValueError
    for a factor that is no power of two.
    """

    def __init__(self, channels: int, latent_channels: int, factor: int, *, width: int = 32, padding: int = 0):
        super().__init__()
        if factor < 1 or factor & (factor - 1):
            raise ValueError(f"the factor must be a power of two, got {factor}")
        self.channels, self.latent_channels, self.factor, self.padding = channels, latent_channels, factor, padding
        halvings = factor.bit_length() - 1
        widths = [width] + [2 * width] * halvings  # the full resolution is the costly one
        self.encoder = nn.Sequential(
            *_conv(channels, width),
            *(layer for high, low in pairwise(widths) for layer in (*_down(high, low), *_conv(low, low))),
            nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            *_conv(latent_channels, widths[-1]),
            *(layer for low, high in pairwise(widths[::-1]) for layer in (*_conv(low, low), *_up(low, high))),
            nn.Conv2d(width, channels, 3, padding=1),
        )
        self.register_buffer("scale", torch.ones(()))  # stored with the weights: a latent means nothing without it

    def posterior(self, images: Images) -> tuple[Latents, Latents]:
        """Mean and log-variance of q(z | x), before scaling. Raises ValueError for pictures it cannot fold."""
        height, width = (side + 2 * self.padding for side in images.shape[2:])
        if images.shape[1] != self.channels or height % self.factor or width % self.factor:
            padded = f" less {2 * self.padding}" if self.padding else ""
            raise ValueError(
                f"this autoencoder takes (b, {self.channels}, h, w) with h and w multiples of {self.factor}{padded}, "
                f"got {tuple(images.shape)}"
            )
        images = F.pad(images, [self.padding] * 4, mode="replicate") if self.padding else images
        mean, log_var = self.encoder(images).chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20)

    def encode(self, images: Images, generator: Generator | None = None) -> Latents:
        """Scaled latents (b, latent_channels, h / factor, w / factor): a sample of q(z | x) if given a generator, else
        its mean."""
        mean, log_var = self.posterior(images)
        return self.scale * (mean if generator is None else draw(mean, log_var, generator))

    def decode(self, latents: Latents) -> Images:
        """Scaled latents back to pictures. Raises ValueError for another number of channels."""
        if latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents are (b, {self.latent_channels}, h, w), got {tuple(latents.shape)}")
        return self._draw(latents / self.scale)

    def reconstruct(self, images: Images, generator: Generator | None = None) -> tuple[Images, Latents, Latents]:
        """There and back: pictures from a sample of q(z | x), and its mean and log-variance."""
        mean, log_var = self.posterior(images)
        return self._draw(draw(mean, log_var, generator)), mean, log_var

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """That of the latent of one picture."""
        return self.latent_channels, *((side + 2 * self.padding) // self.factor for side in (height, width))

    @torch.no_grad()
    def measure_scale(self, images: Images) -> float:
        """Set the scale to one over the standard deviation of all entries of all latent means, and return it (Rombach
        et al. 2022, appendix G, who take samples of one batch); their mean stays. `images`: the training split.

        Raises ValueError where all latents are equal.
        """
        means = torch.cat([self.posterior(chunk)[0] for chunk in images.split(CHUNK)])
        std = means.std(correction=0)
        if std == 0:
            raise ValueError("all latents are equal: there is no scale that gives them unit variance")
        self.scale.copy_(1 / std)
        return self.scale.item()

    def _draw(self, latents: Latents) -> Images:
        return F.pad(self.decoder(latents), [-self.padding] * 4)


class LatentDiffusion(nn.Module):
    """A diffusion network between the ends of a frozen autoencoder; it sees scaled latents (Rombach et al. 2022)."""

    frozen = "autoencoder"

    def __init__(self, autoencoder: Autoencoder, unet: nn.Module):
        super().__init__()
        self.autoencoder, self.unet = autoencoder.requires_grad_(False), unet

    @property
    def null(self) -> int:
        """The label that stands for no class."""
        return self.unet.null

    def forward(self, zt: Latents, t: Time, **conditions: Tensor | None) -> Latents:
        """Raw output of the network's kind, shaped as zt."""
        return self.unet(zt, t, **conditions)


def draw(mean: Latents, log_var: Latents, generator: Generator | None = None) -> Latents:
    """z = mean + std eps (Kingma & Welling 2014, section 2.4), one eps per entry; gradients reach both arguments."""
    return mean + (log_var / 2).exp() * draw_noise(mean, generator)


def kl_per_image(mean: Latents, log_var: Latents) -> PerExample:
    """KL(N(mean, var) || N(0, 1)) = 1/2 sum (mean^2 + var - 1 - log var), in nats (Kingma & Welling 2014, appendix
    B)."""
    return (mean**2 + log_var.exp() - 1 - log_var).flatten(1).sum(dim=1) / 2


def error_per_image(images: Images, reconstructions: Images) -> PerExample:
    """|x - x'|^2, summed over pixels: -log N(x; x', 1/2) up to a constant."""
    return (images - reconstructions).square().flatten(1).sum(dim=1)


def vae_loss(
    autoencoder: Autoencoder, images: Images, generator: Generator | None = None, *, kl_weight: float = 1e-3
) -> Tensor:
    """Mean over the batch of error + kl_weight KL, each summed within an image, from one sample of q(z | x).

    Weight 1 is the negative evidence lower bound (Kingma & Welling 2014, eq. 7), up to a constant; autoencoders for
    diffusion take far less (Rombach et al. 2022, section 3.1), which leaves the prior to the diffusion model.
    """
    reconstructions, mean, log_var = autoencoder.reconstruct(images, generator)
    return (error_per_image(images, reconstructions) + kl_weight * kl_per_image(mean, log_var)).mean()


def _conv(channels: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out, 3, padding=1), group_norm(out), nn.SiLU()


def _down(channels: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out, 2, stride=2), group_norm(out), nn.SiLU()


def _up(channels: int, out: int) -> tuple[nn.Module, ...]:
    return nn.ConvTranspose2d(channels, out, 2, stride=2), group_norm(out), nn.SiLU()
