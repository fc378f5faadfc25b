"""What a network and a sampler cost, in closed form: multiply-adds, FLOPs and weights."""

from dataclasses import dataclass

from .dit import TIME_FEATURES, DiT
from .unet import UNet


@dataclass(frozen=True)
class Cost:
    """For one example. A multiply-add (MAC) is two FLOPs; `score_bytes` are those of attention matrices."""

    macs: int
    weights: int = 0
    score_bytes: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def score_mb(self) -> float:
        """Megabytes of 10^6 bytes."""
        return self.score_bytes / 10**6

    @property
    def score_mib(self) -> float:
        """Mebibytes of 2^20 bytes: 4.9 % more than a megabyte each, so the number is smaller."""
        return self.score_bytes / 2**20

    def __add__(self, other: "Cost") -> "Cost":
        """Both, one after the other: attention matrices are freed in between, so their larger one counts."""
        score_bytes = max(self.score_bytes, other.score_bytes)
        return Cost(self.macs + other.macs, self.weights + other.weights, score_bytes)


def unet_cost(unet: UNet, height: int, width: int) -> Cost:
    """One evaluation of a U-Net without attention on one (channels, height, width) picture.

    Convolutions and linear layers only: norms and activations are below 1 %. Raises ValueError for a network with
    attention and for sizes that the widths cannot halve.
    """
    if unet.attention is not None:
        raise ValueError("the cost of attention is not part of this count: build the U-Net without context_dim")
    height, width = height + 2 * unet.padding, width + 2 * unet.padding
    if height % unet.divisor or width % unet.divisor:
        raise ValueError(f"height and width must be multiples of {unet.divisor}, got {height} x {width}")
    widths, emb = unet.widths, unet.emb_dim
    pixels = [height * width // unet.patch**2 // 4**level for level in range(len(widths))]
    folded = unet.channels * unet.patch**2
    cost = _linear(emb, emb) + _linear(emb, emb)
    cost += _conv(3, folded, widths[0], pixels[0]) + _conv(3, widths[0], folded, pixels[0])
    for level, (c, area) in enumerate(zip(widths, pixels, strict=True)):
        cost += _res_block(c, c, emb, area) + _res_block(2 * c, c, emb, area)
        if level:
            wider = widths[level - 1]
            # each output pixel of the down convolution reads 2 x 2; each input pixel of the up one writes 2 x 2
            cost += _conv(2, wider, c, area) + _conv(2, c, wider, area, bias=wider)
    cost += _res_block(widths[-1], widths[-1], emb, pixels[-1]) + _norm(widths[0])
    table = 0 if unet.label_embedding is None else (unet.null + 1) * emb
    return cost + Cost(0, table)


def attention_cost(m: int, n: int, dim: int, heads: int = 1, bytes_per: int = 4) -> Cost:
    """The core of attention, Q K^T and then its product with V: m queries, n keys, `dim` over all heads together.

    2 m n dim multiply-adds, whatever the heads: each has dim / heads. But each has an (m, n) matrix of its own, of
    `bytes_per` bytes per entry. Raises ValueError where heads do not divide dim.
    """
    if dim % heads:
        raise ValueError(f"{heads} heads do not divide width {dim}")
    return Cost(2 * m * n * dim, score_bytes=heads * m * n * bytes_per)


def attention_layer_cost(
    m: int, n: int, dim: int, heads: int = 1, bytes_per: int = 4, *, context_dim: int | None = None
) -> Cost:
    """The core and its projections, as in `layers.Attention`: queries and output m times, keys and values n times."""
    ends = Cost(2 * m * dim**2, 2 * dim**2 + dim)  # of the four, the output alone has a bias
    keys_and_values = Cost(2 * n * (context_dim or dim) * dim, 2 * (context_dim or dim) * dim)
    return ends + keys_and_values + attention_cost(m, n, dim, heads, bytes_per)


def dit_cost(dit: DiT, tokens: int = 0, bytes_per: int = 4) -> Cost:
    """One evaluation of a DiT on one picture, with a context of so many `tokens` where it reads one.

    Linear layers and attention only. A published size costs nothing to build for this `with torch.device("meta")`.
    Raises ValueError where the network reads a context and `tokens` is 0, or the other way round, and for another
    conditioning than adaLN-Zero.
    """
    if dit.conditioning != "adaLN-Zero":
        raise ValueError(f"only adaLN-Zero is counted here, not {dit.conditioning!r}")
    if (dit.context_dim is None) != (tokens == 0):
        raise ValueError(f"this network reads a context of width {dit.context_dim}, got {tokens} tokens")
    dim, folded = dit.dim, dit.patch**2 * dit.channels
    m = (dit.size // dit.patch) ** 2
    block = attention_layer_cost(m, m, dim, dit.heads, bytes_per) + _linear(dim, 6 * dim)
    block += _linear(dim, 4 * dim, m) + _linear(4 * dim, dim, m)
    if dit.context_dim is not None:
        block += attention_layer_cost(m, tokens, dim, dit.heads, bytes_per, context_dim=dit.context_dim)
    cost = _linear(TIME_FEATURES, dim) + _linear(dim, dim) + _linear(folded, dim, m)
    cost += _linear(dim, 2 * dim) + _linear(dim, folded, m)
    cost = sum([block] * len(dit.blocks), cost)
    table = 0 if dit.label_embedding is None else (dit.null + 1) * dim
    return cost + Cost(0, table)


def sampling_cost(evaluation: Cost, steps: int, passes: int = 2, order: int = 1) -> Cost:
    """A whole run of a sampler. `passes`: networks per denoiser (classifier-free guidance: 2). `order`: denoisers per
    step (Euler, DDIM, DDPM: 1; Heun: 2, and 1 in the step that ends at the data). The weights are counted once.

    Raises ValueError unless steps and passes are at least 1 and order is 1 or 2.
    """
    if steps < 1 or passes < 1 or order not in (1, 2):
        raise ValueError(f"need steps >= 1, passes >= 1 and order 1 or 2, got {steps=}, {passes=}, {order=}")
    evaluations = passes * (steps if order == 1 else 2 * steps - 1)
    return Cost(evaluations * evaluation.macs, evaluation.weights, evaluation.score_bytes)


def _conv(side: int, channels: int, out_channels: int, area: int, bias: int | None = None) -> Cost:
    weights = side**2 * channels * out_channels
    return Cost(weights * area, weights + (out_channels if bias is None else bias))


def _linear(dim: int, out_dim: int, times: int = 1) -> Cost:
    return Cost(times * dim * out_dim, dim * out_dim + out_dim)


def _norm(channels: int) -> Cost:
    return Cost(0, 2 * channels)


def _res_block(channels: int, out_channels: int, emb: int, area: int) -> Cost:
    skip = _conv(1, channels, out_channels, area) if channels != out_channels else Cost(0)
    convs = _conv(3, channels, out_channels, area) + _conv(3, out_channels, out_channels, area)
    return convs + skip + _linear(emb, 2 * out_channels) + _norm(channels) + _norm(out_channels)
