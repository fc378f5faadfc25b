"""Networks made on others: text to image, ControlNet and latent diffusion, as recipes, checkpoints and samples."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from typer.testing import CliRunner

from awake import awake
from condiff_ref import checkpoints, cli, recipes
from condiff_ref.autoencoder import Autoencoder, LatentDiffusion
from condiff_ref.checkpoints import Checkpoint
from condiff_ref.controlnet import Controlled, ControlNet, controlled
from condiff_ref.data import Affine
from condiff_ref.files import CheckpointError, read_safetensors, write_safetensors
from condiff_ref.generate import Guidance, generate
from condiff_ref.scenes import LENGTH, skeletons
from condiff_ref.text import TextEncoder, TextToImage, Vocabulary, bind
from condiff_ref.train import drop
from condiff_ref.unet import UNet

BASED = [recipe for recipe in recipes.RECIPES if recipe.base]
WORDS = ("red", "blue", "cube", "ball", "a")


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def text_to_image(length: int = 5) -> TextToImage:
    text = TextEncoder(Vocabulary(WORDS), 8, 1, 2, length=length)
    return TextToImage(text, UNet(1, (8, 16), context_dim=8, emb_dim=8))


def asked(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 1, 8, 8).double(), torch.rand(n).double()


# --- text to image ----------------------------------------------------------------------------------------------------


def test_a_caption_is_read_as_context_and_its_pads_are_masked():
    net = awake(text_to_image())
    ids, mask = Vocabulary(WORDS).encode(["a red cube", "a blue ball", "ball"], 5)
    xt, t = asked()
    assert_close(net(xt, t, label=ids), net.unet(xt, t, context=net.text(ids), mask=mask))


def test_no_caption_is_the_empty_one():
    net = awake(text_to_image())
    xt, t = asked()
    ids, _ = Vocabulary(WORDS).encode([""] * 3, 5)
    assert torch.equal(net.null.expand(3, -1), ids)
    assert torch.equal(net(xt, t), net(xt, t, label=ids))


def test_the_weights_are_shares_of_the_words_that_count():
    net = awake(text_to_image())
    ids, mask = Vocabulary(WORDS).encode(["a red cube", "a blue ball", "ball"], 5)
    weights = net.weights(*asked(), ids)
    assert weights.shape == (3, 4, 16, 5)
    assert_close(weights.sum(-1), torch.ones(3, 4, 16).double())
    assert not weights.transpose(1, 3)[~mask].any()


def test_what_is_attended_to_moves_the_output():
    """The output's sensitivity to a value is the weight on it: silence a value, and only its share goes."""
    net = awake(text_to_image())
    ids, mask = Vocabulary(WORDS).encode(["a red cube"] * 3, 5)
    x = torch.randn(3, 16, 4, 4).double()
    layer, context = net.unet.attention, net.text(ids)
    weights = layer.weights(x, context, mask)
    values = layer.attention._split(layer.attention.to_kv(context).chunk(2, dim=-1)[1])
    mixed = layer.attention._merge(weights @ values)
    assert_close(layer(x, context, mask), x + layer.attention.to_out(mixed).transpose(1, 2).reshape(x.shape))


def test_one_caption_for_several_pictures_is_named():
    with pytest.raises(ValueError, match=r"3 pictures need 3 captions, got token ids of shape \(1, 5\)"):
        text_to_image()(*(x.float() for x in asked()), label=torch.ones(1, 5, dtype=torch.long))


def test_captions_are_dropped_as_a_whole():
    null = torch.tensor([1, 0, 0, 0])
    label = torch.randint(2, 9, (4000, 4))
    out = drop(label, null, 0.3, torch.Generator().manual_seed(0))
    gone = (out == null).all(1)
    assert torch.equal(out[~gone], label[~gone])
    assert 0.27 < gone.double().mean() < 0.33


def captions(n: int) -> torch.Tensor:
    """Half red cubes and half blue balls, each as "a red cube", from a fixed generator."""
    kind = torch.randint(2, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    return Vocabulary(WORDS).encode([("a red cube", "a blue ball")[k] for k in kind], 5)[0]


def test_an_encoder_learns_to_bind_and_without_mixing_it_cannot():
    vocabulary, ids = Vocabulary(WORDS), captions(200)
    mixed, _ = vocabulary.encode(["a red ball", "a blue ball", "a red cube", "a blue cube"] * 50, 5)
    subjects = vocabulary.encode(["cube", "ball"], 1)[0][:, 0]
    assert bind(TextEncoder(vocabulary, 16, 1, 2, length=5), mixed, subjects, (0, -1), 150) < 0.25
    # colour and shape are independent here: a vector that knows its own word only has ln 2 to lose on the colour
    alone = bind(TextEncoder(vocabulary, 16, 0, 2, length=5), mixed, subjects, (0, -1), 150)
    assert alone > 0.3
    with pytest.raises(ValueError, match="lead out of captions of 5 tokens"):
        bind(TextEncoder(vocabulary, 16, 1, 2, length=5), ids, subjects, (0, 3), 1)


# --- controlled and latent --------------------------------------------------------------------------------------------


def test_controlled_is_the_base_with_its_residuals_and_freezes_it():
    base = UNet(1, (8, 16), classes=3, emb_dim=8)
    net = awake(Controlled(base, ControlNet(base, 1)))
    xt, t = asked()
    hint, label = torch.randn(3, 1, 8, 8).double(), torch.tensor([0, 1, 3])
    whole = net(xt, t, label=label, hint=hint, strength=0.5)
    assert torch.equal(whole, controlled(net.unet, net.controlnet, hint, 0.5)(xt, t, label=label))
    assert net.null == 3
    assert {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad} == {"controlnet"}


def test_latent_diffusion_asks_its_network_and_freezes_the_autoencoder():
    net = awake(LatentDiffusion(Autoencoder(1, 2, 2, width=8), UNet(2, (8, 16), classes=3, emb_dim=8)))
    zt, t, label = torch.randn(3, 2, 4, 4).double(), torch.rand(3).double(), torch.tensor([0, 1, 3])
    assert torch.equal(net(zt, t, label=label), net.unet(zt, t, label=label))
    assert net.null == 3
    assert {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad} == {"unet"}


def test_an_autoencoder_with_padding_keeps_sizes_that_do_not_halve():
    net = Autoencoder(1, 2, 4, width=8, padding=2)
    images = torch.rand(3, 1, 28, 28) * 2 - 1
    latents = net.encode(images)
    assert latents.shape[1:] == net.latent_shape(28, 28) == (2, 8, 8)
    assert net.decode(latents).shape == images.shape
    rebuilt, mean, _ = net.reconstruct(images, torch.Generator().manual_seed(0))
    assert rebuilt.shape == images.shape
    assert mean.shape == latents.shape
    with pytest.raises(ValueError, match=r"multiples of 4 less 4, got \(2, 1, 26, 28\)"):
        net.posterior(torch.zeros(2, 1, 26, 28))


def test_padding_goes_on_with_the_border():
    """A picture that already has the border that padding would add has the same posterior."""
    bare, padded = Autoencoder(1, 2, 2, width=8), Autoencoder(1, 2, 2, width=8, padding=1)
    padded.load_state_dict(bare.state_dict())
    inner = torch.rand(2, 1, 6, 6)
    outer = torch.cat([inner[:, :, :, :1], inner, inner[:, :, :, -1:]], dim=3)
    outer = torch.cat([outer[:, :, :1], outer, outer[:, :, -1:]], dim=2)
    assert_close(padded.posterior(inner), bare.posterior(outer))


# --- as recipes and checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [r for r in BASED if r.data == "digits"], ids=lambda recipe: recipe.name)
def test_trained_on_a_base_it_leaves_it_alone_and_out_of_the_file(recipe: recipes.Recipe, tmp_path: Path):
    out = tmp_path / "file.safetensors"
    trained = checkpoints.train_recipe(recipe, out, steps=3, progress=False)
    base = checkpoints.load(recipe.base).network.state_dict()
    loaded = checkpoints.load(out)
    for network in (trained.network, loaded.network):
        for name, weight in getattr(network, network.frozen).state_dict().items():
            assert torch.equal(weight, base[name]), name
    written, about = read_safetensors(out)
    assert not [name for name in written if name.startswith(f"{trained.network.frozen}.")]
    for name, weight in trained.network.state_dict().items():
        assert torch.equal(weight, loaded.network.state_dict()[name]), name
    about["card"]["base"] = "of another file"
    write_safetensors(out, written, about)
    with pytest.raises(CheckpointError, match=f"trained on another {recipe.base}.*train it again"):
        checkpoints.load(out)


def test_a_file_that_lacks_weights_is_refused(tmp_path):
    tensors, about = read_safetensors(checkpoints.find("digits-control"))
    tensors.popitem()
    write_safetensors(tmp_path / "file.safetensors", tensors, about)
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoints.load(tmp_path / "file.safetensors")


def test_hints_ride_behind_the_pictures():
    images, _ = recipes.DIGITS_CONTROL.load_data()
    images = images[:5]
    packed = recipes.DIGITS_CONTROL.with_hints(images + 1, images)
    assert torch.equal(packed, torch.cat([images + 1, skeletons(images)], dim=1))
    assert recipes.DIGITS_UNET.with_hints(images, images) is images


def test_latents_are_encoded_decoded_and_never_clipped():
    model = checkpoints.load("digits-latent")
    images, _ = recipes.DIGITS_LATENT.load_data()
    latents = model.encode(images)
    assert latents.shape[1:] == model.shape == (2, 4, 4)
    assert abs(latents.std().item() - 1) < 0.02  # of the training split, whose scale is stored
    assert_close(model.decode(latents), model.network.autoencoder.decode(latents).clamp(-1, 1))
    denoiser = model.denoiser(torch.tensor([3]))
    assert model.clip(denoiser) is denoiser


def test_a_frozen_text_encoder_is_taught_first_and_one_that_learns_along_is_not():
    for recipe, frozen in ((recipes.SCENES_UNET, True), (recipes.SCENES_JOINT, False)):
        recipe = dataclasses.replace(recipe, bind_steps=min(recipe.bind_steps, 3))
        ids = recipes.VOCABULARY.encode(["a large three at the top left"] * 70, LENGTH)[0]
        net = recipe.build()
        before = net.text.word.weight.clone()
        recipe.prepare(net, ids)
        assert torch.equal(net.text.word.weight, before) != frozen
        assert all(p.requires_grad != frozen for p in net.text.parameters())


@pytest.fixture(scope="module")
def painter() -> Checkpoint:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Checkpoint(recipes.SCENES_UNET.build().eval(), recipes.SCENES_UNET, Affine(0.0, 1.0), {})


def test_pictures_are_drawn_for_captions(painter):
    ids = recipes.VOCABULARY.encode(["a large three at the top left", ""], LENGTH)[0]
    pictures = generate(painter, ids, Guidance(scale=2.0), steps=2)
    assert pictures.shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match="knows no classes, but captions"):
        painter.classes  # noqa: B018
    with pytest.raises(ValueError, match="unknown 'cat'"):
        painter.read_caption("a cat")


def test_a_hint_is_needed_where_it_is_taken_and_refused_elsewhere():
    control, plain = checkpoints.load("digits-control"), checkpoints.load("digits-unet")
    label, hint = torch.arange(2), torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="digits-control .* needs a hint"):
        generate(control, label, Guidance(), steps=1)
    with pytest.raises(ValueError, match="digits-unet .* takes no hint"):
        generate(plain, label, Guidance(), steps=1, hint=hint)
    with pytest.raises(ValueError, match=r"the hint must be \(2, 1, 8, 8\), got \(2, 1, 16, 16\)"):
        generate(control, label, Guidance(), steps=1, hint=torch.zeros(2, 1, 16, 16))


def test_at_strength_0_samples_are_those_of_the_base_bit_for_bit():
    control, plain = checkpoints.load("digits-control"), checkpoints.load("digits-unet")
    label, hint = torch.arange(10), skeletons(recipes.DIGITS_CONTROL.load_data()[0][:10])
    by_base = generate(plain, label, Guidance(scale=2.0), steps=3)
    assert torch.equal(generate(control, label, Guidance(scale=2.0), steps=3, hint=hint, strength=0.0), by_base)
    assert not torch.equal(generate(control, label, Guidance(scale=2.0), steps=3, hint=hint), by_base)


def test_chunks_of_hints_follow_their_labels():
    control = checkpoints.load("digits-control")
    label, hint = torch.arange(6), skeletons(recipes.DIGITS_CONTROL.load_data()[0][:6])
    whole = generate(control, label, Guidance(), steps=2, hint=hint)
    assert_close(generate(control, label, Guidance(), steps=2, hint=hint, chunk=4), whole)


def test_the_command_line_draws_captions(tmp_path, monkeypatch):
    out = tmp_path / "three.npz"
    line = ["sample", "scenes-unet", "--out", str(out), "--per-class", "2", "--steps", "2"]
    assert CliRunner().invoke(cli.app, [*line, "--caption", "a large three at the top left"]).exit_code == 0
    assert out.exists()
    assert "knows no classes, but captions" in str(CliRunner().invoke(cli.app, line).exception)
    wrong = [*line[:1], "digits-unet", *line[2:], "--caption", "a large three"]
    assert "reads no captions" in str(CliRunner().invoke(cli.app, wrong).exception)
