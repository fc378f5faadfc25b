import math
import os

import pytest
import scipy.linalg
import scipy.stats
import torch
from torch.testing import assert_close

from condiff_ref import data
from condiff_ref import judge as judge_module
from condiff_ref.files import CheckpointError
from condiff_ref.judge import JudgeNet, certify, jitter, judge_loss
from condiff_ref.metrics import (
    Interval,
    Judge,
    bootstrap,
    class_accuracy,
    copies,
    diversity,
    energy_distance,
    frechet_distance,
    precision_recall,
    report,
    share,
)

needs_mnist = pytest.mark.skipif(not os.environ.get("CONDIFF_MNIST"), reason="CONDIFF_MNIST is not set")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def with_moments(mean: torch.Tensor, cov: torch.Tensor, n: int = 50, seed: int = 0) -> torch.Tensor:
    """A sample (n, f) whose mean and covariance are exactly these."""
    x = normal(n, len(mean), seed=seed)
    white = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(n - 1)
    return mean + white @ torch.linalg.cholesky(cov).T


def positive_definite(f: int, seed: int) -> torch.Tensor:
    root = normal(f, f + 2, seed=seed)
    return root @ root.T


# --- intervals


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_the_intervals_that_newcombe_published(hits, n, low, high):
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    interval = share(hits, n)
    assert_close([interval.value, interval.low, interval.high], [hits / n, low, high], atol=5e-5, rtol=0)


def test_a_share_of_everything_is_not_certain():
    z2 = 1.959964**2  # at n of n Wilson's lower end is n / (n + z^2)
    assert_close(share(10, 10).low, 10 / (10 + z2), atol=1e-6, rtol=0)
    assert share(10, 10).high == 1
    assert share(0, 10).low == 0


def test_wilson_covers_at_the_promised_rate_where_wald_does_not():
    p, n = 0.98, 100
    probability = scipy.stats.binom(n, p).pmf
    covered = sum(probability(hits) for hits in range(n + 1) if share(hits, n).low <= p <= share(hits, n).high)
    wald = sum(probability(h) for h in range(n + 1) if abs(h / n - p) <= 1.96 * math.sqrt(h / n * (1 - h / n) / n))
    assert wald < 0.9 < 0.94 < covered


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_shares_are_refused(hits, n):
    with pytest.raises(ValueError, match=f"got {hits} of {n}"):
        share(hits, n)


def test_an_interval_reads_as_value_and_ends():
    assert str(Interval(0.9921, 0.987, 0.996)) == "0.992 [0.987, 0.996]"


def test_bootstrap_of_a_mean_is_students_interval():
    x = normal(400, 1)
    interval = bootstrap(lambda x: x.mean().item(), x, draws=2000, generator=generator(1))
    half = 1.96 * x.std().item() / 20
    assert interval.value == x.mean().item()
    # the quantiles of 2000 draws are about 3 % of the half width off; at 90 % it would be 16 % narrower
    assert_close(
        [interval.low, interval.high], [x.mean().item() - half, x.mean().item() + half], atol=0.1 * half, rtol=0
    )


def test_bootstrap_resamples_each_sample_by_itself():
    x = normal(200, 1)
    paired = bootstrap(lambda x: (x[:, 0] - x[:, 1]).mean().item(), torch.cat([x, x], 1), generator=generator())
    apart = bootstrap(lambda x, y: (x - y).mean().item(), x, x, generator=generator())
    assert paired.low == paired.high == 0
    half = 1.96 * math.sqrt(2 / 200)
    assert_close([apart.low, apart.high], [-half, half], atol=0.35 * half, rtol=0)


def test_bootstrap_is_a_function_of_its_generator():
    x = normal(50, 1)
    first, second, other = (bootstrap(lambda x: x.mean().item(), x, generator=generator(s)) for s in (1, 1, 2))
    assert first == second != other


def test_bootstrap_of_a_distance_covers_its_mean_at_this_n():
    """Plain percentile intervals of such distances cover it in under half of the cases."""
    n, repeats = 60, 40

    def distance(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return normal(n, 3, seed=2 * seed), normal(n, 3, seed=2 * seed + 1) + 0.3

    mean = sum(frechet_distance(*distance(seed)) for seed in range(1000, 1400)) / 400
    intervals = [
        bootstrap(frechet_distance, *distance(seed), draws=40, generator=generator(seed)) for seed in range(repeats)
    ]
    covered = sum(interval.low <= mean <= interval.high for interval in intervals)
    assert covered >= 34  # of 40; at 95 % fewer have probability 3 in 1000
    assert sum(interval.low < interval.value < interval.high for interval in intervals) == repeats


# --- Frechet distance


def test_frechet_distance_of_commuting_gaussians():
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25]).double()
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    samples = with_moments(mean, a.diag()), with_moments(torch.zeros(3).double(), b.diag(), n=70, seed=1)
    assert_close(frechet_distance(*samples), expected.item(), atol=1e-10, rtol=0)


def test_frechet_distance_of_2d_gaussians_that_do_not_commute():
    # The trace of a 2x2 matrix's root is sqrt(tr + 2 sqrt(det)).
    a, b = positive_definite(2, seed=0), positive_definite(2, seed=1)
    assert (a @ b - b @ a).abs().max() > 0.1
    root = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    samples = (with_moments(torch.zeros(2).double(), cov, seed=seed) for seed, cov in enumerate((a, b)))
    assert_close(frechet_distance(*samples), (a.trace() + b.trace() - 2 * root).item(), atol=1e-10, rtol=0)


def test_frechet_distance_is_the_formula_with_scipys_root():
    a, b = with_moments(normal(6), positive_definite(6, 2)), with_moments(normal(6, seed=1), positive_definite(6, 3))
    root = scipy.linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real.trace()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * root
    assert_close(frechet_distance(a, b), expected.item(), atol=1e-9, rtol=0)


def test_frechet_distance_of_a_moved_sample_is_the_squared_way_at_any_rank():
    for n in (2, 5, 100):  # in 10 dimensions
        a = normal(n, 10)
        assert_close(frechet_distance(a, a), 0.0, atol=1e-10, rtol=0)
        assert_close(frechet_distance(a, a + 2), 40.0, atol=1e-10, rtol=0)
        assert_close(
            frechet_distance(3 * a, a),
            (3 * a.mean(0) - a.mean(0)).square().sum().item() + 4 * a.var(0).sum().item(),
            atol=1e-10,
            rtol=0,
        )


def test_frechet_distance_across_subspaces_that_are_orthogonal():
    a, b = torch.zeros(20, 4).double(), torch.zeros(30, 4).double()
    a[:, :2], b[:, 2:] = normal(20, 2), normal(30, 2, seed=1)
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    assert_close(frechet_distance(a, b), expected.item(), atol=1e-10, rtol=0)


def test_frechet_distance_is_symmetric_and_takes_single_precision():
    a, b = normal(30, 4), normal(50, 4, seed=1) * 2
    assert_close(frechet_distance(a, b), frechet_distance(b, a), atol=1e-12, rtol=0)
    assert_close(frechet_distance(a.float(), b.float()), frechet_distance(a, b), atol=1e-5, rtol=0)
    # means far from 0 cost single precision its digits; computed in double they do not
    far = torch.tensor([1000.0, 1001.0, 1002.0])[:, None]
    assert_close(frechet_distance(far, far * 1.0), 0.0, atol=1e-9, rtol=0)


@pytest.mark.parametrize("distance", [frechet_distance, energy_distance, precision_recall])
def test_samples_that_cannot_be_compared_are_refused(distance):
    with pytest.raises(ValueError, match=r"widths: \(5, 3\) and \(5, 2\)"):
        distance(normal(5, 3), normal(5, 2))
    with pytest.raises(ValueError, match="NaN or infinite"):
        distance(normal(5, 2), normal(5, 2).log())
    rows = {frechet_distance: 2, energy_distance: 1, precision_recall: 4}[distance]
    with pytest.raises(ValueError, match=f"needs {rows} rows or more, got 5 and {rows - 1}"):
        distance(normal(5, 2), normal(rows - 1, 2))


# --- energy distance


def test_energy_distance_of_two_points_is_twice_their_distance():
    for n, m in ((1, 1), (3, 5)):
        assert energy_distance(torch.zeros(n, 2), torch.tensor([[3.0, 4.0]]).expand(m, 2)) == 10


def test_energy_distance_in_one_dimension_is_the_square_of_scipys():
    a, b = normal(700, 1), normal(300, 1, seed=1) * 1.5 + 0.2  # more rows than one chunk
    expected = scipy.stats.energy_distance(a[:, 0].numpy(), b[:, 0].numpy()) ** 2
    assert_close(energy_distance(a, b), expected, atol=1e-10, rtol=0)


def test_energy_distance_sees_what_two_moments_do_not():
    a = torch.tensor([[-1.0], [1.0]]).double().repeat(2, 1)
    b = torch.tensor([[-math.sqrt(2)], [0.0], [0.0], [math.sqrt(2)]], dtype=torch.float64)  # mean and variance as in a
    assert_close(frechet_distance(a, b), 0.0, atol=1e-12, rtol=0)
    # E|x - y| = (1 + sqrt 2) / 2 from both kinds of y, E|x - x'| = 1, E|y - y'| = 3 / sqrt 8
    assert_close(energy_distance(a, b), 1 + math.sqrt(2) - 1 - 3 * math.sqrt(2) / 4, atol=1e-12, rtol=0)
    assert energy_distance(a, b.flip(0)) == energy_distance(b, a)


# --- precision and recall


def test_a_sample_covers_itself_and_nothing_far_away():
    real = normal(600, 3)
    assert [x.value for x in precision_recall(real, real)] == [1, 1]
    assert [x.value for x in precision_recall(real, real + 100)] == [0, 0]


def test_precision_and_recall_by_hand():
    # k = 1: balls of radius 1 around 0, 1 and of radius 9 around 10; the fakes' have radii 2, 2 and 18.
    real, fake = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[-1.5], [0.5], [18.5]])
    precision, recall = precision_recall(real, fake, k=1)
    # -1.5 is 1.5 from 0 and out of every ball; 18.5 is in the ball of 10. All real points are in the ball of 18.5.
    assert_close([precision.value, recall.value], [2 / 3, 1.0])


def test_a_lost_mode_costs_recall_and_a_false_one_precision():
    near, far = normal(200, 2), normal(200, 2, seed=1) + 20
    both, some = torch.cat([near, far]), torch.cat([normal(200, 2, seed=2), normal(200, 2, seed=3)])
    precision, recall = precision_recall(real=both, fake=some)
    assert precision.value > 0.9
    assert 0.4 < recall.value <= 0.5
    precision, recall = precision_recall(real=some, fake=both)
    assert 0.4 < precision.value <= 0.5
    assert recall.value > 0.9


def test_more_neighbours_make_larger_supports():
    real, fake = normal(100, 4), normal(100, 4, seed=1)
    shares = [precision_recall(real, fake, k=k)[0].value for k in (1, 3, 10)]
    assert shares == sorted(shares)
    assert shares[0] < shares[2]


# --- copies and diversity


def images(n: int, seed: int) -> torch.Tensor:
    return normal(n, 1, 8, 8, seed=seed).float()


def test_honest_images_are_copies_at_the_rate_of_the_quantile():
    found = copies(images(2000, 0), images(500, 1), images(2000, 2), quantile=0.1)
    # standard error of the difference of two shares of 10 % of 2000: 0.0095
    assert abs(found.value - 0.1) < 5 * 0.0095
    assert found.low < 0.1 < found.high


def test_planted_copies_are_found():
    train, held_out, fake = images(300, 0), images(400, 1), images(1000, 2)
    fake[:200] = train[torch.arange(200)] + 0.01 * images(200, 3)
    found = copies(fake, train, held_out)
    assert 0.2 <= found.value < 0.24
    assert found.low > 0.17
    assert copies(train, train, held_out).value == 1


def test_copies_have_no_narrow_interval_from_few_held_out_images():
    few, many = (copies(images(4000, 0), images(100, 1), images(n, 2), quantile=0.05) for n in (100, 4000))
    assert few.high - few.low > 2 * (many.high - many.low)
    none = copies(images(50, 0) + 100, images(100, 1), images(100, 2))
    assert (none.value, none.low) == (0, 0)
    assert none.high > 0


def test_copies_need_images_of_one_size():
    with pytest.raises(ValueError, match="widths"):
        copies(images(5, 0), torch.zeros(5, 1, 4, 4), images(5, 1))
    with pytest.raises(ValueError, match="NaN"):
        copies(images(5, 0).log(), images(5, 1), images(5, 2))


def test_diversity_is_the_relative_spread_within_classes():
    real, labels = normal(300, 5), torch.arange(300) % 3
    offsets = torch.tensor([0.0, 50.0, 100.0])[labels, None].double()  # how far classes are apart must not matter
    shrink = torch.tensor([0.5, 1.0, 0.3], dtype=torch.float64)
    interval = diversity(real * shrink[labels, None] - offsets, labels, real + offsets, labels, draws=20)
    assert_close(interval.value, 0.6, atol=1e-9, rtol=0)
    assert interval.low < 0.6 < interval.high


def test_diversity_is_near_one_for_other_real_images_and_its_interval_is_not_biased_by_repeats():
    # Resampled, one pair in 20 is a row with itself, at distance 0. In 200 dimensions all other distances are nearly
    # equal, so that intervals which are not corrected for it lie wholly below the value.
    real, fake = normal(300, 200), normal(20, 200, seed=1)
    labels = torch.zeros(20, dtype=torch.long), torch.zeros(300, dtype=torch.long)
    interval = diversity(fake, labels[0], real, labels[1], draws=50, generator=generator())
    assert interval.low < interval.value < interval.high
    assert abs(interval.value - 1) < 0.03


def test_diversity_needs_pairs():
    labels = torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match="two fakes and two real images"):
        diversity(normal(3, 2), labels, normal(3, 2), torch.tensor([0, 1, 1]))


# --- judges


@pytest.fixture(scope="module")
def digits_judge():
    return Judge.digits()


@pytest.fixture(scope="module")
def mnist_judge():
    return Judge.mnist()


def test_accuracy_is_the_share_of_labels_that_the_judge_agrees_with():
    answers = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    judge = Judge("parrot", 8, lambda x: answers[: len(x)], lambda x: x.flatten(1), share(1, 1), "")
    asked = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 0])
    assert class_accuracy(judge, -torch.ones(10, 1, 8, 8), asked) == share(8, 10)
    with pytest.raises(ValueError, match="10 images but 9 labels"):
        class_accuracy(judge, -torch.ones(10, 1, 8, 8), asked[:9])


def test_the_digits_judge_scores_its_own_accuracy_on_the_training_split(digits_judge):
    measured = class_accuracy(digits_judge, *data.digits("train"))
    assert measured == digits_judge.test_accuracy
    assert measured.value > 0.97
    assert class_accuracy(digits_judge, *data.digits("test")).value > measured.value  # what it was fitted on
    images, labels = data.digits("train")
    assert class_accuracy(digits_judge, images, (labels + 1) % 10).value < 0.02


def test_the_digits_judge_has_seen_no_training_image(digits_judge, monkeypatch):
    """Fitted again with all training labels shifted by one, it is the same judge, and now it errs on all of them."""
    true = data.digits
    shifted = lambda split: (true(split)[0], (true(split)[1] + (split == "train")) % 10)  # noqa: E731
    monkeypatch.setattr(data, "digits", shifted)
    other = Judge.digits()
    images, _ = true("train")
    assert_close(other.classify(images), digits_judge.classify(images), atol=0, rtol=0)
    assert other.test_accuracy.value < 0.02


def test_digits_features_are_the_pixels_up_to_one_scale(digits_judge):
    images, _ = data.digits("train")
    features = digits_judge.features(images)
    assert_close(features / features.norm(), images.flatten(1) / images.norm())
    assert_close(features.var(0).mean().item(), 1.0, atol=0.02, rtol=0)  # the scale is that of the test split


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (-torch.ones(3, 1, 28, 28), r"\(n, 1, 8, 8\), got \(3, 1, 28, 28\)"),
        (-torch.ones(3, 3, 8, 8), r"got \(3, 3, 8, 8\)"),
        (torch.ones(0, 1, 8, 8), r"got \(0, 1, 8, 8\)"),
        (torch.full((3, 1, 8, 8), math.nan), "NaN"),
        (torch.rand(3, 1, 8, 8), r"look as if they were in \[0, 1\]"),
    ],
)
def test_judges_refuse_what_they_cannot_read(digits_judge, wrong, message):
    for read in (digits_judge.classify, digits_judge.features):
        with pytest.raises(ValueError, match=message):
            read(wrong)


def test_jitter_moves_but_does_not_mix_images():
    images, _ = data.digits("test")
    moved = jitter(images[:50], generator())
    assert_close(moved, jitter(images[:50], generator()), atol=0, rtol=0)
    assert moved.min() >= -1
    assert moved.max() <= 1
    assert_close(moved.add(1).sum(), images[:50].add(1).sum(), atol=0, rtol=0.05)  # ink stays, about
    assert ((moved - images[:50]).abs().amax((1, 2, 3)) > 0.1).all()
    blank = images[:50].clone()
    blank[1:] = -1  # an empty image stays empty whatever its neighbours are
    alone = jitter(blank, generator())
    assert_close(alone[0], moved[0], atol=0, rtol=0)
    assert_close(alone[1:], blank[1:], atol=0, rtol=0)


def test_jitter_keeps_the_middle_within_two_pixels():
    dot = -torch.ones(200, 1, 28, 28)
    dot[:, :, 13:15, 13:15] = 1
    ink = jitter(dot, generator()).add(1)[:, 0]
    where = torch.arange(28) - 13.5
    for center in (ink.sum(1) @ where / ink.sum((1, 2)), ink.sum(2) @ where / ink.sum((1, 2))):
        assert 1.5 < center.abs().max() < 2.3  # 2 pixels, times 1.1 for stretching
        assert abs(center.mean()) < 5 * 2 / math.sqrt(3 * 200)


def test_a_judge_net_learns_from_its_loss_and_reads_each_image_by_itself():
    torch.manual_seed(0)
    network, (small, labels) = JudgeNet(), data.digits("test")
    images = torch.nn.functional.interpolate(small[:20], size=28)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    first = judge_loss(network, images, labels[:20], generator()).item()
    assert abs(first - math.log(10)) < 0.5  # knows nothing yet
    for step in range(25):
        loss = judge_loss(network, images, labels[:20], generator(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first
    together = network(images)
    apart = torch.cat([network(images[:1]), network(images[1:])])
    assert_close(together, apart, atol=1e-5, rtol=0)
    assert sum(p.numel() for p in network.parameters()) < 100_000


def test_certifying_counts_hits_and_scales_the_features():
    torch.manual_seed(0)
    network, images = JudgeNet(), torch.nn.functional.interpolate(data.digits("test")[0][:100], size=28)
    logits = network(images)
    labels = logits.argmax(1)
    labels[:30] = (labels[:30] + 1) % 10
    assert certify(network, images, labels) == certify(network, images, labels) == {"hits": 70, "tested": 100}
    assert_close(network.features(images).var(0).mean().item(), 1.0, atol=1e-5, rtol=0)
    assert_close(network(images), logits)  # verdicts do not change


def test_a_missing_checkpoint_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(judge_module, "CHECKPOINT", tmp_path / "mnist-judge.safetensors")
    with pytest.raises(CheckpointError, match="condiff train"):
        Judge.mnist()


@needs_mnist
def test_the_mnist_judge_scores_its_own_accuracy(mnist_judge):
    images, labels = data.mnist("train")
    # at random: images of the two groups of writers alternate, so that every second one is harder
    some = torch.randperm(60_000, generator=generator())[:10_000]
    measured = class_accuracy(mnist_judge, images[some], labels[some])
    assert measured.low <= mnist_judge.test_accuracy.value <= measured.high
    assert mnist_judge.test_accuracy.low > 0.99
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        class_accuracy(mnist_judge, images[:100] / 2 + 0.5, labels[:100])


@needs_mnist
def test_mnist_features_are_finite_of_variance_one_and_independent_of_batch_mates(mnist_judge):
    images, _ = data.mnist("train")
    features = mnist_judge.features(images[:2500])  # more than one chunk
    assert features.shape == (2500, 64)
    assert features.isfinite().all()
    assert_close(features.var(0).mean().item(), 1.0, atol=0.05, rtol=0)
    assert_close(mnist_judge.features(images[7:8]), features[7:8], atol=1e-4, rtol=0)


# --- all together


def test_the_report_of_real_images_is_that_of_other_real_images(digits_judge):
    images, labels = data.digits("train")
    half = torch.arange(len(images)) < 690
    other, _ = data.digits("test")
    numbers = report(
        digits_judge, images[half], labels[half], (images[~half], labels[~half]), other, draws=20, generator=generator()
    )
    assert numbers["n"] == 690
    assert 320 < numbers["n_compared"] < 355
    for name in ("fd", "precision", "recall"):
        ours, real = numbers[name], numbers[f"{name}_real"]
        assert ours.low < real.high
        assert real.low < ours.high
    assert numbers["accuracy"] == class_accuracy(digits_judge, images[half], labels[half])
    assert numbers["diversity"].low < 1.02
    assert numbers["diversity"].high > 0.98
    assert numbers["copies"].low < 0.01 < numbers["copies"].high


def test_the_report_does_not_blame_the_generator_for_the_classes_asked_for(digits_judge):
    images, labels = data.digits("train")
    threes = images[labels == 3]
    numbers = report(
        digits_judge,
        threes[:60],
        torch.full((60,), 3),
        (images, labels),
        data.digits("test")[0],
        draws=20,
        generator=generator(),
    )
    assert numbers["n_compared"] == 60
    assert numbers["fd"].low < numbers["fd_real"].high


def test_the_report_finds_the_faults_it_is_for(digits_judge):
    images, labels = data.digits("train")
    held_out, _ = data.digits("test")
    asked = torch.arange(400) % 10
    template = torch.stack([images[labels == c].mean(0) for c in range(10)])[asked]
    numbers = report(
        digits_judge, template + 0.01 * images[:400], asked, (images, labels), held_out, draws=20, generator=generator()
    )
    assert numbers["accuracy"].low > 0.9  # the mean image of each class is of its class
    assert numbers["diversity"].high < 0.1
    assert numbers["recall"].high < 0.3 < numbers["recall_real"].low
    assert numbers["fd"].low > numbers["fd_real"].high
    copied = report(digits_judge, images, labels, (images, labels), held_out, draws=5, generator=generator())
    assert copied["copies"].low > 0.99
