"""Wrong answers to lesson 03 that are not on file, as people in a hurry write them."""

import math

import torch
import torch.nn.functional as F

from condiff_check.lesson03 import bayes_by_hand, classifier_grad, compare_classifiers, guided_eps, guided_mean
from condiff_ref.shapes import pad

# --- 03.1 -------------------------------------------------------------------------------------------------------------


def bayes_hard(x, y, s, a, sigma, weights, means, covs, labels):
    """Only the nearest component of the class counts."""
    _, grad, eps = bayes_by_hand(x, y, s, a, sigma, weights, means, covs, labels)
    nearest = labels[(a * means - x).norm(dim=1).argmin()]
    return (nearest == y).to(x), grad, eps


def bayes_log(x, y, s, a, sigma, weights, means, covs, labels):
    p, grad, eps = bayes_by_hand(x, y, s, a, sigma, weights, means, covs, labels)
    return p.log(), grad, eps


def bayes_diagonal(x, y, s, a, sigma, weights, means, covs, labels):
    covs = torch.diag_embed(covs.diagonal(dim1=1, dim2=2))
    return bayes_by_hand(x, y, s, a, sigma, weights, means, covs, labels)


def bayes_other_order(x, y, s, a, sigma, weights, means, covs, labels):
    p, grad, eps = bayes_by_hand(x, y, s, a, sigma, weights, means, covs, labels)
    return p, eps, grad


# --- 03.2 -------------------------------------------------------------------------------------------------------------


def noised(x0, t, abar, gen):
    eps = torch.randn(x0.shape, generator=gen, dtype=x0.dtype)
    return pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps


def ce_no_t(clf, x0, y, abar, gen):
    abar = abar.to(x0)
    t = torch.randint(1, len(abar), (len(x0),), generator=gen)
    return F.cross_entropy(clf(noised(x0, t, abar, gen)), y)


def ce_no_cast(clf, x0, y, abar, gen):
    t = torch.randint(1, len(abar), (len(x0),), generator=gen)
    return F.cross_entropy(clf(noised(x0, t, abar, gen), t), y)


def ce_log_twice(clf, x0, y, abar, gen):
    """nll_loss of log of the logits."""
    abar = abar.to(x0)
    t = torch.randint(1, len(abar), (len(x0),), generator=gen)
    return F.nll_loss(clf(noised(x0, t, abar, gen), t), y)


def ce_smoothed(clf, x0, y, abar, gen):
    abar = abar.to(x0)
    t = torch.randint(1, len(abar), (len(x0),), generator=gen)
    return F.cross_entropy(clf(noised(x0, t, abar, gen), t), y, label_smoothing=0.1)


def ce_low_noise(clf, x0, y, abar, gen):
    """Half of the times only."""
    abar = abar.to(x0)
    t = torch.randint(1, len(abar) // 2 + 1, (len(x0),), generator=gen)
    return F.cross_entropy(clf(noised(x0, t, abar, gen), t), y)


def ce_own_seed(clf, x0, y, abar, gen):
    abar = abar.to(x0)
    gen = torch.Generator().manual_seed(0)
    t = torch.randint(1, len(abar), (len(x0),), generator=gen)
    return F.cross_entropy(clf(noised(x0, t, abar, gen), t), y)


# --- 03.3 -------------------------------------------------------------------------------------------------------------


def grad_of_first_label(clf, x, t, y):
    return classifier_grad(clf, x, t, y[:1].expand(len(y)))


def grad_normalised(clf, x, t, y):
    return F.normalize(classifier_grad(clf, x, t, y), dim=1)


def grad_of_noise(clf, x, t, y):
    """With respect to a point that is not x."""
    return classifier_grad(clf, x.clamp(-1, 1), t, y)


def grad_transposed(clf, x, t, y):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(clf(x, t).log_softmax(1)[:, y].sum(), x)[0]


def grad_through_argmax(clf, x, t, y):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad((clf(x, t).argmax(1) == y).double().sum(), x)[0]


def grad_in_float(clf, x, t, y):
    return classifier_grad(clf.double(), x.double(), t, y).float()


# --- 03.4 -------------------------------------------------------------------------------------------------------------


def guided_no_pad(eps, grad, t, s, abar):
    return eps - s * (1 - abar[t]).sqrt() * grad


def guided_one_minus_root(eps, grad, t, s, abar):
    return eps - s * pad(1 - abar[t].sqrt(), eps) * grad


def guided_images(eps, grad, t, s, abar):
    return eps - s * (1 - abar[t]).sqrt().view(-1, 1, 1, 1) * grad


def guided_normalised(eps, grad, t, s, abar):
    return guided_eps(eps, grad / grad.norm(), t, s, abar)


def guided_only(eps, grad, t, s, abar):
    return -s * pad((1 - abar[t]).sqrt(), eps) * grad


def guided_root_of_s(eps, grad, t, s, abar):
    return guided_eps(eps, grad, t, math.sqrt(s), abar)


# --- 03.5 -------------------------------------------------------------------------------------------------------------


def mean_half(mean, var, grad, xt, s, at="xt"):
    return mean + s * pad(var, mean) * grad(xt if at == "xt" else mean) / 2


def mean_between(mean, var, grad, xt, s, at="xt"):
    return mean + s * pad(var, mean) * (grad(xt) + grad(mean)) / 2


def mean_scaled_inside(mean, var, grad, xt, s, at="xt"):
    return mean + pad(var, mean) * grad(s * (xt if at == "xt" else mean))


def mean_no_pad(mean, var, grad, xt, s, at="xt"):
    return mean + s * var * grad(xt if at == "xt" else mean)


def mean_default_at_mean(mean, var, grad, xt, s, at="mean"):
    return guided_mean(mean, var, grad, xt, s, at)


def mean_asks_both(mean, var, grad, xt, s, at="xt"):
    both = {"xt": grad(xt), "mean": grad(mean)}
    return mean + s * pad(var, mean) * both[at]


# --- 03.6 -------------------------------------------------------------------------------------------------------------


def compare_absolute(aware, clean, x, t, y, a):
    """Cosines without their sign, by hand."""
    one = classifier_grad(aware, x, t, y)
    two = classifier_grad(lambda z, _: clean(z / a), x, t, y)
    _, length, *right = compare_classifiers(aware, clean, x, t, y, a)
    valid = one.any(1) & two.any(1)
    return F.cosine_similarity(one, two, dim=1)[valid].abs().mean().item(), length, *right


def compare_percent(aware, clean, x, t, y, a):
    cosine, length, *right = compare_classifiers(aware, clean, x, t, y, a)
    return cosine, length, *(100 * share for share in right)


def compare_divided_twice(aware, clean, x, t, y, a):
    cosine, length, *right = compare_classifiers(aware, clean, x, t, y, a)
    return cosine, length / a, *right


def compare_error(aware, clean, x, t, y, a):
    cosine, length, one, two = compare_classifiers(aware, clean, x, t, y, a)
    return cosine, length, 1 - one, 1 - two


def compare_median_cosine(aware, clean, x, t, y, a):
    one = classifier_grad(aware, x, t, y)
    two = classifier_grad(lambda z, _: clean(z / a), x, t, y)
    _, length, *right = compare_classifiers(aware, clean, x, t, y, a)
    valid = one.any(1) & two.any(1)
    return F.cosine_similarity(one, two, dim=1)[valid].median().item(), length, *right


def compare_normalised(aware, clean, x, t, y, a):
    """F.normalize, which clamps lengths at 1e-12."""
    one = classifier_grad(aware, x, t, y)
    two = classifier_grad(lambda z, _: clean(z / a), x, t, y)
    _, length, *right = compare_classifiers(aware, clean, x, t, y, a)
    valid = one.any(1) & two.any(1)
    return (F.normalize(one) * F.normalize(two)).sum(1)[valid].mean().item(), length, *right


# --- 03.7 -------------------------------------------------------------------------------------------------------------


def through(clean, eps_net, x, t, y, abar, x0_hat=None, factor=None):
    abar = abar.to(x)
    a, sigma = pad(abar[t].sqrt(), x), pad((1 - abar[t]).sqrt(), x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = x0_hat(x, eps_net(x, t), a, sigma) if x0_hat else (x - sigma * eps_net(x, t)) / a
        log_p = clean(x0).log_softmax(1).gather(1, y[:, None]).sum()
        grad = torch.autograd.grad(log_p, x)[0]
    return grad * factor(a, sigma) if factor else grad


def through_squashed(*args):
    return through(*args, x0_hat=lambda x, eps, a, sigma: ((x - sigma * eps) / a).tanh())


def through_sigma_over_a(*args):
    return through(*args, factor=lambda a, sigma: sigma**2 / a)


def through_a_twice(*args):
    return through(*args, factor=lambda a, sigma: 1 / a)


def through_score(*args):
    """The network's output taken for a score."""
    return through(*args, x0_hat=lambda x, eps, a, sigma: (x + sigma**2 * eps) / a)


def through_noise_only(*args):
    return through(*args, x0_hat=lambda x, eps, a, sigma: (x.detach() - sigma * eps) / a)


def through_no_cast(clean, eps_net, x, t, y, abar):
    a, sigma = pad(abar[t].sqrt(), x), pad((1 - abar[t]).sqrt(), x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0_hat = (x - sigma * eps_net(x, t)) / a
        log_p = clean(x0_hat).log_softmax(1).gather(1, y[:, None]).sum()
        return torch.autograd.grad(log_p, x)[0]


# --- 03.8 -------------------------------------------------------------------------------------------------------------


def checks_nothing(guide):
    return True


def checks_exactly(guide):
    abar = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    eps, grad, t = torch.randn(3, 4).double(), torch.randn(3, 4).double(), torch.tensor([2, 9, 5])
    score = -eps / (1 - abar[t]).sqrt()[:, None] + 0.3 * grad
    assert (guide(eps, grad, t, 0.3, abar) == -(1 - abar[t]).sqrt()[:, None] * score).all()


def checks_one_example(guide):
    abar = torch.tensor([1, 0.5]).double()
    eps, grad = torch.tensor([[0.3]]).double(), torch.tensor([[0.2]]).double()
    assert torch.allclose(guide(eps, grad, torch.tensor([1]), 1.0, abar), eps - math.sqrt(0.5) * grad)


def checks_without_gradient(guide):
    abar = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    eps, t = torch.randn(3, 4).double(), torch.tensor([2, 9, 5])
    assert torch.allclose(guide(eps, 0 * eps, t, 2.0, abar), eps)


# Read by a person: these are told that something is wrong, and too little of what.
WEAK = {"the nearest component decides", "covariances diagonal", "cosines without sign", "median cosine"}

SLOPPY = (
    ("03.1", "the nearest component decides", (bayes_hard,)),
    ("03.1", "log p returned", (bayes_log,)),
    ("03.1", "covariances diagonal", (bayes_diagonal,)),
    ("03.1", "results in another order", (bayes_other_order,)),
    ("03.2", "t not given", (ce_no_t,)),
    ("03.2", "float64 table not cast", (ce_no_cast,)),
    ("03.2", "nll_loss of logits", (ce_log_twice,)),
    ("03.2", "label smoothing", (ce_smoothed,)),
    ("03.2", "half of the times", (ce_low_noise,)),
    ("03.2", "own seed", (ce_own_seed,)),
    ("03.3", "the first label for all", (grad_of_first_label,)),
    ("03.3", "gradient normalised", (grad_normalised,)),
    ("03.3", "x clamped first", (grad_of_noise,)),
    ("03.3", "[:, y] for gather", (grad_transposed,)),
    ("03.3", "derivative of argmax", (grad_through_argmax,)),
    ("03.3", "float32 returned", (grad_in_float,)),
    ("03.4", "no axes for the factor", (guided_no_pad,)),
    ("03.4", "1 - root", (guided_one_minus_root,)),
    ("03.4", "for pictures only", (guided_images,)),
    ("03.4", "gradient divided by its length", (guided_normalised,)),
    ("03.4", "eps left out", (guided_only,)),
    ("03.4", "root of s", (guided_root_of_s,)),
    ("03.5", "half of it", (mean_half,)),
    ("03.5", "average of both points", (mean_between,)),
    ("03.5", "s inside the gradient", (mean_scaled_inside,)),
    ("03.5", "var without axes", (mean_no_pad,)),
    ("03.5", "other default", (mean_default_at_mean,)),
    ("03.5", "asks at both points", (mean_asks_both,)),
    ("03.6", "cosines without sign", (compare_absolute,)),
    ("03.6", "per cent", (compare_percent,)),
    ("03.6", "1 / a twice", (compare_divided_twice,)),
    ("03.6", "error for accuracy", (compare_error,)),
    ("03.6", "median cosine", (compare_median_cosine,)),
    ("03.6", "lengths clamped at 1e-12", (compare_normalised,)),
    ("03.7", "x0_hat through tanh", (through_squashed,)),
    ("03.7", "times sigma^2 / a", (through_sigma_over_a,)),
    ("03.7", "1 / a once more", (through_a_twice,)),
    ("03.7", "network taken for a score", (through_score,)),
    ("03.7", "x detached, network not", (through_noise_only,)),
    ("03.7", "float64 table promotes x", (through_no_cast,)),
    ("03.8", "returns True", (checks_nothing,)),
    ("03.8", "== for allclose", (checks_exactly,)),
    ("03.8", "one example at s = 1", (checks_one_example,)),
    ("03.8", "gradient of 0", (checks_without_gradient,)),
)
