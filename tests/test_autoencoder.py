"""The two ends of latent diffusion: what the loss is, that latents have unit variance, and that nothing leaks."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from condiff_ref import autoencoder as module
from condiff_ref.autoencoder import Autoencoder, draw, error_per_image, kl_per_image, vae_loss
from condiff_ref.data import digits


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def made(channels: int = 1, latent_channels: int = 2, factor: int = 2) -> Autoencoder:
    return Autoencoder(channels, latent_channels, factor, width=8).double()


def pictures(n: int = 4) -> torch.Tensor:
    return digits("train")[0][:n].double()


def seed(k: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(k)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_kl_is_torchs_own_summed_within_each_image():
    mean, log_var = torch.randn(5, 2, 3, 4).double(), torch.randn(5, 2, 3, 4).double()
    expected = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    assert_close(kl_per_image(mean, log_var), expected)


def test_kl_of_the_prior_is_zero():
    assert not kl_per_image(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)).any()


def test_the_error_is_minus_the_log_likelihood_at_variance_one_half_up_to_a_constant():
    x, one, other = torch.randn(3, 5, 1, 4, 4).double()
    log_p = [Normal(mean, 0.5**0.5).log_prob(x).sum(dim=(1, 2, 3)) for mean in (one, other)]
    assert_close(error_per_image(x, one) - error_per_image(x, other), log_p[1] - log_p[0])


def test_the_loss_is_the_mean_over_images_of_error_and_weighted_kl():
    network, x = made(), pictures()
    mean, log_var = network.posterior(x)
    kl = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0)).sum() / 4
    bare, weighted = (vae_loss(network, x, seed(), kl_weight=weight) for weight in (0.0, 3.0))
    assert_close(weighted - bare, 3 * kl)
    z = mean + (log_var / 2).exp() * torch.randn(mean.shape, generator=seed(), dtype=torch.float64)
    assert_close(bare, ((network.decoder(z) - x) ** 2).sum() / 4)


def test_the_loss_does_not_depend_on_the_scale():
    network, x = made(), pictures()
    before = vae_loss(network, x, seed())
    network.scale.fill_(7.0)
    assert_close(vae_loss(network, x, seed()), before)


def test_every_weight_is_trained_and_the_log_variance_too():
    network = made()
    vae_loss(network, pictures(), seed()).backward()
    assert all(parameter.grad.any() for parameter in network.parameters())
    assert network.encoder[-1].bias.grad.abs().gt(1e-9).all()  # one for each mean and each log-variance


# --- sampling --------------------------------------------------------------------------------------------------------


def test_draws_have_the_mean_and_deviation_asked_for_and_are_independent():
    n = 20_000
    mean, log_var = torch.tensor([1.0, -2.0]), torch.tensor([0.25, 9.0]).log()  # deviations 0.5 and 3
    z = draw(mean.expand(n, 2)[:, :, None, None], log_var.expand(n, 2)[:, :, None, None], seed()).flatten(1)
    std = torch.tensor([0.5, 3.0])
    assert ((z.mean(0) - mean).abs() < 5 * std / n**0.5).all()
    assert ((z.std(0) / std - 1).abs() < 5 / (2 * n) ** 0.5).all()
    assert torch.corrcoef(z.T)[0, 1].abs() < 5 / n**0.5
    assert torch.corrcoef(torch.stack([z[1:, 0], z[:-1, 0]]))[0, 1].abs() < 5 / n**0.5


def test_gradients_reach_the_mean_and_the_log_variance():
    mean, log_var = torch.zeros(1, 1, 3, 3, requires_grad=True), torch.full((1, 1, 3, 3), 2.0, requires_grad=True)
    z = draw(mean, log_var, seed())
    z.sum().backward()
    assert_close(mean.grad, torch.ones(1, 1, 3, 3))
    assert_close(log_var.grad, z.detach() / 2)  # d(std eps) / d(log var), mean 0


def test_encode_is_the_mean_and_with_a_generator_a_sample_around_it():
    network, x = made(), pictures(1).expand(4000, -1, -1, -1)
    network.scale.fill_(0.5)
    mean, log_var = (part[0] for part in network.posterior(x[:1]))
    assert_close(network.encode(x[:2])[1], 0.5 * mean)
    with torch.no_grad():
        z = network.encode(x, seed())
    std = 0.5 * (log_var / 2).exp()
    assert ((z.mean(0) - 0.5 * mean).abs() < 5 * std / 4000**0.5).all()
    assert ((z.std(0) / std - 1).abs() < 5 / 8000**0.5).all()
    assert torch.equal(z, network.encode(x, seed()))


# --- the scale -------------------------------------------------------------------------------------------------------


def test_latents_have_variance_one_after_measuring():
    network, x = made(), pictures(60)
    assert (network.encode(x).var(correction=0) - 1).abs() > 0.1  # untrained latents are small
    scale = network.measure_scale(x)
    assert_close(network.encode(x).var(correction=0).item(), 1.0)
    assert_close(scale, 1 / network.posterior(x)[0].std(correction=0).item())


def test_measuring_again_gives_the_same_scale_whatever_the_chunks(monkeypatch):
    network, x = made(), pictures(10)
    scale = network.measure_scale(x)
    monkeypatch.setattr(module, "CHUNK", 3)
    assert_close(network.measure_scale(x), scale)


def test_decode_undoes_the_scale():
    network, x = made(), pictures()
    before, latents = network.decode(network.encode(x)), network.encode(x)
    scale = network.measure_scale(x)
    assert_close(network.encode(x), scale * latents)
    assert_close(network.decode(network.encode(x)), before)


def test_the_scale_is_stored_with_the_weights():
    network, x = made(), pictures()
    network.measure_scale(x)
    other = made()
    other.load_state_dict(network.state_dict())
    assert_close(other.encode(x), network.encode(x), rtol=0, atol=0)


def test_latents_that_are_all_equal_have_no_scale():
    network = made()
    nn.init.zeros_(network.encoder[-1].weight)
    nn.init.zeros_(network.encoder[-1].bias)
    with pytest.raises(ValueError, match="all latents are equal"):
        network.measure_scale(pictures())
    assert network.scale == 1


# --- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "latent_channels", "factor", "side"), [(1, 2, 2, 8), (1, 3, 4, 28), (3, 4, 1, 5)])
def test_latents_are_smaller_by_the_factor(channels, latent_channels, factor, side):
    network, x = made(channels, latent_channels, factor), torch.randn(2, channels, side, side).double()
    z = network.encode(x)
    assert z.shape == (2, latent_channels, side // factor, side // factor)
    assert network.decode(z).shape == x.shape


def test_a_permuted_batch_is_permuted():
    network, x = made(), pictures()
    order = torch.tensor([2, 0, 3, 1])
    z = network.encode(x)
    assert_close(network.encode(x[order]), z[order])
    assert_close(network.decode(z[order]), network.decode(z)[order])


def test_examples_do_not_see_one_another():
    network, x = made(), pictures()
    z = network.encode(x)
    assert_close(z, torch.cat([network.encode(x[i : i + 1]) for i in range(4)]))
    assert_close(network.decode(z), torch.cat([network.decode(z[i : i + 1]) for i in range(4)]))


@pytest.mark.parametrize("shape", [(1, 1, 9, 8), (1, 1, 8, 9), (1, 2, 8, 8)])
def test_pictures_that_do_not_fold_are_refused(shape):
    with pytest.raises(ValueError, match=rf"takes \(b, 1, h, w\) with h and w multiples of 2, got \({shape[0]}, "):
        made().encode(torch.randn(shape).double())


def test_latents_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"latents are \(b, 2, h, w\), got \(1, 3, 4, 4\)"):
        made().decode(torch.randn(1, 3, 4, 4).double())


@pytest.mark.parametrize("factor", [0, 3, -2, 6])
def test_factors_that_are_no_power_of_two_are_refused(factor):
    with pytest.raises(ValueError, match=f"power of two, got {factor}"):
        Autoencoder(1, 2, factor)


def test_it_learns_real_digits_it_has_not_seen():
    # half as many numbers as pixels; always answering the average digit is the floor to beat
    (x, _), (unseen, _) = digits("train"), digits("test")
    network = Autoencoder(1, 2, 2, width=16)
    optimizer, generator = torch.optim.AdamW(network.parameters(), 4e-3), seed()
    for _ in range(150):
        chosen = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        vae_loss(network, x[chosen], generator).backward()
        optimizer.step()
    floor = error_per_image(unseen, x.mean(0).expand_as(unseen)).mean()
    network.measure_scale(x)
    with torch.no_grad():
        latents = network.encode(unseen)
        error = error_per_image(unseen, network.decode(latents)).mean()
    assert error < 0.2 * floor
    assert latents.var() == pytest.approx(1, abs=0.1)  # the scale was measured on other digits
