"""Wrong answers to lesson 09 that are not on file, as people in a hurry write them."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from condiff_check.lesson09 import from_model, ldm_sample, ldm_train_step, scale_factor, to_model
from condiff_ref.shapes import pad

# --- 09.1


def kl_sum_of_wrong_axes(mu, logvar):
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=(2, 3))


def kl_from_scale(mu, logvar):
    return kl_divergence(Normal(mu, logvar.exp()), Normal(0.0, 1.0)).flatten(1).sum(1)


def kl_brackets(mu, logvar):
    return (mu**2 + logvar.exp()).flatten(1).sum(1) / 2 - 1 - logvar.flatten(1).sum(1)


def kl_half_on_mu_only(mu, logvar):
    return (mu**2 / 2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def kl_clamped(mu, logvar):
    logvar = logvar.clamp(-1, 1)
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def kl_abs_mu(mu, logvar):
    return 0.5 * (mu.abs() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def kl_detached(mu, logvar):
    return (0.5 * (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)).detach()


def kl_torch_mean(mu, logvar):
    return kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).mean(dim=(1, 2, 3))


# --- 09.2


def reparam_root_of_logvar(mu, logvar, gen):
    return mu + logvar.abs().sqrt() * torch.randn(mu.shape, generator=gen, dtype=mu.dtype)


def reparam_seeded(mu, logvar, gen):
    gen.manual_seed(0)
    return mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=gen, dtype=mu.dtype)


def reparam_torch_normal(mu, logvar, gen):
    return torch.normal(mu.detach(), (logvar / 2).exp().detach(), generator=gen)


def reparam_batch_noise(mu, logvar, gen):
    return mu + (logvar / 2).exp() * torch.randn(mu.shape[1:], generator=gen, dtype=mu.dtype)


def reparam_float32(mu, logvar, gen):
    return (mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=gen)).float()


def reparam_in_place(mu, logvar, gen):
    mu += (logvar / 2).exp() * torch.randn(mu.shape, generator=gen, dtype=mu.dtype)
    return mu


def reparam_centred_uniform(mu, logvar, gen):
    return mu + (logvar / 2).exp() * (2 * torch.rand(mu.shape, generator=gen, dtype=mu.dtype) - 1)


# --- 09.3


def vae_bce(x, rec, mu, logvar, beta):
    error = F.binary_cross_entropy(rec.sigmoid(), x.sigmoid(), reduction="sum") / len(x)
    return error + beta * 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum() / len(x)


def vae_kl_divided_twice(x, rec, mu, logvar, beta):
    error = F.mse_loss(rec, x, reduction="sum") / len(x)
    return error + beta * 0.5 * (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean() / len(x)


def vae_error_not_averaged(x, rec, mu, logvar, beta):
    error = F.mse_loss(rec, x, reduction="sum")
    return error + beta * 0.5 * (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def vae_one_minus_beta(x, rec, mu, logvar, beta):
    error = ((x - rec) ** 2).flatten(1).sum(1)
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)
    return ((1 - beta) * error + beta * kl).mean()


def vae_signs_of_textbook(x, rec, mu, logvar, beta):
    kl = 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=(1, 2, 3))
    return (((x - rec) ** 2).flatten(1).sum(1) + beta * kl).mean()


def vae_mean_over_channels(x, rec, mu, logvar, beta):
    error = ((x - rec) ** 2).mean(dim=1).flatten(1).sum(1)
    return (error + beta * 0.5 * (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)).mean()


# --- 09.4


def factor_from_range(z):
    return 1 / (z.max() - z.min()).item()


def factor_with_epsilon(z):
    return 1 / (z.std(correction=0).item() + 1e-2)


def factor_of_first_image(z):
    return 1 / z[0].std(correction=0).item()


def factor_of_abs(z):
    return 1 / (z - z.mean()).abs().mean().item()


def factor_is_rounded(z):
    return round(1 / z.std(correction=0).item(), 2)


def to_model_whitened(z, factor):
    return (z - z.mean(dim=(0, 2, 3), keepdim=True)) * factor


def to_model_in_place(z, factor):
    z *= factor
    return z


def to_model_sd(z, factor):
    return z * 0.18215


# --- 09.5


def train_forgets_null(model, encoder, factor, opt, x0, y, p, abar, gen):
    """Null is 10, as on MNIST."""
    encoder.eval()
    with torch.no_grad():
        z0 = encoder(x0)[0] * factor
    abar = abar.to(z0)
    t = torch.randint(1, len(abar), (len(z0),), generator=gen)
    eps = torch.randn(z0.shape, generator=gen, dtype=z0.dtype)
    zt = pad(abar[t].sqrt(), z0) * z0 + pad((1 - abar[t]).sqrt(), z0) * eps
    y = torch.where(torch.rand(y.shape, generator=gen) < p, 9, y)
    loss = F.mse_loss(model(zt, t, y), eps)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.item()


def train_tuple(model, encoder, factor, opt, x0, y, p, abar, gen):
    """The encoder's two results taken for one."""
    z0 = encoder(x0) * factor
    return F.mse_loss(model(z0, torch.ones(len(x0)).long(), y), z0).item()


def _train_with(z0_of, noise_like=None, roots=True):
    def train(model, encoder, factor, opt, x0, y, p, abar, gen):
        encoder.eval()
        with torch.no_grad():
            z0 = z0_of(encoder, x0, factor)
        abar = abar.to(z0)
        t = torch.randint(1, len(abar), (len(z0),), generator=gen)
        eps = torch.randn(z0.shape, generator=gen, dtype=z0.dtype)
        a, sigma = abar[t], 1 - abar[t]
        if roots:
            a, sigma = a.sqrt(), sigma.sqrt()
        zt = pad(a, z0) * z0 + pad(sigma, z0) * eps
        y = torch.where(torch.rand(y.shape, generator=gen) < p, model.null, y)
        loss = F.mse_loss(model(zt, t, y), eps)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.item()

    return train


train_normed_batch = _train_with(lambda e, x0, f: e(x0)[0] / e(x0)[0].std())
train_clamped = _train_with(lambda e, x0, f: (e(x0)[0] * f).clamp(-1, 1))
train_std_added = _train_with(lambda e, x0, f: (e(x0)[0] + (e(x0)[1] / 2).exp()) * f)
train_no_roots = _train_with(lambda e, x0, f: e(x0)[0] * f, roots=False)
train_x0_scaled = _train_with(lambda e, x0, f: e(x0 * f)[0] * f)


def _sample_with(
    weights=lambda s: (1 - s, s), before=lambda z, f: z / f, after=lambda x: x, start=lambda z: z, cut=None
):
    @torch.no_grad()
    def sample(model, decoder, factor, y, scale, steps, shape, abar, gen):
        times = torch.linspace(len(abar) - 1, 0, steps + 1).round().long().tolist()
        z = start(torch.randn(len(y), *shape, generator=gen))
        abar = abar.to(z)
        for t, s in pairwise(times):
            now = torch.full_like(y, t)
            on_u, on_c = weights(scale)
            eps = on_u * model(z, now, torch.full_like(y, model.null)) + on_c * model(z, now, y)
            z0 = (z - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
            if cut == "threshold":
                z0 = z0 / z0.flatten(1).abs().amax(1).clamp(min=1).view(-1, 1, 1, 1)
            z = abar[s].sqrt() * z0 + (1 - abar[s]).sqrt() * (model(z, now, y) if cut == "class" else eps)
        return after(decoder(before(z, factor)))

    return sample


sample_normed = _sample_with(weights=lambda s: (1 / (1 + s), s / (1 + s)))
sample_added = _sample_with(weights=lambda s: (1, s))
sample_negative = _sample_with(weights=lambda s: (-s, s))
sample_thresholded = _sample_with(cut="threshold")
sample_renoised_with_class = _sample_with(cut="class")
sample_images_clamped = _sample_with(after=lambda x: x.clamp(-1, 1))
sample_to_unit = _sample_with(after=lambda x: (x + 1) / 2)
sample_z_normed = _sample_with(before=lambda z, f: z / z.std() / f)
sample_z_clamped = _sample_with(before=lambda z, f: z.clamp(-1, 1) / f)
sample_half_noise = _sample_with(start=lambda z: z / 2)


def sample_pixel_noise(model, decoder, factor, y, scale, steps, shape, abar, gen):
    """Noise of a picture's shape."""
    z = torch.randn(len(y), 3, 4, 6, generator=gen)
    return decoder(model(z, torch.full_like(y, len(abar) - 1), y) / factor)


def sample_double(model, decoder, factor, y, scale, steps, shape, abar, gen):
    """The table's float64 kept."""
    with torch.no_grad():
        times = torch.linspace(len(abar) - 1, 0, steps + 1).round().long()
        z = torch.randn(len(y), *shape, generator=gen)
        for t, s in pairwise(times):
            now = t.repeat(len(y))
            eps_u, eps_c = model(z, now, torch.full_like(y, model.null)), model(z, now, y)
            eps = eps_u + scale * (eps_c - eps_u)
            a, b = pad(abar[now], z), pad(abar[s].repeat(len(y)), z)
            z = b.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
        return decoder(z / factor)


# --- 09.6


def ledger_tuple(encoder, network, decoder, steps, scale):
    return 0, 2 * network * steps, 2 * decoder, 2 * network * steps + 2 * decoder


def ledger_without_encoder(encoder, network, decoder, steps, scale):
    flops = {"network": 2 * network * steps * (1 if scale in (0, 1) else 2), "decoder": 2 * decoder}
    return {**flops, "total": sum(flops.values())}


def ledger_scaled(encoder, network, decoder, steps, scale):
    flops = {"encoder": 0, "network": int(2 * network * steps * scale), "decoder": 2 * decoder}
    return {**flops, "total": sum(flops.values())}


def ledger_flops_twice(encoder, network, decoder, steps, scale):
    flops = {"encoder": 0, "network": 2 * network * steps * (1 if scale in (0, 1) else 2), "decoder": 2 * decoder}
    return {**flops, "total": 2 * sum(flops.values())}


def ledger_decoder_in_macs(encoder, network, decoder, steps, scale):
    flops = {"encoder": 0, "network": 2 * network * steps * (1 if scale in (0, 1) else 2), "decoder": decoder}
    return {**flops, "total": sum(flops.values())}


def ledger_encoder_both(encoder, network, decoder, steps, scale):
    k = 1 if scale in (0, 1) else 2
    flops = {"encoder": encoder, "network": 2 * network * steps * k, "decoder": 2 * decoder}
    return {**flops, "total": sum(flops.values())}


# --- 09.7


def _nats(mu, logvar):
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def rate_per_image_list(x, rec, mu, logvar):
    return _nats(mu, logvar) / math.log(2), ((x - rec) ** 2).flatten(1).mean(1)


def rate_log10(x, rec, mu, logvar):
    return _nats(mu, logvar).mean().item() / math.log(10), F.mse_loss(rec, x).item()


def rate_of_mean_posterior(x, rec, mu, logvar):
    return _nats(mu.mean(0, keepdim=True), logvar.mean(0, keepdim=True)).item() / math.log(2), F.mse_loss(rec, x).item()


def rate_in_bytes(x, rec, mu, logvar):
    return _nats(mu, logvar).mean().item() / math.log(2) / 8, F.mse_loss(rec, x).item()


def rate_median(x, rec, mu, logvar):
    return _nats(mu, logvar).median().item() / math.log(2), F.mse_loss(rec, x).item()


def rate_entropy(x, rec, mu, logvar):
    nats = 0.5 * (logvar + math.log(2 * math.pi) + 1).flatten(1).sum(1)
    return nats.mean().item() / math.log(2), F.mse_loss(rec, x).item()


def rate_psnr(x, rec, mu, logvar):
    return _nats(mu, logvar).mean().item() / math.log(2), -10 * math.log10(F.mse_loss(rec, x).item())


def rate_with_error(x, rec, mu, logvar):
    error = ((x - rec) ** 2).flatten(1).sum(1).mean()
    return (_nats(mu, logvar).mean() + error).item() / math.log(2), F.mse_loss(rec, x).item()


# --- 09.8


def test_returns(kl):
    return torch.allclose(kl(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2))


def test_strict(kl):
    mu, logvar = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    assert (kl(mu, logvar) == 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))).all()


def test_wrong_itself(kl):
    mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.allclose(kl(mu, logvar), (mu**2 + logvar.exp() - 1 - logvar).sum(1))


def test_expects_a_number(kl):
    assert kl(torch.zeros(4, 3), torch.zeros(4, 3)) == 0


def test_wide_only(kl):
    logvar = torch.full((3, 2), 1e-4)
    assert (kl(torch.zeros(3, 2), logvar) < 1e-3).all()


# Read by a person: these are told that something is wrong, and too little of what.
WEAK = {
    "1/2 on mu^2 only",
    "logvar clamped",
    "1 - beta on the error",
    "training latents clamped",
    "dynamic threshold",
    "log10",
}

_SCALES = (scale_factor, to_model, from_model)

SLOPPY = (
    ("09.1", "summed over height and width only", (kl_sum_of_wrong_axes,)),
    ("09.1", "exp(logvar) as the scale of Normal", (kl_from_scale,)),
    ("09.1", "brackets closed too early", (kl_brackets,)),
    ("09.1", "1/2 on mu^2 only", (kl_half_on_mu_only,)),
    ("09.1", "logvar clamped", (kl_clamped,)),
    ("09.1", "absolute value of mu", (kl_abs_mu,)),
    ("09.1", "detached", (kl_detached,)),
    ("09.1", "torch.distributions, averaged", (kl_torch_mean,)),
    ("09.2", "root of |logvar|", (reparam_root_of_logvar,)),
    ("09.2", "generator seeded again", (reparam_seeded,)),
    ("09.2", "torch.normal", (reparam_torch_normal,)),
    ("09.2", "noise without the batch axis", (reparam_batch_noise,)),
    ("09.2", "float32 always", (reparam_float32,)),
    ("09.2", "mu changed in place", (reparam_in_place,)),
    ("09.2", "uniform in [-1, 1]", (reparam_centred_uniform,)),
    ("09.3", "cross-entropy", (vae_bce,)),
    ("09.3", "KL divided by the batch twice", (vae_kl_divided_twice,)),
    ("09.3", "error summed over the batch", (vae_error_not_averaged,)),
    ("09.3", "1 - beta on the error", (vae_one_minus_beta,)),
    ("09.3", "-KL of the textbook added", (vae_signs_of_textbook,)),
    ("09.3", "mean over channels", (vae_mean_over_channels,)),
    ("09.4", "range", (factor_from_range, to_model, from_model)),
    ("09.4", "epsilon added to the std", (factor_with_epsilon, to_model, from_model)),
    ("09.4", "first image only", (factor_of_first_image, to_model, from_model)),
    ("09.4", "mean absolute deviation", (factor_of_abs, to_model, from_model)),
    ("09.4", "rounded", (factor_is_rounded, to_model, from_model)),
    ("09.4", "channels centred", (scale_factor, to_model_whitened, from_model)),
    ("09.4", "in place", (scale_factor, to_model_in_place, from_model)),
    ("09.4", "Stable Diffusion's factor", (scale_factor, to_model_sd, from_model)),
    ("09.4", "functions in another order", (to_model, from_model, scale_factor)),
    ("09.5", "9 for null", (train_forgets_null, ldm_sample)),
    ("09.5", "the encoder's pair taken for a tensor", (train_tuple, ldm_sample)),
    ("09.5", "latents divided by their batch's std", (train_normed_batch, ldm_sample)),
    ("09.5", "training latents clamped", (train_clamped, ldm_sample)),
    ("09.5", "one std added to the mean", (train_std_added, ldm_sample)),
    ("09.5", "no roots", (train_no_roots, ldm_sample)),
    ("09.5", "images scaled, too", (train_x0_scaled, ldm_sample)),
    ("09.5", "weights divided by 1 + scale", (ldm_train_step, sample_normed)),
    ("09.5", "scale times the class added", (ldm_train_step, sample_added)),
    ("09.5", "difference alone", (ldm_train_step, sample_negative)),
    ("09.5", "dynamic threshold", (ldm_train_step, sample_thresholded)),
    ("09.5", "noised again with the class's eps", (ldm_train_step, sample_renoised_with_class)),
    ("09.5", "images clamped", (ldm_train_step, sample_images_clamped)),
    ("09.5", "images to [0, 1]", (ldm_train_step, sample_to_unit)),
    ("09.5", "last latents normalised", (ldm_train_step, sample_z_normed)),
    ("09.5", "last latents clamped", (ldm_train_step, sample_z_clamped)),
    ("09.5", "half of the noise", (ldm_train_step, sample_half_noise)),
    ("09.5", "noise of a picture's shape", (ldm_train_step, sample_pixel_noise)),
    ("09.5", "float64 kept", (ldm_train_step, sample_double)),
    ("09.6", "a tuple", (ledger_tuple,)),
    ("09.6", "no entry for the encoder", (ledger_without_encoder,)),
    ("09.6", "times the scale", (ledger_scaled,)),
    ("09.6", "total doubled again", (ledger_flops_twice,)),
    ("09.6", "decoder in multiply-adds", (ledger_decoder_in_macs,)),
    ("09.6", "encoder in multiply-adds", (ledger_encoder_both,)),
    ("09.7", "one point per image", (rate_per_image_list,)),
    ("09.7", "log10", (rate_log10,)),
    ("09.7", "KL of the mean posterior", (rate_of_mean_posterior,)),
    ("09.7", "bytes", (rate_in_bytes,)),
    ("09.7", "median", (rate_median,)),
    ("09.7", "entropy of q", (rate_entropy,)),
    ("09.7", "PSNR", (rate_psnr,)),
    ("09.7", "error added to the rate", (rate_with_error,)),
    ("09.8", "returns a truth value", (test_returns,)),
    ("09.8", "== for allclose", (test_strict,)),
    ("09.8", "a wrong formula of its own", (test_wrong_itself,)),
    ("09.8", "expects one number", (test_expects_a_number,)),
    ("09.8", "small variance only", (test_wide_only,)),
)
