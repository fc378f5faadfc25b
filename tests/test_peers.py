"""The benchmark beside others is wired as their authors have it: with a perfect network each draws the very data."""

import dataclasses
import inspect
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("diffusers")
import peers
from lab_unet import LabUNet
from peers import NONE, by_diffusers, ddp, lab
from rows import Kept

from condiff_ref import data, recipes
from condiff_ref.intervals import Interval

PICTURES = torch.where(torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0)) < 0.2, 1.0, -1.0)
LABEL = torch.tensor([3, 0, 5, 1, 4, 2])  # of class k there is only PICTURES[k]

needs_ddp = pytest.mark.skipif(
    not find_spec("denoising_diffusion_pytorch"), reason="denoising-diffusion-pytorch, of the extra bench, is missing"
)


def for_each(*chosen):
    marks = {"denoising-diffusion-pytorch": needs_ddp}
    return pytest.mark.parametrize(
        "peer", [pytest.param(peer, id=peer.name, marks=marks.get(peer.family, ())) for peer in chosen]
    )


each_peer = for_each(lab(250), by_diffusers(True), by_diffusers(False), ddp(True), ddp(False))


class Perfect(nn.Module):
    """Knows the picture of each label, and which rows have none: the noise in x_t = sqrt(abar) x0 + sqrt(1 - abar) eps,
    or, without abar, the velocity from the noise to it."""

    channels = out_dim = 1
    random_or_learned_sinusoidal_cond = False
    cond_drop_prob = 0.5

    def __init__(self, pictures: Tensor, abar: Tensor | None = None):
        super().__init__()
        self.pictures, self.abar = pictures, abar

    def forward(self, xt: Tensor, t: Tensor, label: Tensor, **conditions: object) -> Tensor:
        x0 = self.pictures[torch.where(label == NONE, LABEL, label)]
        if self.abar is None:
            return (x0 - xt) / (1 - t).reshape(-1, 1, 1, 1)
        abar = self.abar.double()[t].reshape(-1, 1, 1, 1)
        return ((xt - abar.sqrt() * x0) / (1 - abar).sqrt()).float()

    def forward_with_cond_scale(self, xt: Tensor, t: Tensor, label: Tensor, **guidance: object) -> tuple[Tensor, ...]:
        return self(xt, t, label), self(xt, t, label)


def perfect(peer, pictures):
    """In place of the peer's network, where these are the data of the classes."""
    if peer.family == "lab":
        return Perfect(pictures)
    if peer.family == "diffusers":
        return Perfect(pictures, peers.scheduler("DDPMScheduler").alphas_cumprod)
    network = peer.build()
    network.model = Perfect(2 * pictures - 1, network.alphas_cumprod)  # this library takes [0, 1]
    return network


@each_peer
def test_a_perfect_network_has_no_loss(peer):
    pictures = peer.encode(PICTURES)
    assert peer.loss(perfect(peer, pictures), pictures[LABEL], LABEL) < 1e-3
    assert peer.loss(perfect(peer, pictures.flip(0)), pictures[LABEL], LABEL) > 1e-2


@each_peer
def test_every_way_of_sampling_ends_at_the_data_of_a_perfect_network(peer):
    pictures = peer.encode(PICTURES)
    for name, way in peer.ways.items():
        torch.manual_seed(0)
        drawn = way.draw(perfect(peer, pictures), LABEL)
        assert_close(drawn, pictures[LABEL], atol=0.02, rtol=0, msg=f"{peer.name}: {name}")
    if peer.family != "lab":  # which resizes
        assert_close(peer.decode(drawn).clamp(-1, 1), PICTURES[LABEL], atol=0.04, rtol=0)


def test_the_lab_resizes_pictures_as_torchvision_and_loses_little_on_the_way_back():
    images = data.digits("train")[0][:20]
    images = nn.functional.interpolate(images, (28, 28), mode="bicubic").clamp(-1, 1)
    back = peers.reduced(peers.enlarged(images))
    assert (back - images).square().mean() < 0.01 * images.var()
    transforms = pytest.importorskip("torchvision.transforms.functional")
    assert_close(peers.enlarged(images), transforms.resize(images, [32, 32]))


def test_the_lab_network_has_the_weights_of_the_published_notebook():
    """1,233,325, counted there at commit 9d9dbe6 with its own class."""
    assert sum(p.numel() for p in LabUNet().parameters()) == 1_233_325


@needs_ddp
def test_settings_of_denoising_diffusion_pytorch_are_its_defaults():
    from denoising_diffusion_pytorch import Trainer
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet

    def defaults(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    peer, trainer = ddp(True), defaults(Trainer)
    assert (peer.batch_size, peer.lr, peer.betas) == tuple(
        trainer[name] for name in ("train_batch_size", "train_lr", "adam_betas")
    )
    assert peer.clip == trainer["max_grad_norm"]
    average = peer.average(nn.Linear(1, 1))
    assert (average.beta, average.update_every) == (trainer["ema_decay"], trainer["ema_update_every"])
    (way,) = [way for way in peer.ways.values() if way.own]
    sampling = defaults(GaussianDiffusion.sample) | defaults(GaussianDiffusion)
    assert way.draw.keywords == dict(
        steps=250,  # its README's; without it all 1000
        eta=sampling["ddim_sampling_eta"],
        scale=sampling["cond_scale"],
        phi=sampling["rescaled_phi"],
    )
    built = peer.build().model
    assert (built.cond_drop_prob, len(built.downs)) == (
        defaults(Unet)["cond_drop_prob"],
        len(defaults(Unet)["dim_mults"]),
    )


def test_no_label_takes_the_place_of_some():
    hidden = peers.hide(torch.arange(10).repeat(2000), 0.1)
    assert 0.09 < (hidden == NONE).float().mean() < 0.11
    assert (hidden[hidden != NONE] == torch.arange(10).repeat(2000)[hidden != NONE]).all()


def test_cut_blackens_a_grey_background_and_leaves_a_black_one():
    grey = torch.where(PICTURES < 0, torch.tensor(-0.4), PICTURES)
    assert_close(peers.cut(grey), PICTURES)
    assert_close(peers.cut(PICTURES), PICTURES)


@for_each(lab(32), by_diffusers(False), ddp(False))
def test_rows_are_trained_sampled_and_kept(peer, tmp_path, monkeypatch):
    judged = []

    def evaluate(data_set, images, label, seed):
        assert images.shape == (len(label), 1, 28, 28)
        assert images.abs().max() <= 1
        judged.append(data_set)
        return dict.fromkeys(peers.MEASURED, Interval(0.5, 0.4, 0.6))

    monkeypatch.setattr(peers, "evaluate", evaluate)
    monkeypatch.setattr(data, "mnist", lambda split: (PICTURES, LABEL))
    name, way = list(peer.ways.items())[-1]
    brief = {name: dataclasses.replace(way, n=3, draw=partial(way.draw, steps=2))}
    peer = dataclasses.replace(peer, batch_size=2, ways=brief)
    kept = Kept(tmp_path / "kept.json")
    found = peers.rows_of(peer, kept, 1e-3, 0, tmp_path)
    assert found["training"]["steps"] == 1
    assert found.keys() == {"training", name, f"{name}, cut"}
    assert found[name]["n"] == 3
    assert found[name]["seconds per 100"] > 0
    again = peers.rows_of(peer, Kept(tmp_path / "kept.json"), 1e-3, 0, tmp_path)
    assert (again, len(judged)) == (found, 2)
    assert len(peers.line(peer, name, [found[name]])) == len(peers.COLUMNS)
    cut_off = Kept(tmp_path / "kept.json")
    del cut_off.rows[next(key for key in cut_off.rows if name in key)]
    monkeypatch.delattr(peers.Peer, "train")  # the weights are there
    assert peers.rows_of(peer, cut_off, 1e-3, 0, tmp_path)["training"] == found["training"]
    assert len(judged) == 4


def test_ours_is_trained_and_sampled_like_the_others(tmp_path, monkeypatch):
    few = (PICTURES.repeat(6, 1, 1, 1), LABEL.repeat(6))
    monkeypatch.setitem(recipes.LOADERS, "mnist", lambda split, root=None: few)
    ours, path = peers.Ours(), tmp_path / "ours.weights"
    assert ours.train(0.2, 0, path)["steps"] >= 1
    assert ours.weights() == sum(p.numel() for p in peers.checkpoints.load(path).network.parameters())
    for way in ours.ways.values():
        images, seconds = ours.sample(way, path, LABEL, 0)
        assert images.shape == PICTURES.shape
        assert seconds > 0


def test_averages_follow_the_weights_and_the_statistics():
    network = nn.BatchNorm1d(2)
    average = peers.Average(network, decay=0.5)
    with torch.no_grad():
        network.weight.fill_(3)
        network.running_mean.fill_(7)
    average.update()  # young: (1 + 1) / (10 + 1)
    assert_close(average.ema_model.weight, torch.full((2,), 1 + 2 * 9 / 11))
    assert_close(average.ema_model.running_mean, torch.full((2,), 7 * 9 / 11))


def test_guidance_mixes_the_answers_with_and_without_labels():
    def answer(label):
        return torch.where(label == NONE, 2.0, 5.0)

    for scale, expected in ((0, 2.0), (1, 5.0), (3, 11.0)):
        assert_close(peers.guided(answer, LABEL, scale), torch.full((6,), expected))


def test_the_best_way_is_the_one_least_above_the_floor_of_its_own_n():
    def row(fd, floor):
        return {"fd": [fd, fd, fd], "fd_real": [floor, floor, floor]}

    assert peers.excess([row(5, 4.5)]) < peers.excess([row(2, 1)])
