# %% [markdown]
# # 03 · Classifier guidance
#
# **Question.** You have a diffusion model that has never seen a label. Can a classifier make it draw what you ask for?
#
# **You need** lesson 01 (score, $\epsilon^*$, DDPM and DDIM steps). No GPU: the exact world and the 8x8 digits do it all.
#
# **You build** the loss of a classifier that knows noise, its gradient, both ways to put that gradient into a sampler, and the measurement that shows why an ordinary classifier will not do.
#
# Letters as in lesson 01: $x_t=a\,x_0+\sigma\,\epsilon$ with $a=\sqrt{\bar\alpha_t}$, $\sigma=\sqrt{1-\bar\alpha_t}$. New are the label $y$, the **guidance scale** $s$ (0: unconditional, 1: conditional; other texts call it $\omega$, $\gamma$ or $\lambda$), and $g=\nabla_{x_t}\log p(y\mid x_t)$, the classifier's gradient. How noisy a time is, the noise-to-signal ratio $\tilde\sigma=\sigma/a$ tells: 0 is clean, 1 is half and half.

# %% tags=["setup"]

# %%
from itertools import pairwise
from time import monotonic

from condiff_ref import data
from condiff_ref.checkpoints import TableNetwork, load
from condiff_ref.judge import Judge
from condiff_ref.layers import ResBlock, group_norm, time_embedding
from condiff_ref.metrics import class_accuracy, diversity, energy_distance, frechet_distance
from condiff_ref.mixture import GaussianMixture, archipelago, line2
from condiff_ref.schedules import discrete
from condiff_ref.shapes import pad
from condiff_ref.viz import COLOURS, show_tile
from condiff_ref.widgets import slider
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

torch.set_default_dtype(torch.float64)  # until section 8: first the exact world

T = 1000
abar = torch.cat([torch.ones(1), (1 - torch.linspace(1e-4, 0.02, T)).cumprod(0)])
path = discrete(abar)


def rng(seed=0):
    return Generator().manual_seed(seed)


# %% [markdown]
# ## 1. Bayes for scores
#
# Bayes' rule for the *noisy* picture, its logarithm, and its gradient with respect to $x_t$:
#
# $$p(x_t\mid y)=\frac{p(y\mid x_t)\,p(x_t)}{p(y)},\qquad\nabla\log p(x_t\mid y)=\nabla\log p(x_t)+\nabla\log p(y\mid x_t)-\underbrace{\nabla\log p(y)}_{=0}.\tag{1}$$
#
# $\log p(y)$ is one number for all $x_t$: its gradient vanishes, and with it the only term that nobody could compute. (For the same reason the joint $\log p(x_t,y)$ has the same gradient as $\log p(x_t\mid y)$.)
#
# | term | meaning | where it comes from |
# |---|---|---|
# | $\nabla\log p(x_t\mid y)$ | towards pictures of $y$ | what we want |
# | $\nabla\log p(x_t)$ | towards any picture | the unconditional network, $-\epsilon_\theta(x_t,t)/\sigma$ |
# | $\nabla\log p(y\mid x_t)$ | towards where it is clearer that this is a $y$ | a classifier of *noisy* pictures, by backpropagation |
#
# (1) is exact for *one* classifier: the posterior of the noised pair, $p(y\mid x_t)=\mathbb E[p(y\mid x_0)\mid x_t]$. Any other $p_\phi$ (weights $\phi$) gives an approximation.

# %% [markdown]
# **In the network's units.** A score is $-\epsilon/\sigma$. Multiply (1) by $-\sigma$, and let $s$ scale the classifier's term:
#
# $$\tilde\epsilon=\epsilon_\theta(x_t,t)\;-\;s\,\sigma\,\nabla_{x_t}\log p_\phi(y\mid x_t).\tag{2}$$
#
# The sign turns, because noise points *away* from the data; the factor is $\sigma=\sqrt{1-\bar\alpha_t}$. For an estimate of $x_0=(x_t-\sigma\epsilon)/a$ the same step reads $\tilde x_0=\hat x_0+s\,\frac{\sigma^2}{a}\,\nabla\log p_\phi(y\mid x_t)$. ($\tilde\epsilon$ is a guided *noise prediction*; the guided score is $-\tilde\epsilon/\sigma$.)
#
# What $s$ does to the classifier: $s\,\nabla\log p=\nabla\log p^s$, exactly. Often this is called a sharpened classifier; but to be a classifier, $p^s$ would have to be divided by $\sum_yp(y\mid x_t)^s$, which depends on $x_t$ and has a gradient of its own.
#
# Solve (1) the other way round and you have the seed of lesson 04: $\nabla\log p(y\mid x_t)=\nabla\log p(x_t\mid y)-\nabla\log p(x_t)$. It is an *equality* (a lecture writes $\propto$), and in noise units it is $-(\epsilon_c-\epsilon_u)/\sigma$, where $\epsilon_c$ and $\epsilon_u$ are the predictions with and without the label: the constant is negative and depends on $t$.

# %% [markdown]
# **All of it once by hand**, at one point of a Gaussian mixture. Noised, component $k$ is $\mathcal N(a\,m_k,\ a^2S_k+\sigma^2I)$, and each of your three numbers is a ratio or a gradient of sums of these.

# %% exercise="03.1"

# %%
world = archipelago()  # three classes, two islands each; noised, it stays a mixture of Gaussians


def exact_eps(x, t, world=world, label=None):
    """E[eps | x_t], or E[eps | x_t, label]: what a perfect network would answer."""
    return -pad((1 - abar[t]).sqrt(), x) * world.score(x, t.double(), path, label=label)


def exact_logits(x, t, world=world):
    """log p(y | x_t) of all classes (N, classes): a perfect classifier that knows noise."""
    return torch.stack([world.class_log_prob(x, t.double(), path, c) for c in range(world.classes)], dim=1)


# %% tags=["nbval-check-output"]
x, half = torch.tensor([0.3, 0.7]), 0.5**0.5
p, grad, guided = bayes_by_hand(x, 0, 1.0, half, half, world.weights, world.means, world.covs, world.labels)
print(f"p(0 | x_t) = {float(p):.6f}, gradient = ({float(grad[0]):.6f}, {float(grad[1]):.6f})")
table = torch.tensor([1.0, 0.5])  # one level of noise: a = sigma
cond = world.score(x[None], torch.ones(1), discrete(table), label=0)[0]
print("at s = 1 the guided score is the conditional score:", torch.allclose(-guided / half, cond))

# %% [markdown]
# **The same as a picture**, at four points. **Predict:** A lies on the shore of class 0's lonely island, B between it and class 2, C on class 1's upper island, D on one of class 2. For class 0, where is the classifier's arrow the shortest, and where the longest?

# %%
guess_shortest, guess_longest = ..., ...

# %%
at_300, here = torch.full((4,), 300.0), torch.tensor([[-1.7, 1.6], [-1.9, -0.5], [0.4, 2.0], [2.0, -1.5]])
score_u, score_c = (world.score(here, at_300, path, label=c) for c in (None, 0))
cloud = abar[300].sqrt() * world.sample(600, rng(5))[0]
cloud = cloud + (1 - abar[300]).sqrt() * torch.randn(600, 2, generator=rng(6))
fig, ax = plt.subplots(figsize=(5, 4.6), layout="constrained")
ax.scatter(*cloud.T, s=2, color=COLOURS["noise"])
for tail, arrow, role, label in (
    (here, score_u, "unconditional", "score of $p(x_t)$"),
    (here + 0.4 * score_u, score_c - score_u, "guided", "gradient of $\\log p(y|x_t)$"),
    (here, score_c, "conditional", "their sum: score of $p(x_t|y)$"),
):
    how = dict(angles="xy", scale_units="xy", scale=1, width=0.007, label=label)
    ax.quiver(*tail.T, *(0.4 * arrow).T, color=COLOURS[role], **how)
for spot, at in zip("ABCD", here.tolist()):
    ax.annotate(spot, at, (-10, -9), textcoords="offset points")
ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), title="t = 300, class 0: two arrows and their sum", aspect="equal")
ax.legend(fontsize=7, loc="lower center")
plt.show()
lengths = dict(zip("ABCD", (score_c - score_u).norm(dim=1).tolist()))
print("the classifier's arrow:", {spot: round(length, 2) for spot, length in lengths.items()})
reveal(guess_shortest, min(lengths, key=lengths.get))
reveal(guess_longest, max(lengths, key=lengths.get))

# %% [markdown]
# *At each point the model pulls towards data, the classifier towards class 0 (its arrow begins at the tip of the first), and their sum is the score of class 0. Where it is clear that this is class 0, as at A, the classifier has next to nothing to add.*

# %% [markdown]
# ## 2. A classifier that knows noise
#
# Which loss has the posterior of the noised pair as its minimiser? Cross-entropy on noised pictures: for any classifier $p_\phi$,
#
# $$\mathbb E\big[-\log p_\phi(y\mid x_t)\big]=\underbrace{\mathbb E\big[-\log p(y\mid x_t)\big]}_{H(y\mid x_t):\text{ floor}}+\underbrace{\mathbb E\,D_{KL}\big(p(\cdot\mid x_t)\,\|\,p_\phi(\cdot\mid x_t)\big)}_{\ge0,\ =0\text{ only for }p_\phi=p},\tag{3}$$
#
# at each $t$. So: noise each picture to a random $t$ by the *same schedule* as the diffusion model, tell the classifier $t$, and ask for the label. Nothing else.

# %% exercise="03.2"

# %% [markdown]
# **Predict before you run.** The classes of the archipelago have probabilities .30, .30, .40; a classifier that knows nothing has the loss 1.09, by (3) with no information. What is the loss of a *perfect* one, averaged over $t$: 0, 0.2 or 0.8?

# %%
guess_loss = ...


# %%
class Oracle(nn.Module):
    def forward(self, x, t):
        return exact_logits(x, t)


points, classes = world.sample(5000, rng(1))
perfect = float(noisy_ce_loss(Oracle(), points, classes, abar, rng(2)))
reveal(guess_loss, round(perfect, 2), close=0.1)

# %% [markdown]
# At high noise there is nothing left to read, and the honest answer is the prior $p(y)$. That is no failure: the prior does not depend on $x_t$, its gradient is 0, and no push is just what guidance needs there.
#
# ## 3. Its gradient
#
# Each example needs the gradient of its own $\log p(y_i\mid x_i)$ with respect to its own $x_i$. One backward pass does all of them: in $\sum_j\log p(y_j\mid x_j)$ only the $i$-th term contains $x_i$, so the gradient of the **sum** is the stack of single gradients. (The *mean* would make guidance $B$ times weaker: a scale that depends on the batch size $B$. Issue #51 of OpenAI's guided-diffusion asks whether the sum mixes the examples up; it does not, for this reason.)

# %% exercise="03.3"

# %% tags=["nbval-check-output"]
xt, t = 1.5 * torch.randn(500, 2, generator=rng(3)), torch.full((500,), 300)
y0 = torch.zeros(500, dtype=torch.long)
by_scores = world.score(xt, t.double(), path, label=0) - world.score(xt, t.double(), path)
print("by autograd = by Bayes:", torch.allclose(classifier_grad(Oracle(), xt, t, y0), by_scores))

# %% [markdown]
# The sum trick rests on one thing: example $j$'s output must not contain $x_i$. BatchNorm in training mode breaks it. **What do you expect** when we change only the *last* example of a batch, and look at the gradient of the first?

# %% tags=["nbval-check-output"]
xs = torch.randn(8, 4, generator=rng(4))
others = torch.cat([xs[:7], xs[7:] + 5])
for norm in (nn.BatchNorm1d(16), nn.LayerNorm(16)):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 16), norm, nn.SiLU(), nn.Linear(16, 3)).train()
    t8, y8 = torch.full((8,), 5), torch.zeros(8, dtype=torch.long)
    one, two = (classifier_grad(lambda x, t, body=body: body(x), batch, t8, y8)[0] for batch in (xs, others))
    print(f"{type(norm).__name__}: the first gradient depends on the last example:", not torch.allclose(one, two))

# %% [markdown]
# In eval mode BatchNorm uses stored averages, and the leak is gone; but those averages mix all noise levels. Classifiers for guidance use GroupNorm or LayerNorm.
#
# ## 4. Guided sampling
#
# The whole algorithm, one step: (i) ask the network for $\epsilon_\theta(x_t,t)$; (ii) ask the classifier for $\log p(y\mid x_t)$ and backpropagate to $x_t$; (iii) combine by (2); (iv) take a DDIM step with $\tilde\epsilon$. Yours is (iii):

# %% exercise="03.4"


# %%
STEPS = 25 if SMOKE else 50


def ddim(predict, x, steps=STEPS, table=abar):
    """From noise x to data; predict(x, t) is the (guided) noise prediction."""
    times = torch.linspace(len(table) - 1, 0, steps + 1).round().long()
    for t, u in pairwise(times):  # from t to the earlier u; s is the guidance scale here
        eps = predict(x, t.expand(len(x)))
        x0 = (x - (1 - table[t]).sqrt() * eps) / table[t].sqrt()
        x = table[u].sqrt() * x0 + (1 - table[u]).sqrt() * eps
    return x


def exact_parts(x, t, y=0, world=world):
    """(E[eps | x_t], grad log p(y | x_t)), the gradient by (1), without autograd."""
    score_u, score_c = (world.score(x, t.double(), path, label=c) for c in (None, y))
    return -pad((1 - abar[t]).sqrt(), x) * score_u, score_c - score_u


def exact_grad(x, t, y=0, world=world):
    return exact_parts(x, t, y, world)[1]


# %% [markdown]
# **A formula from lecture slides.** Some slides print the guided prediction as $\epsilon_\theta+\gamma\,\nabla_x\log p_\phi(y\mid x)$. **Predict:** data at $\pm1$ (variance .25 each), asked for the one at $+1$ with $\gamma=3$, ten DDIM steps from $x_T=-0.5$. Where does the slide's formula end: near $+1$, near $-1$, or nowhere near either?

# %%
guess_slide = ...  # "+1", "-1" or "neither"

# %% tags=["nbval-check-output"]
line = line2(1.0, 0.25)
formulas = {
    "(2)  ": lambda eps, grad, t: guided_eps(eps, grad, t, 3.0, abar),
    "slide": lambda eps, grad, t: eps + 3.0 * grad,
}
ends = {}
for name, formula in formulas.items():
    end = ddim(lambda x, t, f=formula: f(*exact_parts(x, t, 1, line), t), torch.tensor([[-0.5]]), steps=10)
    ends[name] = float(end)
    print(f"{name}: ten steps end at {ends[name]:.6f}")

# %%
end = ends["slide"]
reveal(guess_slide, "+1" if abs(end - 1) < 1 else "-1" if abs(end + 1) < 1 else "neither")

# %% [markdown]
# A single prediction shows what happens: $x_t=0.3$ at $\bar\alpha_t=\tfrac12$, and the $x_0$ that each formula implies. The last line checks the constant of section 1.

# %% tags=["nbval-check-output"]
one_point, one_t, one_table = torch.tensor([[0.3]]), torch.tensor([1]), torch.tensor([1.0, 0.5])
score_u, score_c = (line.score(one_point, one_t.double(), discrete(one_table), label=c) for c in (None, 1))
eps_u, eps_c, grad = -half * score_u, -half * score_c, score_c - score_u
for name, eps in (("(2)  ", guided_eps(eps_u, grad, one_t, 3.0, one_table)), ("slide", eps_u + 3 * grad)):
    print(f"{name}: eps {float(eps):.6f}, x0 {float((one_point - half * eps) / half):.4f}")
print(f"gradient / (eps_c - eps_u) = {float(grad / (eps_c - eps_u)):.6f} = -1/sigma")

# %% [markdown]
# The slide has the wrong sign, lacks the factor $\sigma$, and writes $x$ where the classifier must see $x_t$. Its own next slides still arrive at the right formula of lesson 04, because a second error (a positive constant in $\nabla\log p(y\mid x)\propto\epsilon_c-\epsilon_u$) cancels the first.
#
# Errors this large show at once. **The dangerous ones do not.** Five programs guide the archipelago towards class 0 at $s=1$, with the exact network and the exact classifier. One is right. The others: the root forgotten ($1-\bar\alpha_t$), the factor forgotten altogether, $\nabla p$ for $\nabla\log p$, and the sign. The letters are dealt at random.


# %%
def guided_by(term, s=1.0):
    """A noise prediction: E[eps | x_t] minus s times term(gradient, sigma, p(y | x_t))."""

    def predict(x, t):
        eps, grad = exact_parts(x, t)
        p = world.class_log_prob(x, t.double(), path, 0).exp()[:, None]
        return eps - s * term(grad, pad((1 - abar[t]).sqrt(), x), p)

    return predict


n = 600 if SMOKE else 2000
start, truth = torch.randn(n, 2, generator=rng(6)), world.given(0).sample(n, rng(8))[0]
programs = {
    "right": lambda g, sigma, p: sigma * g,
    "the root forgotten": lambda g, sigma, p: sigma**2 * g,
    "no factor": lambda g, sigma, p: g,
    "the gradient of p": lambda g, sigma, p: sigma * p * g,
    "sign": lambda g, sigma, p: -sigma * g,
}
names = [list(programs)[i] for i in torch.randperm(5, generator=rng(61))]
clouds = {name: ddim(guided_by(programs[name]), start) for name in names}

fig, axes = plt.subplots(1, 5, figsize=(13, 2.9), sharex=True, sharey=True, layout="constrained")
for ax, letter, cloud in zip(axes, "ABCDE", clouds.values()):
    ax.scatter(*truth.T, s=2, color=COLOURS["noise"])
    ax.scatter(*cloud.T, s=2, color=COLOURS["guided"])
    ax.set(title=letter, xlim=(-4.2, 4.2), ylim=(-4.2, 4.2))
plt.show()

# %% [markdown]
# *Orange: five programs; grey, beneath: true samples of class 0.* **Vote:** which cloud is right? And which would pass if you had no grey dots?

# %%
guess_right = ...  # "A" to "E"

# %%
reveal(guess_right, "ABCDE"[names.index("right")])
now = torch.zeros(n, dtype=torch.float64)
distances = {}
for letter, (name, cloud) in zip("ABCDE", clouds.items()):
    distances[name] = energy_distance(cloud, truth)
    p = world.class_log_prob(cloud, now, path, 0).exp().mean()
    print(f"{letter}  {name:18}  mean p(y | x) {float(p):.3f}   energy distance to the truth {distances[name]:.4f}")
ten = [energy_distance(world.given(0).sample(n, rng(k))[0], truth) for k in range(9, 19)]
print(f"ten fresh samples of the truth are {min(ten):.4f} to {max(ten):.4f} away (n = {n})")

# %% tags=["nbval-check-output"]
p_bug = float(world.class_log_prob(clouds["no factor"], now, path, 0).exp().mean())
print("without the factor, p(y | x) =", f"{p_bug:.2f}", "and yet further away than any fresh sample:")
print(distances["no factor"] > max(ten), "; the right one is nearer:", distances["right"] < distances["no factor"])

# %% [markdown]
# Without $\sigma$ the classifier's term is $1/\sigma$ times too long: hardly at high noise, hugely at low noise, where it pushes each point deeper into its class. A, B and E put points where class 0 has none. C puts hardly any there: a classifier that reads its samples is *more* content than with real data, and without the grey dots the cloud looks tidy. But it leaves a good part of the right island empty. With pictures there are no grey dots to compare with; only the exact world (or a test, exercise 03.8) tells.
#
# **In the package** the same step acts on estimates of $x_0$: `classifier_guidance(denoiser, log_prob, scale, schedule)`.

# %% tags=["nbval-check-output", "skip-grading"]
from condiff_ref.guidance import classifier_guidance

a, sigma = abar[300].sqrt(), (1 - abar[300]).sqrt()
guided = classifier_guidance(world.denoiser(path), world.classifier(path, 0), 3.0, path)
mine = guided_eps(*exact_parts(xt, t), t, 3.0, abar)  # of section 3: 500 points at t = 300
print("condiff_ref agrees:", torch.allclose(guided(xt, t.double()), (xt - sigma * mine) / a))

# %% [markdown]
# ### How strong?
#
# **Predict:** turn $s$ up from 1 to 5. Class 0 has two islands, half of its points on each; one lies beside class 1. What share stays on that crowded island: 50, 20 or 2 per cent?

# %%
guess_crowded = ...

# %%
scales = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
rows, swept = [], {}
for s in scales:
    cloud = swept[s] = ddim(lambda x, t, s=s: guided_eps(*exact_parts(x, t), t, s, abar), start)
    p = world.class_log_prob(cloud, now, path, 0).exp()
    lonely = (cloud - world.means[0]).norm(dim=1) < (cloud - world.means[1]).norm(dim=1)
    spread = float(cloud[lonely].var(0).sum())
    rows.append((float(p.mean()), float((~lonely).double().mean()), spread, energy_distance(cloud, truth)))

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
adherence, crowded, spread, distance = zip(*rows)
left.plot(scales, adherence, "o-", color=COLOURS["guided"], label="adherence: mean p(y | x)")
left.plot(scales[2:], crowded[2:], "s-", color=COLOURS["conditional"], label="share on the crowded island (truth .5)")
left.plot(scales[2:], spread[2:], "^-", color=COLOURS["data"], label="spread of the lonely island (truth .185)")
left.set(xlabel="s"), left.legend(fontsize=7)
right.plot(scales, distance, "o-", color=COLOURS["guided"])
right.set(xlabel="s", yscale="log", title="energy distance to class 0")
plt.show()
reveal(guess_crowded, round(100 * crowded[scales.index(5.0)]), " %", close=3)

# %% [markdown]
# *Adherence is bought with diversity: beyond $s=1$ nearly every point is of the class, one island empties and the other shrinks. Of the scales tried, $s=1$ is nearest to class 0 (its spread is .16, not .185, for want of steps: .18 with 400).* For exact scores and an exact classifier, $s=1$ is Bayes and nothing else is. What is sampled at $s>1$ is *not* $p(x)\,p(y\mid x)^s$ either, whatever many texts say; lesson 04 is about that.

# %% [markdown]
# ## 5. In a random sampler: shift the mean
#
# DDPM's step draws $x_{t-1}$ from $\mathcal N(\mu,\Sigma)$, with $\Sigma=\beta_t$ or $\tilde\beta_t$ (times $I$). Condition it on $y$:
#
# $$p(x_{t-1}\mid x_t,y)=\frac{p_\theta(x_{t-1}\mid x_t)\;p_\phi(y\mid x_{t-1})}{Z}.\tag{4}$$
#
# (Given $x_{t-1}$, the label does not depend on $x_t$: noise knows nothing of $y$. With exact factors $Z=p(y\mid x_t)$.) To first order $\log p_\phi(y\mid x_{t-1})\approx\text{const}+(x_{t-1}-\mu)^\top g$ with $g$ taken at $\mu$; completing the square gives $\mathcal N(\mu+\Sigma g,\Sigma)$, and with a scale $\mu+s\,\Sigma g$.

# %% exercise="03.5"

# %% [markdown]
# A lecture prints (4) under the heading "at training", without $Z$ and with $p_\phi(y\mid x)$. But it is a statement about *sampling*, the classifier looks at the new state $x_{t-1}$, and without $Z$ the product is no density. In one dimension, with $\mathcal N(0.5,\,0.04)$ and a classifier $\Phi(2x)$ ($\Phi$: the normal distribution function):

# %% tags=["nbval-check-output"]
z = torch.linspace(-2, 3, 500_001)
product = torch.exp(-((z - 0.5) ** 2) / 0.08) / (2 * math.pi * 0.04) ** 0.5 * torch.special.ndtr(2 * z)
Z = torch.trapezoid(product, z)


def probit_grad(x):
    return 2 * torch.exp(-((2 * x) ** 2) / 2) / (2 * math.pi) ** 0.5 / torch.special.ndtr(2 * x)


mean, var = torch.tensor([[0.5]]), torch.tensor([0.04])
shifted = float(guided_mean(mean, var, probit_grad, mean, 1.0, at="mean"))
print(f"integral of the product {float(Z):.6f}, not 1")
print(f"exact mean {float(torch.trapezoid(z * product, z) / Z):.6f}, shifted mean {shifted:.6f}")

# %% [markdown]
# ### From the museum of real bugs: where is the gradient taken?
#
# Issue #51 of OpenAI's guided-diffusion: the derivation takes $g$ at $\mu$, the code (and the paper's Algorithm 1) at $x_t$. One of the authors called that a slight bug, and reported that the other way made no noticeable difference. **Which is better?** There is a third candidate: put $\tilde\epsilon$ of (2) into the formula of $\mu$. That shifts the mean by $\frac{\beta_t}{\sqrt{\alpha_t}}\,s\,g(x_t)$ instead of $s\,\Sigma g$.
#
# The exact world knows the true mean, $\mathbb E[x_{t-1}\mid x_t,y]$: it is DDPM's formula with $\mathbb E[\epsilon\mid x_t,y]$, because $q(x_{t-1}\mid x_t,x_0)$ has a mean that is linear in $x_0$. **Predict**, for large steps at $s=1$: which of the three is nearest to it, "eps", "xt" or "mean"?

# %%
guess_nearest = ...


# %%
def ddpm_mean_to(x, eps, t, u):
    """DDPM's mean for a step from t to any earlier u."""
    keep = abar[t] / abar[u]
    return (x - (1 - keep) / (1 - abar[t]).sqrt() * eps) / keep.sqrt()


def shift_errors(t, u, variance, count=300):
    """Error of three guided means, relative to the length of the true shift."""
    x0 = world.given(0).sample(count, rng(1))[0]
    x = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * torch.randn(count, 2, generator=rng(2))
    at_t, at_u = torch.full((count,), t), torch.full((count,), u)
    mean, true = (ddpm_mean_to(x, exact_eps(x, at_t, label=c), t, u) for c in (None, 0))
    var = 1 - abar[t] / abar[u]  # beta of this step
    if variance == "posterior":
        var = var * (1 - abar[u]) / (1 - abar[t])
    found = {
        "eps": ddpm_mean_to(x, guided_eps(*exact_parts(x, at_t), at_t, 1.0, abar), t, u),
        "xt": guided_mean(mean, var.expand(count), lambda z: exact_grad(z, at_t), x, 1.0),
        "mean": guided_mean(mean, var.expand(count), lambda z: exact_grad(z, at_u), x, 1.0, at="mean"),
    }
    return {k: float((m - true).norm(dim=1).mean() / (true - mean).norm(dim=1).mean()) for k, m in found.items()}


# %%
print("step          variance    " + "   ".join(f"{k:>8}" for k in ("eps", "xt", "mean")))
for t, u in ((500, 499), (500, 490), (500, 400), (200, 100), (1, 0)):
    for variance in ("beta", "posterior"):
        errors = shift_errors(t, u, variance)
        print(f"{t:4} -> {u:4}  {variance:>9}    " + "   ".join(f"{e:8.4f}" for e in errors.values()))
large = shift_errors(200, 100, "beta")
reveal(guess_nearest, min(large, key=large.get))

# %% tags=["nbval-check-output"]
print("substituting the guided eps gives the exact mean at s = 1:", large["eps"] < 1e-10)
print("halving a small step halves the gap of the shifted mean:", end=" ")
print(1.8 < shift_errors(500, 480, "beta")["xt"] / shift_errors(500, 490, "beta")["xt"] < 2.2)
beta_1 = 1 - abar[1]
print(f"at t = 1: eps form shifts by {float(beta_1 / (1 - beta_1).sqrt()):.9f} g, posterior variance by 0 g")

# %% [markdown]
# All agree to first order in the step. At $s=1$ the $\epsilon$-form is exact *for the mean*, however long the step (the law around it is Gaussian only for short steps). The two mean shifts are off by something proportional to the step, and neither place is better everywhere: $x_t$ with the classifier of time $t$, $\mu$ with the classifier of time $t-1$, each with its own error. With $\tilde\beta_1=0$ the last step is not guided at all. Dhariwal & Nichol use the mean shift for DDPM and the $\epsilon$-form for DDIM.
#
# ## 6. Why not any classifier?
#
# "Classifier guidance steers *any* pre-trained diffusion model", says a lecture. True, if you have a classifier *for the same noising process*. The Internet is full of classifiers of clean pictures. In the exact world we have the best one: $p(y\mid x_0)$, to be asked at $x_t/a$ so that the signal has its usual size.
#
# **Predict.** At noise $\tilde\sigma=6$, what is worse about the clean classifier's gradient: "direction" or "length"? And would its *accuracy* warn you: "yes" or "no"?

# %%
guess_worse = ...
guess_warns = ...

# %% exercise="03.6"


# %%
def clean_logits(x):
    return exact_logits(x, torch.zeros(len(x), dtype=torch.long))


n_points = 2000 if SMOKE else 4000
xs, ys = world.sample(n_points, rng(1))
noise = torch.randn(n_points, 2, generator=rng(2))


def compare_at(time):
    """accuracies over all points; cosine and length where both gradients are long enough to have a direction; the share
    of points at which the clean classifier is silent though the aware one is not."""
    a, t = abar[time].sqrt(), torch.full((n_points,), time)
    x = a * xs + (1 - abar[time]).sqrt() * noise
    _, _, right_aware, right_clean = compare_classifiers(exact_logits, clean_logits, x, t, ys, float(a))
    aware, clean = (
        classifier_grad(f, x, t, ys).norm(dim=1) > 1e-6 for f in (exact_logits, lambda x, t: clean_logits(x / a))
    )
    both = aware & clean
    cosine, length, _, _ = compare_classifiers(exact_logits, clean_logits, x[both], t[both], ys[both], float(a))
    return cosine, length, right_aware, right_clean, float((aware & ~clean).double().mean())


times = [6, 46, 148, 259, 397, 482, 604, 775]
tilde = [float(((1 - abar[time]) / abar[time]).sqrt()) for time in times]
results = [compare_at(time) for time in times]
print("sigma/a      cosine       length   accuracy aware / clean   clean one silent")
for ratio, (cosine, length, right_aware, right_clean, silent) in zip(tilde, results):
    print(f"{ratio:7.2f}   {cosine:9.3f}  {length:11.3g}   {right_aware:10.3f} / {right_clean:.3f}   {silent:14.2f}")

# %% tags=["nbval-check-output"]
six = results[times.index(604)]
print("accuracy within 0.03 up to sigma/a = 6:", all(abs(r[2] - r[3]) < 0.03 for r in results[:7]))
print("at sigma/a = 6: more than 100 times too long:", six[1] > 100, "; cosine above 0.3:", six[0] > 0.3)
reveal(guess_worse, "length")
reveal(guess_warns, "no")

# %% [markdown]
# The direction gets worse with noise, but stays better than chance. The length is absurd: where the clean classifier is sure, at a third of the points and more, it is silent although at this noise nobody can be sure; elsewhere it takes noise for signal and shouts. The accuracies are almost equal: whoever checks accuracy alone concludes that the clean classifier is fine.

# %%
grid = torch.cartesian_prod(torch.linspace(-3, 3, 15), torch.linspace(-3, 3, 15))


def draw_fields(time):
    time = int(time)
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    a, t, y = abar[time].sqrt(), torch.full((len(grid),), time), torch.zeros(len(grid), dtype=torch.long)
    fields = {
        "noise-aware": classifier_grad(exact_logits, grid, t, y),
        "clean, at x/a": classifier_grad(lambda x, t: clean_logits(x / a), grid, t, y),
    }
    unit = fields["noise-aware"].norm(dim=1).median()  # the same unit of length for both
    for ax, (name, field) in zip(figure.subplots(1, 2, sharex=True, sharey=True), fields.items()):
        colour = COLOURS["conditional"] if name == "noise-aware" else COLOURS["guided"]
        arrows = field / unit
        ax.scatter(*(a * xs + (1 - abar[time]).sqrt() * noise)[:400].T, s=2, color=COLOURS["noise"])
        ax.quiver(*grid.T, *arrows.T, color=colour, angles="xy", scale_units="xy", scale=3, width=0.004)
        median = float(arrows.norm(dim=1).median())
        ax.set(title=f"{name}: median length {median:.3g}", xlim=(-3.5, 3.5), ylim=(-3.5, 3.5))
    return figure


def describe_fields(time):
    cosine, length, *_ = results[times.index(int(time))]
    return (
        f"Gradients towards class 0 at t = {time:g}; lengths in units of the noise-aware median. "
        f"Over the data: cosine {cosine:.2f}, length ratio {length:.3g}."
    )


slider(draw_fields, times, "t", describe_fields, start=4)

# %% [markdown]
# *Both fields in the same unit of length: on the left arrows that one can see, on the right arrows that leave the frame. At low noise ($t=46$) the two look alike away from the data; upon the data the clean one is already too short (0.3).*
#
# ### Direction or length: the ablation
#
# Cut the gradients apart. Give the clean *direction* the true *length*, and the true direction the clean length. To be fair to the clean classifier we ask it at $x_t$, where its lengths are less absurd, and also as it should be asked, at $x_t/a$.


# %%
def clean_grad(x, t, rescaled):
    """log p(0 | x0) of the clean classifier, asked at x_t or at x_t / a: its gradient with respect to x_t."""
    a, at_zero = (abar[t].sqrt() if rescaled else torch.ones(len(x)))[:, None], torch.zeros_like(t)
    return exact_grad(x / a, at_zero) / a


def swap(direction, length):
    norm = direction.norm(dim=1, keepdim=True)
    return direction / norm.clamp(min=1e-300) * length.norm(dim=1, keepdim=True)


gradients = {
    "exact": exact_grad,
    "clean, asked at x_t": lambda x, t: clean_grad(x, t, False),
    "clean, asked at x_t / a": lambda x, t: clean_grad(x, t, True),
    "clean direction, true length": lambda x, t: swap(clean_grad(x, t, False), exact_grad(x, t)),
    "true direction, clean length": lambda x, t: swap(exact_grad(x, t), clean_grad(x, t, False)),
}
ended = {}
for name, gradient in gradients.items():
    cloud = ddim(lambda x, t, gradient=gradient: guided_eps(exact_eps(x, t), gradient(x, t), t, 1.0, abar), start)
    ended[name] = energy_distance(cloud, truth)
    support = float(world.log_prob(cloud, now, path, 0).mean())
    print(f"{name:30}  energy distance {ended[name]:10.3g}   mean log p(x | y) {support:10.3g}")

# %% tags=["nbval-check-output"]
direction, length = ended["clean direction, true length"], ended["true direction, clean length"]
print("wrong length costs over 5 times more than wrong direction:", length > 5 * direction)
print("asked at x_t / a, it throws samples off the map:", ended["clean, asked at x_t / a"] > 1e6)

# %% [markdown]
# A wrong direction of the right length does modest harm; the right direction at the clean classifier's length leaves the data. How far the rows without the true length go, and which of them is worse, depends on steps and schedule.
#
# ## 7. Through the denoiser, and several classifiers at once
#
# **A clean classifier behind a denoiser.** The network can clean the picture first: $\nabla_{x_t}\log p\big(y\mid\hat x_0(x_t)\big)$ with $\hat x_0=(x_t-\sigma\epsilon_\theta)/a$ (diffusion posterior sampling, Chung et al. 2023; universal guidance, Bansal et al. 2023). By the chain rule the gradient runs back *through the network*; stopping it at $\hat x_0$ is a bug that public code has had. It needs no second classifier, but puts $p(y\mid\mathbb E[x_0\mid x_t])$ in place of $\mathbb E[p(y\mid x_0)\mid x_t]$: probability of the mean for mean of the probability.

# %% exercise="03.7"

# %%
through = {}
chosen = torch.randperm(n_points, generator=rng(5))[:500]
print("sigma/a    cosine with the exact gradient    length, through x0_hat / exact (medians)")
for time, ratio in list(zip(times, tilde))[2:7]:
    t, a = torch.full((len(chosen),), time), abar[time].sqrt()
    x, y = a * xs[chosen] + (1 - abar[time]).sqrt() * noise[chosen], torch.zeros(len(chosen), dtype=torch.long)
    found, true = grad_through_x0hat(clean_logits, exact_eps, x, t, y, abar), exact_grad(x, t)
    both = (found.norm(dim=1) > 1e-6) & (true.norm(dim=1) > 1e-6)
    through[time] = float(F.cosine_similarity(found, true)[both].mean())
    length = float((found.norm(dim=1) / true.norm(dim=1))[both].median())
    print(f"{ratio:7.2f}   {through[time]:18.3f}   {length:24.3g}")

few = start[:400]
label0 = torch.zeros(len(few), dtype=torch.long)


def dps(x, t):
    return guided_eps(exact_eps(x, t), grad_through_x0hat(clean_logits, exact_eps, x, t, label0, abar), t, 1.0, abar)


ended["through x0_hat"] = energy_distance(ddim(dps, few), truth)
print(f"end to end: energy distance {ended['through x0_hat']:.3f}; exact gradient {ended['exact']:.4f}")

# %% tags=["nbval-check-output"]
ways = [ended[k] for k in ("exact", "through x0_hat", "clean, asked at x_t", "clean, asked at x_t / a")]
print("exact < through x0_hat < clean at x_t < clean at x_t / a:", ways == sorted(ways))

# %% [markdown]
# Far better than the bare clean classifier, at the price of a backward pass through the diffusion network; but biased: from $\tilde\sigma=1$ on, the direction is well off (mean cosines of .7 to .8) and the length 6 to 18 times too large.
#
# **Several properties at once.** Add the gradients: $\nabla\log p(x_t)+\nabla\log p(y_1\mid x_t)+\nabla\log p(y_2\mid x_t)$. By Bayes this is the score of $p(x_t\mid y_1,y_2)$ if $p(y_1,y_2\mid x_t)\propto p(y_1\mid x_t)\,p(y_2\mid x_t)$ as functions of $x_t$, in particular if the properties are conditionally independent **given $x_t$**.
#
# Four islands at $(\pm1,\pm1)$; property 1 is the side, property 2 the height. In clean data each is read off the picture, so *given $x_0$* they are as good as independent in any case. **Predict:** left-top and right-bottom are rare, 5 % each. Ask for left *and* top by a sum of two exact gradients. Do all samples land on that island?

# %%
guess_land = ...  # "yes" or "no"

# %%
corners = torch.tensor([[-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])


def four_islands(weights, labels):
    return GaussianMixture(torch.tensor(weights), corners, 0.09 * torch.eye(2).expand(4, 2, 2), torch.tensor(labels))


def left_and_top(weights):
    """Samples by the sum of two exact gradients, by the exact joint score, and true ones of island 0."""
    joint, side, height = (four_islands(weights, labels) for labels in ([0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 1, 1]))

    def predict(x, t):
        both = exact_grad(x, t, 0, side) + exact_grad(x, t, 0, height)
        return guided_eps(exact_eps(x, t, joint), both, t, 1.0, abar)

    exact = ddim(lambda x, t: exact_eps(x, t, joint, label=0), start)
    return ddim(predict, start), exact, joint.given(0).sample(n, rng(8))[0]


landed, same = {}, {}
for name, weights in (("independent", [0.06, 0.14, 0.24, 0.56]), ("dependent", [0.05, 0.45, 0.45, 0.05])):
    summed, exact, target = left_and_top(weights)
    landed[name] = float(((summed[:, 0] < 0) & (summed[:, 1] > 0)).double().mean())
    off = [energy_distance(cloud, target) for cloud in (summed, exact)]
    print(f"{name:12} sum: {landed[name]:.3f} on the island, energy distance {off[0]:.4f}; exact joint: {off[1]:.4f}")
    same[name] = torch.allclose(summed, exact)
reveal(guess_land, "yes" if landed["dependent"] > 0.99 else "no")

# %% tags=["nbval-check-output"]
print("independent properties: the sum is the exact joint:", same["independent"])
print("dependent ones: over 5 % of the samples miss the island:", landed["dependent"] < 0.95)

# %% [markdown]
# In the first world the coordinates are independent, at every noise level, and the sum is exact to rounding. In the second, properties that are independent given $x_0$ are *dependent* given $x_t$: noise hides the picture and leaves their correlation. The exact posterior needs a classifier for the pair. A sum is often a good start, and it is what class labels alone could not do at all: combine conditions that were never seen together.

# %% [markdown]
# ## 8. Digits
#
# Now networks: single precision, a noise-aware classifier that *you* train with your loss, and a diffusion network that has never seen a label (`digits-always`: its label was always hidden).

# %% tags=["skip-grading"]
torch.set_default_dtype(torch.float32)
table = abar.float()
net = TableNetwork(load("digits-always"), table)
shipped, blind = (TableNetwork(load(f"digits-{kind}"), table) for kind in ("classifier", "clean-classifier"))
judge = Judge.digits()
images, labels = data.digits("train")
held_out, held_out_labels = data.digits("test")
if SMOKE:
    held_out, held_out_labels = held_out[:60], held_out_labels[:60]
x0, new = net.encode(images), net.encode(held_out)


class Reader(nn.Module):
    """(x_t, integer t) -> logits: half a U-Net. GroupNorm, no BatchNorm."""

    def __init__(self, classes=10, width=64):
        super().__init__()
        self.width, self.mlp = width, nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.stem, self.block1 = nn.Conv2d(1, 16, 3, padding=1), ResBlock(16, 16, width)
        self.halve, self.block2 = nn.Conv2d(16, 32, 2, stride=2), ResBlock(32, 32, width)
        self.norm, self.head = group_norm(32), nn.Linear(32, classes)

    def forward(self, xt, t):
        emb = self.mlp(time_embedding(t / T, self.width))
        h = self.block2(self.halve(self.block1(self.stem(xt), emb)), emb)
        return self.head(F.silu(self.norm(h)).mean(dim=(2, 3)))


# %% tags=["nbval-ignore-output", "skip-grading"]
torch.manual_seed(0)
reader, gen, losses, begun = Reader(), rng(0), [], monotonic()
opt = torch.optim.AdamW(reader.parameters(), 3e-3)
seconds, least = (0, 15) if SMOKE else (25, 60)
while len(losses) < least or monotonic() - begun < seconds:
    done = (monotonic() - begun) / seconds if seconds else len(losses) / least
    opt.param_groups[0]["lr"] = 3e-3 * max(0.02, 1 - done)
    rows = torch.randint(len(x0), (64,), generator=gen)
    loss = noisy_ce_loss(reader, x0[rows], labels[rows], table, gen)
    opt.zero_grad()
    loss.backward()
    opt.step()
    losses.append(loss.item())
print(f"{len(losses)} steps, loss {sum(losses[-15:]) / 15:.2f}; knowing nothing: {math.log(10):.2f}")

# %% [markdown]
# **Predict:** in the exact world accuracy hid the clean classifier's failure. Networks on pictures: will the clean one read noisy digits as well as the noise-aware one, "yes" or "no"?

# %%
guess_reads = ...


# %% tags=["nbval-ignore-output", "skip-grading"]
def clean_reader(xt, t):
    return blind(xt / pad(table[t].sqrt(), xt), t)  # asked at x_t / a; it ignores t


readers = {"yours": reader, "noise-aware, shipped": shipped, "clean": clean_reader}
accuracy = {name: [] for name in readers}
lengths, digit_times = [], [10, 100, 200, 300, 400, 500, 700]
for at in digit_times:
    t = torch.full((len(new),), at)
    xt = table[at].sqrt() * new + (1 - table[at]).sqrt() * torch.randn(new.shape, generator=rng(at))
    for name, read in readers.items():
        with torch.no_grad():
            accuracy[name].append(float((read(xt, t).argmax(1) == held_out_labels).float().mean()))
    pair = [classifier_grad(readers[k], xt, t, held_out_labels).flatten(1) for k in ("noise-aware, shipped", "clean")]
    lengths.append(float((pair[1].norm(dim=1) / pair[0].norm(dim=1)).median()))

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for (name, values), colour in zip(accuracy.items(), (COLOURS["data"], COLOURS["conditional"], COLOURS["guided"])):
    left.plot(digit_times, values, "o-", color=colour, label=name)
left.axhline(0.1, color=COLOURS["noise"], ls=":")
left.set(xlabel="t", title=f"accuracy on {len(new)} noised held-out digits"), left.legend(fontsize=7)
right.plot(digit_times, lengths, "s-", color=COLOURS["guided"])
right.axhline(1, color=COLOURS["noise"], ls=":")
right.set(xlabel="t", yscale="log", title="length of the gradient, clean / noise-aware (median)")
plt.show()
reveal(guess_reads, "yes" if accuracy["clean"][3] > accuracy["noise-aware, shipped"][3] - 0.05 else "no")

# %% [markdown]
# *Left: the clean network falls behind at modest noise (it has never seen any; the Bayes-optimal clean classifier of section 6 handled noise gracefully). Right: its gradient is far too short at low noise and several times too long at high noise.*
#
# ### Guide the digits
#
# Judged by a classifier that was trained on *other* digits: class accuracy; the Fréchet distance to the training digits (pixels as features), beside its floor, real against real at the same $n$; and diversity within a class (real digits: 1).


# %% tags=["skip-grading"]
def draw_digits(gradient, s, count, steps):
    asked = torch.arange(10).repeat_interleave(count // 10)

    def predict(xt, t):
        with torch.no_grad():
            eps = net(xt, t)
        return guided_eps(eps, gradient(xt, t, asked), t, s, table) if s else eps

    noise = torch.randn(count, 1, 8, 8, generator=rng(3))
    return net.decode(ddim(predict, noise, steps, table)), asked


def by(classifier):
    return lambda xt, t, y: classifier_grad(classifier, xt, t, y)


def by_x0hat(xt, t, y):
    """The clean classifier behind the denoiser (it ignores t, so any t will do)."""
    return grad_through_x0hat(lambda x0: blind(x0, t), net, xt, t, y, table)


count, steps = (20, 4) if SMOKE else (200, 20)
plans = [("noise-aware", by(shipped), s) for s in ((0.0, 1.0, 4.0, 15.0) if SMOKE else (0.0, 1.0, 2.0, 4.0, 8.0, 15.0))]
plans += [("yours", by(reader), 4.0), ("clean", by(clean_reader), 1.0), ("clean", by(clean_reader), 4.0)]
plans += [("clean, x0_hat", by_x0hat, 1.0)]

# %% [markdown]
# **Predict:** guided by the noise-aware classifier at $s=1$, which is Bayes, what share of the samples will be read as asked: all, two thirds, or one in ten?

# %%
guess_share = ...  # "all", "two thirds" or "one in ten"

# %% tags=["nbval-ignore-output", "skip-grading"]
features = judge.features(images)
shuffled = features[torch.randperm(len(features), generator=rng(1))]
print(f"floor of the Frechet distance: {frechet_distance(shuffled[:count], shuffled[count:]):.2f} (n = {count})")
print(f"the judge reads real digits right: {judge.test_accuracy}")
made, told = {}, {}
for name, gradient, s in plans:
    pictures, asked = made[name, s] = draw_digits(gradient, s, count, steps)
    right = class_accuracy(judge, pictures, asked)
    read = judge.features(pictures)
    varied = diversity(read, asked, features, labels, draws=50, generator=rng(0))
    told[name, s] = right, varied
    print(f"{name:14} s = {s:4.1f}  accuracy {right}  FD {frechet_distance(read, features):5.2f}  diversity {varied}")
share = told["noise-aware", 1.0][0].value
reveal(guess_share, "all" if share > 0.9 else "two thirds" if share > 0.4 else "one in ten")

# %% tags=["nbval-ignore-output", "skip-grading"]
fig, axes = plt.subplots(2, 2, figsize=(9, 2.6), layout="constrained")
for ax, key in zip(axes.flat, [("noise-aware", 1.0), ("noise-aware", 4.0), ("noise-aware", 15.0), ("clean", 4.0)]):
    some = made[key][0].reshape(10, -1, 1, 8, 8)[:, :2].transpose(0, 1).flatten(0, 1)
    show_tile(ax, some, 10, f"{key[0]}, s = {key[1]:g}: asked for 0 to 9, twice")
plt.show()

# %% tags=["nbval-ignore-output", "skip-grading"]
looks = {"noise-aware": ("conditional", "o"), "yours": ("data", "D"), "clean": ("guided", "x")}
looks["clean, x0_hat"] = ("guided", "^")
plt.figure(figsize=(5.6, 3.4))
for (name, s), (right, varied) in told.items():
    colour, marker = looks[name]
    plt.errorbar(varied.value, right.value, color=COLOURS[colour], marker=marker, capsize=2,
                 xerr=[[varied.value - varied.low], [varied.high - varied.value]],
                 yerr=[[right.value - right.low], [right.high - right.value]])  # fmt: skip
    plt.annotate(f"{s:g}", (varied.value, right.value), fontsize=7, xytext=(4, -10), textcoords="offset points")
for name, (colour, marker) in looks.items():
    plt.plot([], [], color=COLOURS[colour], marker=marker, ls="", label=name)
plt.legend(fontsize=7, title="guided by (numbers: s)", title_fontsize=7, loc="lower left")
plt.axvline(1, color=COLOURS["noise"], ls=":")
plt.gca().set(xlabel="diversity within a class (real: 1)", ylabel="class accuracy", title="95 % intervals")
plt.show()

# %% [markdown]
# *The noise-aware classifier trades diversity for adherence as $s$ grows: .66, .91 and .99 are read as asked at $s=1$, 2 and 4. Its Fréchet distance stays at the floor (2.8) up to $s=2$, then rises, to 12 at $s=15$. The clean classifier stays below one half at both scales; behind the denoiser, at $s=1$, it gets to one half, at three times the floor.* (These are the numbers with 200 samples and 20 steps; the quick run has too few for any.)
#
# At $s=1$, where the exact world is perfect, one sample in three is not what was asked for. $s=1$ is Bayes only for exact scores *and* an exact classifier; learned ones err, and a larger $s$ makes up for some of it. Dhariwal & Nichol met this on ImageNet 256x256 (FID, lower is better):
#
# | their unconditional model | unguided | $s=1$ | $s=10$ |
# |---|---|---|---|
# | FID | 26.21 | **33.03** | 12.00 |
#
# At scale 1 their classifier gave the samples about 50 % probability, so they turned it up. (Their well-known corgis show scale 1.0 and 10.0; slides that label them 1 and 3 probably mixed them up with GLIDE's panda, shown unguided and at 3.0.)
#
# A classifier may also guide a network that is already conditional; then their scale 1 aims at $p(x\mid y)\,p(y\mid x)$, which by (1) is $s=2$ in our letters. Their best ImageNet models do that: at 256x256 FID 4.59 at scale 1 with 250 steps, 5.44 at scale 2.5 with 25 DDIM steps; 3.85 at 512x512 with upsampling; their figures sweep 0.0 to 5.5. Their code's scales for 128, 256 and 512 pixels are 0.5, 1 and 4: $s=1.5$, 2 and 5 in our letters.
#
# "Typical scales 5 to 15" is a habit of text-to-image models (Stable Diffusion: 7.5); for class-conditional ones the best FID is often found barely above 1 (lesson 04).

# %% [markdown]
# ## 9. What it costs
#
# **Predict:** count in units of one forward pass of the diffusion network, and let a forward pass of the classifier cost $c$. Guidance with a classifier costs $1+kc$ per step. What is $k$ for your `classifier_grad`: 1, 2 or 3?

# %%
guess_k = ...


# %% tags=["nbval-check-output", "skip-grading"]
def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


one, t1, y1 = torch.randn(1, 1, 8, 8, generator=rng(1)), torch.tensor([300]), torch.tensor([3])


def counted(x, t):
    return shipped(1 * x, t)  # torch's counter cannot follow a leaf into a module


def whole_backward():
    F.cross_entropy(counted(one.clone().requires_grad_(), t1), y1).backward()


shipped.requires_grad_(False)  # as in sampling: only the gradient for x is wanted
forward, inputs_only = flops(lambda: counted(one, t1)), flops(lambda: classifier_grad(counted, one, t1, y1))
shipped.requires_grad_(True)
everything = flops(whole_backward)
c = forward / flops(lambda: net(one, t1))
print(f"classifier / network: c = {c:.2f}; k = {inputs_only / forward:.1f}, with weights {everything / forward:.1f}")
print(f"per step: classifier guidance {1 + inputs_only / forward * c:.2f}, classifier-free guidance 2.00")
reveal(guess_k, round(inputs_only / forward), close=0)

# %% [markdown]
# A backward pass to the input costs about one more forward pass, so $1+2c$; a `.backward()` that also fills the weights' gradients, which nobody needs, $1+3c$. Classifier-free guidance (lesson 04) runs the large network twice: 2. With $c=0.2$ that is 1.4 against 2, so "classifier guidance is slow" and "needs two large networks" are wrong as general statements: small classifiers suffice (Ho & Salimans 2022 name the sampling speed as a *disadvantage* of their own method). What it does cost: a second training run, on noised pictures, for each kind of condition; a fixed set of labels; and a gradient that can be fooled, as gradients of classifiers can.
#
# "For text there is no classifier $p(y\mid x)$", says a lecture. There is: a model that scores how well text and picture match, trained on noised pictures. GLIDE (Nichol et al. 2022) guides with the gradient of a noised CLIP's score, and compares it with classifier-free guidance (which people preferred). Any differentiable $\log p(y\mid x_t)$ will do: a label, a caption, a measurement, a segmentation.
#
# **Wire it.** Text-to-image by classifier guidance alone, with no label and no caption inside the diffusion model. Two models are trained. Fill in, with words from this list: *picture, noisy picture, time, text, noise, score of the match*. Inputs in this order, joined by commas.

# %%
guess_diffusion_in, guess_diffusion_out = ..., ...
guess_matcher_in, guess_matcher_out, guess_differentiate_by = ..., ..., ...

# %%
wiring = {
    "the diffusion model takes": (guess_diffusion_in, "noisy picture, time"),
    "and answers with": (guess_diffusion_out, "noise"),
    "the matching model takes": (guess_matcher_in, "noisy picture, time, text"),
    "and answers with the": (guess_matcher_out, "score of the match"),
    "whose gradient is taken by the": (guess_differentiate_by, "noisy picture"),
}
for part, (guess, answer) in wiring.items():
    print(part, end=": ")
    reveal(guess, answer)

# %% [markdown]
# No text reaches the diffusion model, and the matching model is trained on pictures noised by the same schedule: a score of clean pictures is section 6's clean classifier once more.
#
# ## 10. Write the test
#
# Section 4's cloud C came from a wrong formula, and a classifier read every point as asked. Write the test that refuses it: a property that only the right `guide(eps, grad, t, s, abar)` has. Your test meets the right function and several wrong ones, without knowing which is which.

# %% exercise="03.8"

# %% [markdown]
# ## 11. What to keep
#
# - $\nabla\log p(x_t\mid y)=\nabla\log p(x_t)+\nabla\log p(y\mid x_t)$: an identity, for the posterior of the *noised* pair.
# - In noise units: *minus*, times $\sqrt{1-\bar\alpha_t}$. Without the factor every sample is classified as asked, and the distribution is wrong.
# - Cross-entropy on noised pictures learns that posterior. A clean classifier fails mainly by the *length* of its gradient, and its accuracy need not show it.
# - $s=1$ is Bayes for exact parts; larger $s$ buys adherence with diversity, and makes up for some of what networks get wrong.
# - Gradients of several classifiers may be added if the properties are conditionally independent given $x_t$.
#
# ## Questions
#
# 1. Explain to a friend how guidance works, without a formula but one word: why is the *score* the thing to guide?
# ### BEGIN SOLUTION
# *Each denoising step moves towards more probable pictures; guidance adds a nudge towards pictures that the classifier finds more typical of the class. Logarithms turn Bayes' product into a sum, and the gradient removes the normaliser, so for scores, and only for them, conditioning is an addition to a model that stays as it was.*
# ### END SOLUTION
# 2. Write down Bayes' decomposition of the conditional score. What does each term mean, and which one is missing?
# ### BEGIN SOLUTION
# *$\nabla\log p(x_t\mid y)=\nabla\log p(x_t)+\nabla\log p(y\mid x_t)$: towards pictures of $y$ = towards pictures + towards what shows $y$ more clearly. $\nabla\log p(y)=0$ is missing, because $p(y)$ does not depend on $x_t$.*
# ### END SOLUTION
# 3. What do you sample at $s=0$ and at $s=1$? Which of the two answers needs conditions?
# ### BEGIN SOLUTION
# *$s=0$: unconditional samples; the classifier is not used, so whatever it says is harmless. $s=1$: samples of $p(x\mid y)$, if score and classifier are exact; with networks, see section 8.*
# ### END SOLUTION
# 4. You are to build text-to-image with classifier guidance. Which two models do you train, with which inputs and outputs?
# ### BEGIN SOLUTION
# *An unconditional diffusion model $(x_t,t)\mapsto\epsilon$, and a text-image matching model $(x_t,t,\text{text})\mapsto$ score, contrastive as CLIP but trained on pictures noised by the same schedule. The gradient of the score with respect to $x_t$ is the guidance. "No classifier exists for text" is wrong: GLIDE guided with just such a model, a CLIP of noised pictures.*
# ### END SOLUTION
# 5. Why is the classifier hard to get, and which data must it see?
# ### BEGIN SOLUTION
# *It must be right, and rightly unsure, at every noise level of this very schedule: pairs $(x_t,y)$ with $t$ of all sizes, and $t$ as an input. One from the shelf has seen clean pictures only: at $\tilde\sigma\approx6$ the length of its gradient is wrong by a factor of about a thousand, in this lesson's world, even if it is Bayes-optimal on clean pictures.*
# ### END SOLUTION
# 6. A colleague's guided samples are classified correctly 100 % of the time. Is the implementation right?
# ### BEGIN SOLUTION
# *Nobody can tell from that. Real data of class 0 have a mean $p(y\mid x)$ of .97 here; 1.000 came from the program without $\sigma$. Compare distributions, or test the formula.*
# ### END SOLUTION
#
# **Sources.** Sohl-Dickstein et al. 2015 (perturbing the reverse step); Song et al. 2021; Dhariwal & Nichol 2021 (sections 4.1, 4.2; Algorithms 1 and 2); Ho & Salimans 2022; Nichol et al. 2022 (GLIDE); Chung et al. 2023 (DPS); Bansal et al. 2023; guided-diffusion, issue 51.
