# %% [markdown]
# # 04 · Classifier-free guidance
#
# **Question.** One line of code, `eps_u + s * (eps_c - eps_u)`, is in nearly every image generator. Where does it come from, and *what does it sample*?
#
# **You need** lessons 01 (score, DDIM), 02 (label dropout) and 03 (classifier guidance). No GPU, no download.
#
# **You build** guidance in every convention, closed forms for what it samples, an exact sampler for what it is *said* to sample, and the usual remedies, each first where the answer is known. It is long: a good place for a break is after section 6.
#
# | letter | meaning |
# |---|---|
# | $x_0,\epsilon,\ x_t=a\,x_0+\sigma\,\epsilon$ | data, noise, their mixture; $a=\sqrt{\bar\alpha_t}$ (`alpha` in docstrings), $\sigma=\sqrt{1-\bar\alpha_t}$, `abar[0] = 1` |
# | $\epsilon_c,\ \epsilon_u$ | the prediction with the label, and without (the network's *null* label) |
# | $s$ | guidance scale: 0 unconditional, 1 conditional, above 1 guided |
# | tilt | the density proportional to $p(x)\,p(y\mid x)^s$, for $x=x_0$: clean data |

# %% tags=["setup"]

# %%
import time
from functools import cache
from itertools import pairwise

import numpy

from condiff_ref import data
from condiff_ref.checkpoints import TableNetwork, load
from condiff_ref.intervals import share
from condiff_ref.judge import Judge
from condiff_ref.metrics import class_accuracy, energy_distance, frechet_distance, precision_recall
from condiff_ref.mixture import GaussianMixture, GridDensity, archipelago, line2
from condiff_ref.schedules import discrete
from condiff_ref.shapes import pad
from condiff_ref.viz import COLOURS, show_tile
from condiff_ref.widgets import slider
from matplotlib.figure import Figure

T = 1000
abar = torch.cos(math.pi / 2 * torch.linspace(0, 1, T + 1, dtype=torch.float64)) ** 2  # the cosine table
path = discrete(abar)
world = archipelago()
CLASS = 0  # two islands of equal weight: a lonely one at (-2, 1), a crowded one at (1.1, 1), beside class 1


def rng(seed=0):
    return Generator().manual_seed(seed)


def scales(t):
    return float(abar[t]) ** 0.5, float(1 - abar[t]) ** 0.5


# %% [markdown]
# Tools for the whole lesson: the exact $\epsilon^*$ of a world, a sampler, and how well samples obey. The sampler starts at $t=999$: at 1000 the cosine table has $a=0$, by which it would divide.


# %%
def ask(x, t, label=None, world=world):
    """E[eps | x_t], or E[eps | x_t, y = label], in closed form, at one integer t."""
    time_ = torch.full((len(x),), float(t), dtype=x.dtype)
    return -scales(t)[1] * world.score(x, time_, path, label)


@torch.no_grad()
def travel(field, x, steps, gen=None):
    """From noise x to data along field(x, t) -> eps: DDIM; with gen DDPM, that is with fresh noise in each step."""
    times = torch.linspace(T - 1, 0, steps + 1).round().long().tolist()
    for t, after in pairwise(times):
        (a, sigma), (b, rest) = scales(t), scales(after)
        eps = field(x, t)
        std = 0.0 if gen is None else rest / sigma * (1 - (a / b) ** 2) ** 0.5
        x = b * (x - sigma * eps) / a + (rest**2 - std**2) ** 0.5 * eps
        if std:
            x = x + std * torch.randn(x.shape, generator=gen, dtype=x.dtype)
    return x


def obeys(x):
    """Mean p(y = CLASS | x0) of samples, by the exact world."""
    zero = torch.zeros(len(x), dtype=torch.float64)
    return float(world.class_log_prob(x.double(), zero, path, CLASS).exp().mean())


n, steps = (300, 40) if SMOKE else (2000, 150)
noise = torch.randn(n, 2, generator=rng(1), dtype=torch.float64)

# %% [markdown]
# ## 1. The classifier that nobody trained
#
# Bayes at noise level $t$, as in lesson 03: $\log p_t(x\mid y)=\log p_t(x)+\log p(y\mid x_t)-\log p(y)$. The gradient loses the last term, so
#
# $$\nabla\log p(y\mid x_t)=\nabla\log p_t(x\mid y)-\nabla\log p_t(x)=-\frac1\sigma\,(\epsilon_c-\epsilon_u).\tag{1}$$
#
# Such a model *contains* a classifier. Put (1) into classifier guidance, $\tilde\epsilon=\epsilon_u-s\,\sigma\,\nabla\log p(y\mid x_t)$, and $\sigma$ cancels:
#
# $$\tilde\epsilon=\epsilon_u+s\,(\epsilon_c-\epsilon_u).\tag{2}$$
#
# This is classifier-free guidance, **CFG** (Ho & Salimans 2022). Between 0 and 1 it interpolates between the two predictions, beyond 1 it extrapolates (some notes say "extrapolation between"). Some slides write "$\nabla\log p(y\mid x)\propto\epsilon_c-\epsilon_u$" and *add* the gradient: two signs that cancel. (1) is an equality; its factor $-1/\sigma$ is negative and changes with $t$ ($-1.414$ at $\bar\alpha=\tfrac12$).

# %% exercise="04.1"

# %% [markdown]
# Is (2) *equal* to guidance by the true noisy classifier? The exact world has its scores, and $p(y\mid x_t)$ to differentiate with autograd.

# %% tags=["nbval-check-output"]
worst = 0.0
for t in (50, 300, 500, 700, 950):
    x = (1.5 * noise[:100]).requires_grad_()
    times = torch.full((100,), float(t), dtype=torch.float64)
    gradient = torch.autograd.grad(world.class_log_prob(x, times, path, CLASS).sum(), x)[0]
    x, sigma = x.detach(), scales(t)[1]
    by_classifier = ask(x, t) - 3 * sigma * gradient
    without = cfg(ask(x, t, CLASS), ask(x, t), 3.0)
    worst = max(worst, float((by_classifier - without).abs().max()))
    if t == 500:
        ratio = gradient / (ask(x, t, CLASS) - ask(x, t))
        print(f"grad log p(y | x) over (eps_c - eps_u), at abar = 1/2: {float(ratio.median()):.9f}")
print("classifier guidance = CFG, to 1e-12:", worst < 1e-12)

# %% [markdown]
# So CFG is guidance by a perfect noise-aware classifier, *if* both predictions are perfect; in practice their errors differ.
#
# **What tempering means.** $s\,\nabla\log p(y\mid x)=\nabla\log p(y\mid x)^s$: the likelihood is raised to the power $s$, so its *energy* $-\log p(y\mid x)$ is multiplied by $s$ (some slides raise the energy itself). At $p(y\mid x)=.5$ the energy is 0.693; at $s=2$ it is 1.386, not $0.693^2=0.480$. The prior keeps its power 1. And the likelihood is, up to a constant, the model's own $p(x\mid y)/p(x)$: no separate model such as CLIP is involved.

# %% tags=["nbval-check-output"]
p = 0.5
print(f"energy {-math.log(p):.6f}, of p^2 {-math.log(p**2):.6f}; the energy squared {math.log(p) ** 2:.6f}")

# %% [markdown]
# ## 2. One network, two answers
#
# Training is lesson 02: DDPM's loss, with $y$ replaced by null with probability $p_\text{uncond}$, one coin per example. Sampling asks twice per step, usually as *one batch of 2B* instead of two of B.

# %% exercise="04.3"


# %%
class Perfect(nn.Module):
    """The exact world as a network: integer t (B,), labels 0, 1, 2, or 3 for none."""

    null = 3

    def forward(self, xt, t, y):
        eps = torch.empty_like(xt)
        for label in y.unique().tolist():
            rows = y == label
            score = world.score(xt[rows], t[rows].double(), path, None if label == self.null else label)
            eps[rows] = -(1 - abar[t[rows]]).sqrt()[:, None] * score
        return eps


# %% [markdown]
# ### From the museum of real bugs: three channels of four
#
# The reference code of a well-known diffusion transformer guides `out[:, :3]` of its latents, which have *four* channels; a comment says that this is kept for exact reproducibility. Channel 4 follows the conditional prediction: nothing crashes, nothing looks wrong. The test: *every* channel of the result has to differ from the unguided one.

# %% tags=["nbval-check-output"]
eps_c, eps_u = torch.randn(2, 5, 4, 8, 8, generator=rng(2))


def three_of_four(eps_c, eps_u, s):
    return torch.cat([cfg(eps_c[:, :3], eps_u[:, :3], s), eps_c[:, 3:]], dim=1)


for name, rule in (("yours", cfg), ("theirs", three_of_four)):
    change = (rule(eps_c, eps_u, 4.0) - eps_c).abs().amax(dim=(0, 2, 3)) > 0
    print(f"{name}: guided channels {change.tolist()}")

# %% [markdown]
# ### How often to hide the label
#
# **Predict before you run.** With $p_\text{uncond}=0$ the label is *never* hidden. Which sampling fails: $s=1$, $s=3$, both or neither?

# %%
guess_never = ...  # "s=1", "s=3", "both" or "neither"


# %%
class SmallNet(nn.Module):
    """(x_t (B, 2), integer t, label) -> eps, for points in the plane. Label 3 is null."""

    def __init__(self, width=96):
        super().__init__()
        self.label = nn.Embedding(4, 16)
        hidden = [nn.Linear(2 + 12 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, xt, t, y):
        waves = (t / T)[:, None] * math.pi / 2 * 2.0 ** torch.arange(6)
        return self.layers(torch.cat([xt, waves.sin(), waves.cos(), self.label(y)], dim=1))


def train(p, steps, batch=256, seed=0):
    """DDPM's loss with dropped labels; the learning rate falls to zero."""
    torch.manual_seed(seed)
    net, gen = SmallNet(), rng(seed)
    opt, table = torch.optim.Adam(net.parameters(), 5e-3), abar.float()[:, None]
    points, labels = world.sample(batch * steps, gen)
    for step, (x0, y) in enumerate(zip(points.float().split(batch), labels.split(batch))):
        opt.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        t, eps = torch.randint(1, T, (batch,), generator=gen), torch.randn(batch, 2, generator=gen)
        y = torch.where(torch.rand(batch, generator=gen) < p, 3, y)
        loss = F.mse_loss(net(table[t].sqrt() * x0 + (1 - table[t]).sqrt() * eps, t, y), eps)
        opt.zero_grad(), loss.backward(), opt.step()
    return net.eval()


# %% tags=["nbval-ignore-output", "skip-grading"]
def by_net(net, s):
    return lambda x, t: cfg_forward(net, x, torch.full((len(x),), t), torch.full((len(x),), CLASS), 3, s)


print("p_uncond    s = 1    s = 3     (mean p(y | x0) of the samples; the data have 0.97)")
shares = {}
for p in (0.0, 0.1, 1.0):
    net = train(p, 40 if SMOKE else 1800)
    for s in (1.0, 3.0):
        shares[p, s] = obeys(travel(by_net(net, s), noise[:1000].float(), 10 if SMOKE else 40))
    print(f"{p:8.1f} {shares[p, 1.0]:8.3f} {shares[p, 3.0]:8.3f}")
reveal(guess_never, "s=3" if shares[0.0, 3.0] < shares[0.0, 1.0] - 0.1 else "neither")

# %% [markdown]
# (The quick run trains too briefly to show it.) At $p_\text{uncond}=0$ the null embedding is still the random vector it began as: $s=1$ gives it the weight 0, $s=3$ extrapolates away from nonsense. At $p_\text{uncond}=1$ the labels were never seen, and both scales fail.
#
# **Choose $p_\text{uncond}$ yourself**, for $s=3$, and validate the choice: how far are the guided samples of a network trained with it from those of the exact predictions, guided alike? **Predict** which of 0, 0.1, 0.3 and 0.9 comes nearest. (Whatever is at most three times as far as the best counts as right: one training run for each says no more.)

# %%
guess_share = ...


# %% tags=["nbval-ignore-output", "skip-grading"]
def exactly(x, t):
    return cfg(ask(x, t, CLASS), ask(x, t), 3.0)


def but_for_the_first_step(field):
    return lambda x, t: exactly(x.double(), t).float() if t == T - 1 else field(x, t)


fresh, few = torch.randn(1000, 2, generator=rng(21), dtype=torch.float64), 10 if SMOKE else 40
aim, again = (travel(exactly, z, few) for z in (noise[:1000], fresh))
curve = {}
for p in (0.0, 0.1, 0.3, 0.9):
    field = by_net(train(p, 40 if SMOKE else 1200, seed=1), 3.0)
    whole, curve[p] = (
        energy_distance(travel(f, fresh.float(), few).double(), aim) for f in (field, but_for_the_first_step(field))
    )
    print(f"p_uncond = {p:g}: distance {curve[p]:.3f}; with the first step by the network, too, {whole:.1f}")
print(f"two runs of the exact predictions: {energy_distance(again, aim):.3f}")
nearest = min(curve, key=curve.get)
reveal(guess_share, guess_share if curve.get(guess_share, math.inf) < 3 * curve[nearest] else nearest)

# %% [markdown]
# At 0 the null prediction is nonsense, at 0.9 the conditional one has seen a tenth of the training; in between there is little to choose (the full run: 3.5, 0.07, 0.03 and 0.22; with two other seeds 0.1 and 0.3 are at 0.04 and 0.02, 0.06 and 0.06). The first step is exact for all, because at $t=999$ of this table the error of $\hat x_0$ is that of $\epsilon$ divided by $a=0.0016$, which drowns the rest: the last column.
#
# Now three networks for digits:

# %% tags=["nbval-ignore-output", "skip-grading"]
table = torch.cat([torch.ones(1), (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0).float()])
judge = Judge.digits()
net = TableNetwork(load("digits-unet"), table).to(device)


@torch.no_grad()
def draw(rule, y, steps=8 if SMOKE else 15, seed=0, side=8, to_x0=None):
    """Digits along rule(x, t, y) -> eps, by DDIM, not yet decoded. All draws of a seed start from the same noise."""
    x = torch.randn(len(y), 1, side, side, generator=rng(seed)).to(device)
    times = torch.linspace(T, 0, steps + 1).round().long().to(device)
    bars = table.to(device)
    for t, after in pairwise(times):
        eps = rule(x, t.expand(len(y)), y)
        x0 = (x - (1 - bars[t]).sqrt() * eps) / bars[t].sqrt()
        x0 = to_x0(x0) if to_x0 else x0
        eps = (x - bars[t].sqrt() * x0) / (1 - bars[t]).sqrt()
        x = bars[after].sqrt() * x0 + (1 - bars[after]).sqrt() * eps
    return x


def guide_with(net, s):
    return net if s == 1 else lambda x, t, y: cfg_forward(net, x, t, y, net.null, s)  # s = 1: one pass is enough


m = 50 if SMOKE else 400
digits_asked = torch.arange(10).repeat_interleave(m // 10).to(device)
images, labels = data.digits("train")
rows = torch.stack([torch.where(labels == c)[0][: m // 5] for c in range(10)])
real, more = (judge.features(images[half.flatten()]) for half in rows.chunk(2, dim=1))  # m real digits, and m others

# %% tags=["nbval-ignore-output", "skip-grading"]
for name, p in (("digits-never", 0), ("digits-unet", 0.1), ("digits-always", 1)):
    other = TableNetwork(load(name), table).to(device)
    for s in (1.0, 3.0):
        some = digits_asked[::2]
        made = other.decode(draw(guide_with(other, s), some))
        distance = frechet_distance(judge.features(made), real[::2])
        right = class_accuracy(judge, made, some)
        print(f"p_uncond = {p}, s = {s}: read as asked {right}, Frechet distance {distance:.1f}")
    null = judge.classify(other.decode(draw(guide_with(other, 0.0), digits_asked[::2])))
    print("    without a label, digits 0 to 9 come out so often:", null.bincount(minlength=10).tolist())

# %% [markdown]
# *On digits the failure hides: at $p_\text{uncond}=0$, $s=3$ every digit is still read as asked, but the distance to real digits is more than twice that of the network trained with 0.1. Its null label draws mostly ones and fours, and guidance pushes away from those.* So to choose $p_\text{uncond}$, train a few, sweep $s$ for each, and compare adherence **and** distance on held-out data. Ho & Salimans tried 0.1, 0.2 and 0.5, found the first two about equal and 0.5 worse.
#
# Is guidance impossible without dropout? No: the unconditional score can be put together from the conditional ones (take the gradient of $\log p_t=\log\sum_c p(c)\,p_t(x\mid c)$):
#
# $$\nabla\log p_t(x)=\sum_c p(c\mid x_t)\,\nabla\log p_t(x\mid c).\tag{3}$$
#
# It takes one pass per class and the noisy posterior $p(c\mid x_t)$. A second, unconditional model works too, or fine-tuning with dropout. Feeding a *random* label instead (Sadat et al. 2024, ICG) comes close only at high noise: here it is off by 18 % of $\epsilon_u$ at $t=900$, by 185 % at 500 (root mean squares).

# %% tags=["nbval-check-output"]
x, times = noise[:200], torch.full((200,), 400.0, dtype=torch.float64)
together = sum(
    world.class_log_prob(x, times, path, c).exp()[:, None] * world.score(x, times, path, c) for c in range(3)
)
print("(3) holds to 1e-12:", float((together - world.score(x, times, path)).abs().max()) < 1e-12)

# %% [markdown]
# ## 3. One rule, many spellings
#
# Does it matter whether the network predicts $\epsilon$, $x_0$, $v$, the score or a velocity $\dot a\,x_0+\dot\sigma\,\epsilon$? Given $x_t$ and $t$, each is $A\epsilon+Bx_t$ for some numbers $A,B$. The weights $s$ and $1-s$ of (2) sum to one, so $Bx_t$ survives intact:

# %% tags=["nbval-check-output"]
t = 400
(a, sigma), x = scales(t), noise[:50]
e_c, e_u = ask(x, t, CLASS), ask(x, t)
kinds = {
    "x0": lambda e: (x - sigma * e) / a,
    "v": lambda e: a * e - sigma * (x - sigma * e) / a,
    "score": lambda e: -e / sigma,
    "velocity": lambda e: -0.7 * (x - sigma * e) / a + 0.9 * e,  # whatever the path's rates are
}
for kind, to in kinds.items():
    print(f"guiding in {kind} is guiding in eps:", torch.allclose(cfg(to(e_c), to(e_u), 3.0), to(cfg(e_c, e_u, 3.0))))

# %% [markdown]
# What does **not** survive a change of kind: weights that do not sum to one, clipping (before guidance or after it?), rescaling by standard deviations, and projections (section 8). Two examples: a rule that forgot $\epsilon_u$, with weights $s,-s$, and clipping.

# %% tags=["nbval-check-output"]
a, sigma, x, e_c, e_u, s = 0.6, 0.8, 1.0, -0.25, 0.5, 3.0
x_c, x_u = (x - sigma * e_c) / a, (x - sigma * e_u) / a
converted = (x - sigma * s * (e_c - e_u)) / a
print(f"a = .6, sigma = .8, weights (3, -3): in x0 {s * (x_c - x_u):.6f}, in eps and then converted {converted:.6f}")
x_c, x_u = torch.tensor(1.5), torch.tensor(0.0)
after, before = cfg(x_c, x_u, 2.0).clamp(-1, 1), cfg(x_c.clamp(-1, 1), x_u.clamp(-1, 1), 2.0)
print(f"pixels in [-1, 1], x_c = 1.5, x_u = 0, s = 2: clipped after guidance {after:g}, before it {before:g}")

# %% [markdown]
# **The Rosetta stone.** The same letter means different things in different places, sometimes on neighbouring slides.
#
# | where | rule | in units of $s$ |
# |---|---|---|
# | this course, diffusers' `guidance_scale`, DiT's `cfg_scale`, Imagen's $w$, some lectures' $\gamma$ | $\epsilon_u+s(\epsilon_c-\epsilon_u)$ | $s$ |
# | flow-matching lectures' $w$ ($t=1$ is data there) | $(1-w)\,u(x)+w\,u(x\mid y)$ | $w$ |
# | Ho & Salimans' $w$; a lecture's $\omega$ for CFG | $(1+w)\epsilon_c-w\,\epsilon_u$ | $1+w$ |
# | the same lecture's $\omega$ for classifier guidance; Dhariwal & Nichol on an *unconditional* model | $\epsilon_u-\omega\sigma\nabla\log p(y\mid x_t)$ | $\omega$ |
# | Dhariwal & Nichol on a *conditional* model (their best runs) | $\epsilon_c-\omega\sigma\nabla\log p(y\mid x_t)$ | $1+\omega$ |
# | the scale that diffusers embeds into distilled (LCM) models | `guidance_scale - 1` | $1+w$ |
# | guidance-free training's $\beta$ (Chen et al. 2025) | the network is told $\beta$ | $1/\beta$ |
# | CFG++'s $\lambda$ (Chung et al. 2024) | $\hat x_0$ guided with $\lambda$, re-noised with $\epsilon_u$ | $\lambda\,\tilde\sigma_i/(\tilde\sigma_i-\tilde\sigma_{i+1})$, $\tilde\sigma=\sigma/a$ |
#
# Time has two directions, too: Stable Diffusion 3 runs as we do (0 data, 1 noise), with target $\epsilon-x_0$.

# %% exercise="04.2"

# %% tags=["nbval-check-output"]
print("the paper's w = 3 is s =", convert_scale(3.0, "w", "s"), "and s = 7.5 is w =", convert_scale(7.5, "s", "w"))
e_u, e_c = torch.tensor(0.5), torch.tensor(-0.25)
print(f"eps_u = .5, eps_c = -.25: scale 3 gives {cfg(e_c, e_u, 3.0):g}, (1 + 3) eps_c - 3 eps_u {4 * e_c - 3 * e_u:g}")
for count in (50, 500):
    now, after = (math.tan(math.pi / 2 * u) for u in (0.5, 0.5 - 1 / count))  # sigma / a, half-way
    print(f"CFG++ with lambda = 0.6 in {count} steps: s = {convert_scale(0.6, 'lambda', 's', now, after):.1f} half-way")

# %% [markdown]
# $\lambda$ is a strength *per step*: it looks tame, below 1, and ten times as many steps guide ten times as strongly.
#
# ## 4. Turning the dial
#
# First the exact world. Class 0 has two islands with half its points each. The contours show the **tilt** $p(x)\,p(y\mid x)^s$, which CFG is often said to sample. **Predict before you run:** at $s=1$ half of the samples are on the crowded island. How many per cent are at $s=5$: 75, 50, 25 or 2?

# %%
guess_cfg = ...


# %%
def guided(s, world=world):
    return lambda x, t: cfg(ask(x, t, CLASS, world), ask(x, t, None, world), s)


@cache
def tilt(s):
    return world.tilted(CLASS, float(s), points=221)


def contours(ax, s, levels=(-5, -3.5, -2, -0.5), colour="data", lines="solid"):
    (across, up), height = tilt(s).points.T.reshape(2, 221, 221), tilt(s).log_density().reshape(221, 221)
    ax.contour(across, up, height - height.max(), levels, colors=COLOURS[colour], linewidths=0.7, linestyles=lines)


def show(ax, x, s, title):
    """Samples x, and contours of the tilt at scale s."""
    contours(ax, s)
    ax.scatter(*x.T, s=2, color=COLOURS["guided"])
    ax.set(xlim=(-4.2, 3.4), ylim=(-3, 3.4), aspect="equal")
    ax.set_title(title, fontsize=10)


def crowded(x):
    return float((x[:, 0] > -0.45).double().mean())  # right of the middle between the two islands


def crowded_in_tilt(s):
    return float(tilt(s).probs[tilt(s).points[:, 0] > -0.45].sum())


def log_p(x, label=None):
    return float(world.log_prob(x, torch.zeros(len(x), dtype=torch.float64), path, label).mean())


# %%
dial = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5)
clouds = {s: travel(guided(s), noise, steps) for s in dial}
fig, axes = plt.subplots(1, 4, figsize=(13, 3.2), sharey=True, layout="constrained")
for ax, s in zip(axes, (0.0, 1.0, 2.0, 5.0)):
    show(ax, clouds[s], s, f"s = {s:g}: CFG (dots), tilt (lines)")
plt.show()

# %% [markdown]
# *At $s=0$ and $s=1$ dots and lines agree. From $s=2$ on the dots shrink, move outwards, and leave the crowded island; the lines hardly change.*

# %%
print(f"n = {n}      s:" + "".join(f"{s:8g}" for s in dial))
rows_ = {"p(y | x0)": obeys, "on the crowded island": crowded, "mean log p(x | y)": lambda x: log_p(x, CLASS)}
for name, measure in rows_.items():
    print(f"{name:>22}" + "".join(f"{measure(x):8.3f}" for x in clouds.values()))
print(f"data: mean log p(x | y) = {log_p(world.given(CLASS).sample(n, rng(2))[0], CLASS):.2f}")
reveal(guess_cfg, round(100 * crowded(clouds[5.0])), " %", close=2)

# %% tags=["nbval-check-output"]
best = max(dial, key=lambda s: log_p(clouds[s], CLASS))
print("adherence rises with s:", all(obeys(clouds[r]) < obeys(clouds[s]) + 1e-3 for r, s in pairwise(dial)))
print("the highest mean log-density belongs to a scale between 1 and 3:", 1 < best < 3)
print("at s = 5 under a tenth is left on the crowded island:", crowded(clouds[5.0]) < 0.1)

# %% [markdown]
# A little guidance sharpens, more destroys, though every score is exact. (Nor is it the overlap of the classes: with all islands four times as far apart, CFG at $s=5$ leaves under 4 % just the same.) Now digits: adherence, distance to real digits, and *recall*, the share of real digits that lie among the samples.

# %% tags=["nbval-ignore-output", "skip-grading"]
digit_dial = (0.0, 1.0, 5.0) if SMOKE else (0.0, 1.0, 1.5, 2.0, 3.0, 5.0)
drawn = {s: net.decode(draw(guide_with(net, s), digits_asked)) for s in digit_dial}
accuracy = {s: class_accuracy(judge, made, digits_asked) for s, made in drawn.items()}
recall = {s: precision_recall(real, judge.features(made))[1] for s, made in drawn.items()}
distance = {s: frechet_distance(judge.features(made), real) for s, made in drawn.items()}
for s in digit_dial:
    print(f"s = {s:3g}: read as asked {accuracy[s]}, recall {recall[s]}, Frechet distance {distance[s]:.1f} (n = {m})")

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for s in digit_dial:
    across, up = ([[v.value - v.low], [v.high - v.value]] for v in (recall[s], accuracy[s]))
    left.errorbar(recall[s].value, accuracy[s].value, up, across, "o", color=COLOURS["guided"])
    at = recall[s].value, accuracy[s].value
    left.annotate(f"s = {s:g}", at, (0, -12), textcoords="offset points", ha="center", fontsize=8)
left.set(xlabel="recall: variety", ylabel="read as asked", title="adherence against variety")
right.plot(digit_dial, list(distance.values()), "o-", color=COLOURS["guided"])
right.axhline(frechet_distance(more, real), color=COLOURS["data"], ls=":", label="other real digits")
right.set(xlabel="s", ylabel="Frechet distance to real digits", title="too little, too much")
right.legend()
plt.show()

# %% [markdown]
# *Left: from $s=0$ to 1 adherence costs next to nothing, from 1 to 1.5 the last few per cent cost about a sixth of the variety, and beyond that variety is spent for nothing. Right: too little and too much are both far off.* The best distance is at $s=1$: on digits this easy there is little to mend. On MNIST (section 8) 11 of 200 are misread, and guidance mends them all.
#
# **Published numbers.** On ImageNet 64x64 Ho & Salimans report FID 1.80 without guidance, 12.6 at $w=1$ and 24.83 at $w=3$ ($s=2$ and $4$): it gets *worse*; the best is 1.55 at $w=0.1$, while the Inception score climbs from 53.7 to 250.4. (A slide puts them beside 128x128 pictures and its own $\gamma$.) "Typical scales are 5 to 15" is a habit of text-to-image (7.5 in Stable Diffusion); class-conditional optima (of FID) lie near 1.1 to 1.5. And "$s=1$ is the correct one" holds for exact predictions: Dhariwal & Nichol's unconditional ImageNet-256 model has FID 26.21 unguided, 33.03 at classifier scale 1 and 12.00 at 10. Nor is CFG "*more diverse*" than classifier guidance: its authors claim a similar trade-off.
#
# ## 5. What does CFG sample?
#
# The usual answer: the tilt, $p_s(x\mid y)\propto p(x)\,p(y\mid x)^s$, or in logarithms
#
# $$\log p_s=\log p(x)+s\log p(y\mid x)-\log Z_s=\log p(x\mid y)+(s-1)\log p(y\mid x)+\text{const}=s\log p(x\mid y)+(1-s)\log p(x)+\text{const}.\tag{4}$$
#
# The three are one by Bayes. "Prior times likelihood$^{s-1}$", as some slides have it, is none of them (and logarithms are equal up to a constant, not proportional):

# %% tags=["nbval-check-output"]
prior, likelihood = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.9, 0.5, 0.1])
for name, power in (("likelihood^2 (the tilt at s = 2)", 2), ("likelihood^(2-1), as on the slides", 1)):
    product = prior * likelihood**power
    print(f"prior x {name}: {[round(v, 6) for v in (product / product.sum()).tolist()]}, Z = {product.sum():.3f}")

# %% [markdown]
# The second line is $p(x\mid y)$: no sharpening. Now the real trouble. At level $t$, CFG follows the score of $p_t(x)^{1-s}\,p_t(x\mid y)^s$: noised first, tilted then. To sample the tilt it would need the score of the *noised tilt*: tilted first, noised then. Noising is a convolution, tilting a product, and **they do not commute**.
#
# The smallest example: $p(x)=\mathcal N(0,v_u)$, $p(x\mid y)=\mathcal N(0,v_c)$.
#
# - **Tilt.** Precisions add: $1/v=s/v_c+(1-s)/v_u$, a *harmonic* mean with weights $s,1-s$.
# - **CFG by ODE.** Write $\tilde\sigma=\sigma/a$ and $z=x/a$. The ODE $\mathrm dz/\mathrm d\tilde\sigma=\tilde\epsilon$ with $\epsilon_i=\tilde\sigma z/(v_i+\tilde\sigma^2)$ gives $\log z$ the slope $s\frac{\tilde\sigma}{v_c+\tilde\sigma^2}+(1-s)\frac{\tilde\sigma}{v_u+\tilde\sigma^2}$, so $z\propto(v_c+\tilde\sigma^2)^{s/2}(v_u+\tilde\sigma^2)^{(1-s)/2}$. From $z\sim\mathcal N(0,\tilde\sigma^2)$ at large $\tilde\sigma$ it arrives at $v=v_c^{\,s}\,v_u^{1-s}$: a *geometric* mean.
# - **CFG by SDE (DDPM).** A linear SDE, solved the same way: with $r=v_u/v_c$, $v=v_c^{2s}v_u^{2-2s}\,\dfrac{r^{2s-1}-1}{(v_u-v_c)(2s-1)}$, *in between*.

# %% exercise="04.4"


# %%
def line(x, t, v, m=0.0):
    """The exact eps for data N(m, v)."""
    a, sigma = scales(t)
    return sigma * (x - a * m) / (a**2 * v + sigma**2)


def line_guided(s):
    return lambda x, t: cfg(line(x, t, 1.0), line(x, t, 2.0), s)


start = torch.randn(1000 if SMOKE else 10_000, 1, generator=rng(3), dtype=torch.float64)
curve = torch.linspace(0.4, 5, 60).tolist()
colours = dict(ode=COLOURS["guided"], sde=COLOURS["unconditional"], tilt=COLOURS["data"])
plt.figure(figsize=(6, 3.4), layout="constrained")
for kind, colour in colours.items():
    plt.plot(curve, [cfg_gaussian_var(1.0, 2.0, s, kind) for s in curve], color=colour, label=kind)
for s in (0.5, 1, 2, 3, 4, 5):
    plt.plot(s, travel(line_guided(s), start, 2 * steps).var(), "o", color=colours["ode"])
    plt.plot(s, travel(line_guided(s), start, 2 * steps, rng(4)).var(), "s", color=colours["sde"])
plt.gca().set(xlabel="s", ylabel="variance", yscale="log", title="lines: closed forms; dots: simulated with CFG")
plt.legend()
plt.show()

# %% [markdown]
# *Beyond $s=1$ neither sampler lands on the tilt, nor on the other's variance.*

# %% tags=["nbval-check-output"]
print("s = 3, v_c = 1, v_u = 2:", {k: round(cfg_gaussian_var(1.0, 2.0, 3.0, k), 4) for k in ("tilt", "ode", "sde")})
print("s = 2, v_c = .5, v_u = 1:", {k: round(cfg_gaussian_var(0.5, 1.0, 2.0, k), 4) for k in ("tilt", "ode", "sde")})
x = travel(lambda x, t: cfg(line(x, t, 0.5, 1.0), line(x, t, 1.0), 2.0), start, 500)
print("with p(x | y) = N(1, .5) the means differ too: tilt 1.333, SDE 1.5, ODE 1.623")
print("measured with the ODE: within 0.05 of 1.623:", abs(float(x.mean() - start.mean() * 0.5) - 1.623) < 0.05)

# %% [markdown]
# **Two atoms** at $\pm1$, class "$+$". The tilt is the atom at $+1$ for every $s>0$. The unconditional denoiser is $\tanh(ax/\sigma^2)$, the conditional one is 1, so CFG's is $s+(1-s)\tanh(ax/\sigma^2)$. At $x=0$ it predicts $\hat x_0=s$, which at $s=7.5$ is seven and a half times as far out as any datum.
#
# **The energy view** (you may skip this). At each single $t$, CFG's field *is* a score: $-\nabla E_t$ with $E_t=-s\log p_t(x\mid y)-(1-s)\log p_t(x)$. But these are not the noised versions of *one* law. With $v_u=1,v_c=.5,s=2$ at $\bar\alpha=.5$ the precision of $e^{-E_t}$ is $2/.75-1=5/3$, that of the noised tilt $1/(.5/3+.5)=3/2$. (With *equal* variances the two agree for all $t$, as slides like to show. No class is like that: $p(x\mid y)/p(x)=p(y\mid x)/p(y)$ is bounded, theirs is not.)

# %% tags=["nbval-check-output"]
point = torch.tensor([0.4, 0.9], dtype=torch.float64)
jacobian = torch.autograd.functional.jacobian(lambda x: guided(5.0)(x[None], 500)[0], point)
print("CFG's field is a gradient (its Jacobian is symmetric):", bool((jacobian - jacobian.T).abs().max() < 1e-9))
x, off = noise[:50, :1], 0.0
for t in (50, 500, 950):
    off = max(off, float((cfg(line(x, t, 0.5, 1.0), line(x, t, 0.5), 2.0) - line(x, t, 0.5, 2.0)).abs().max()))
print("N(0, .5) and N(1, .5), s = 2: CFG follows the noised tilt, N(2, .5), to 1e-12:", off < 1e-12)
pair = line2(1.0, 0.25)
x, half = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([500.0])
follows = cfg(pair.score(x, half, path, 1), pair.score(x, half, path), 3.0)
print(f"N(-1, 1/4) and N(1, 1/4), s = 3, at x = 0.3: CFG follows {float(follows):.6f},", end=" ")
print(f"the noised tilt's score is {float(pair.tilted(1, 3.0).score(x, half, path)):.6f}")

# %% [markdown]
# **And $s\to\infty$?** (You may skip this.) Slides say: "it becomes the argmax of $p(y\mid x)$, a point mass; diversity falls all the way." **Predict** for the *tilt*: three points have $p=.5,.3,.2$ and $p(y\mid x)=1,1,0$. What is left as $s\to\infty$: one point, the whole plateau (as $p$ weighs it), or $p(x)$?

# %%
guess_limit = ...  # "one point", "the whole plateau" or "p(x)"

# %% tags=["nbval-check-output"]
prior, likelihood = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([1.0, 1.0, 0.0])
at = {s: prior * likelihood**s for s in (1, 100)}
print("plateau:", {s: [round(v, 3) for v in (w / w.sum()).tolist()] for s, w in at.items()})
prior, likelihood = torch.tensor([0.98, 0.01, 0.01]), torch.tensor([0.1, 0.9, 0.9])
tilts = [prior * likelihood**s / (prior * likelihood**s).sum() for s in (1, 2, 3)]
print("entropy at s = 1, 2, 3:", [round(float(-(w * w.log()).sum()), 4) for w in tilts])
for s in (1.0, 7.5, 100.0, 1e4):  # N(-1, 1) and N(1, 1): p(y | x) = sigmoid(2x); the mode of the tilt, by bisection
    low, high = 0.0, 10.0
    for _ in range(60):
        x = (low + high) / 2
        slope = -x + math.tanh(x) + 2 * s / (1 + math.exp(2 * x))
        low, high = (x, high) if slope > 0 else (low, x)
    print(f"two Gaussians, s = {s:g}: the tilt's mode is at {low:.6f}")

# %%
reveal(guess_limit, "the whole plateau")

# %% [markdown]
# For the tilt only this holds: $\mathbb E\log p(y\mid x)$ never falls (its derivative is a variance). A flat top of $p(y\mid x)$ is kept whole; where the supremum is not attained the mode can run off to infinity; and the entropy may rise on the way.
#
# ## 6. The missing island
#
# Back to class 0. At $s=5$ CFG has emptied the crowded island. **Predict before you run:** how many per cent of the *tilt*'s mass are there: 50, 47, 23 or 3?

# %%
guess_tilt = ...

# %%
masses = {"p(x | y)": 0.5, "tilt": crowded_in_tilt(5.0), "CFG": crowded(clouds[5.0])}
fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4), width_ratios=[2, 1], layout="constrained")
show(left, clouds[5.0], 5.0, "s = 5: CFG (dots) and the tilt (lines)")
right.bar(list(masses), list(masses.values()), color=[COLOURS[c] for c in ("conditional", "data", "guided")])
right.set_title("share on the crowded island", fontsize=10)
plt.show()
reveal(guess_tilt, round(100 * masses["tilt"]), " %", close=1)

# %% tags=["nbval-check-output"]
print(f"the tilt keeps {100 * crowded_in_tilt(5.0):.1f} % there")

# %% [markdown]
# *The tilt is almost $p(x\mid y)$, with the shore next to class 1 shaved off. CFG empties the island (2.6 % of 40,000 samples, with a standard error of 0.1; runs of 2000 scatter by 0.4), and pushes the other one outwards.*
#
# Without a grid: by (4) the tilt is $p(x\mid y)$ times $p(y\mid x)^{s-1}$, a number **at most 1**: draw from $p(x\mid y)$, keep each sample with that probability.

# %% exercise="04.5"

# %%
plain = world.given(CLASS).sample(20_000, rng(5))[0]
p = world.class_log_prob(plain, torch.zeros(len(plain), dtype=torch.float64), path, CLASS).exp()
kept = {s: tilt_by_rejection(plain, p, s, rng(6)) for s in (2.0, 3.0, 5.0, 7.5, 15.0)}
for s, x in kept.items():
    print(f"s = {s:4g}: kept {share(len(x), len(plain))}, of those crowded {crowded(x):.3f}", end="; ")
    print(f"by the grid {crowded_in_tilt(s):.3f}")

# %% tags=["nbval-check-output"]
print("at s = 5 more than 93 % are kept:", len(kept[5.0]) > 0.93 * len(plain))
far, near = (energy_distance(clouds[s], kept[5.0][:n]) for s in (5.0, 1.0))
print("CFG at 5 is over 30 times as far from its tilt as unguided samples:", far > 30 * near)

# %% [markdown]
# "CFG at $s=5$ samples $p(x)p(y\mid x)^5$" is refuted: *that* law is reached by throwing away 6 % of the unguided samples. Now digits, with $p(y\mid x_0)$ from the course's noise-aware classifier at $t=0$. **Predict:** at $s=5$, how many per cent of the unguided digits are kept: 5, 50, or over 90?

# %%
guess_kept = ...

# %% tags=["nbval-ignore-output", "skip-grading"]
classifier = TableNetwork(load("digits-classifier"), table).to(device)
unguided, again = (draw(guide_with(net, 1.0), digits_asked, seed=k) for k in (0, 1))
with torch.no_grad():
    p = classifier(unguided, torch.zeros_like(digits_asked)).softmax(1).gather(1, digits_asked[:, None])[:, 0].cpu()
index = tilt_by_rejection(torch.arange(m)[:, None].double(), p.double(), 5.0, rng(7))[:, 0].long()
reveal(guess_kept, round(100 * len(index) / m), " %", close=5)
reference = judge.features(net.decode(again))
for name, some in (("p(x | y)", unguided.cpu()), ("the tilt at s = 5", unguided.cpu()[index])):
    off = energy_distance(judge.features(net.decode(some)), reference)
    print(f"{name}: energy distance to other unguided samples {off:.3f}")
print(f"CFG at s = 5: {energy_distance(judge.features(drawn[5.0]), reference):.3f}")

# %% [markdown]
# The same on MNIST, whose network errs more often, so that there is more to reject:

# %% tags=["nbval-ignore-output", "skip-grading"]
big, reader = (TableNetwork(load(name), table).to(device) for name in ("mnist-unet", "mnist-classifier"))
mnist_judge, ten = Judge.mnist(), torch.arange(10).repeat_interleave(2 if SMOKE else 20).to(device)
unguided, again = (draw(guide_with(big, 1.0), ten, seed=k, side=28) for k in (0, 1))
with torch.no_grad():
    p = reader(unguided, torch.zeros_like(ten)).softmax(1).gather(1, ten[:, None])[:, 0].cpu()
index = tilt_by_rejection(torch.arange(len(ten))[:, None].double(), p.double(), 5.0, rng(7))[:, 0].long()
reference = mnist_judge.features(big.decode(again))
hard = draw(guide_with(big, 5.0), ten, side=28)
print(f"s = 5: kept {share(len(index), len(ten))}")
for name, some, asked in (("p(x | y)", unguided, ten), ("tilt", unguided[index], ten[index]), ("CFG", hard, ten)):
    seen = big.decode(some)
    off = energy_distance(mnist_judge.features(seen), reference)
    print(f"{name:8} read as asked {class_accuracy(mnist_judge, seen, asked)}, distance to unguided {off:.3f}")

# %% [markdown]
# Most digits are clear already, so the tilt hardly differs from $p(x\mid y)$. What you *see* at the dial is CFG's own doing.
#
# ## 7. Why: guidance comes at the wrong time
#
# Which scale *should* guidance have? Let $g^*_t$ be the score of the noised tilt, which the grid knows. Project the guidance that it asks for, $g^*_t-\nabla\log p_t$, on the direction that we have, $d=\nabla\log p_t(x\mid y)-\nabla\log p_t(x)$:
#
# $$s_\text{eff}(t)=\frac{\mathbb E\langle g^*_t-\nabla\log p_t,\ d\rangle}{\mathbb E\|d\|^2},\qquad\text{the mean over the noised tilt.}$$
#
# **Predict:** for $s=5$, is the effective scale at high noise 5, larger, or about 1?

# %%
guess_scale = ...  # "5", "larger" or "1"


# %%
def effective(s, times, count=60 if SMOKE else 200):
    """s_eff at each t, averaged over points of the noised tilt."""
    grid = tilt(s)
    seen = grid.probs > 1e-7
    law = GridDensity(grid.points[seen], grid.probs[seen] / grid.probs[seen].sum(), grid.spacing)
    x0, eps = law.sample(count, rng(8)), torch.randn(count, 2, generator=rng(9), dtype=torch.float64)
    found = []
    for t in times:
        (a, sigma), when = scales(t), torch.full((count,), float(t), dtype=torch.float64)
        x = a * x0 + sigma * eps
        u = world.score(x, when, path)
        d = world.score(x, when, path, CLASS) - u
        found.append(float(((law.score(x, when, path) - u) * d).sum() / (d**2).sum()))
    return found


moments = [20, 50, 100, 200, 300, 400, 500, 700, 900, 990]
needed = {s: effective(s, moments) for s in ((5.0,) if SMOKE else (2.0, 5.0, 10.0))}
plt.figure(figsize=(6, 3.2), layout="constrained")
for s, found in needed.items():
    plt.plot([scales(t)[1] / scales(t)[0] for t in moments], found, "o-", color=COLOURS["data"], lw=0.6 + s / 8)
    plt.axhline(s, color=COLOURS["noise"], ls="--", lw=0.6 + s / 8)
    plt.text(60, s - 0.15, f"s = {s:g}", ha="right", va="top", fontsize=8)
plt.axvspan(0.5, 1, color=COLOURS["unconditional"], alpha=0.15)
plt.gca().set(xscale="log", xlabel="noise, sigma / a", ylabel="scale", title="the tilt asks for (solid), CFG (dashed)")
plt.show()
reveal(guess_scale, "1" if needed[5.0][-1] < 1.5 else "5")

# %% tags=["nbval-check-output"]
high = [found for t, found in zip(moments, needed[5.0]) if t >= 400]
print("s = 5: s_eff within 0.2 of 1 from t = 400 on:", all(abs(found - 1) < 0.2 for found in high))
print("and above 3.5 at t = 20:", needed[5.0][0] > 3.5)

# %% [markdown]
# *The tilt asks for a scale of about 1 wherever islands are still being chosen, and comes near $s$ only at the very end, where the shore is cut. A constant $s$ is about $s$ times too strong where it decides most. Shaded: an interval tried next.*
#
# If this is right, CFG with the schedule $s_\text{eff}(t)$ should sample the tilt. And a cheap imitation, the **guidance interval** (Kynkäänniemi et al. 2024), $s$ between two noise levels and *1* outside, should repair most of the damage, if guidance begins only when the islands are chosen. Outside, one evaluation is enough.

# %% exercise="04.6"


# %%
def scheduled(s):
    """CFG with the effective scale, interpolated in t."""
    return lambda x, t: cfg(ask(x, t, CLASS), ask(x, t), float(numpy.interp(t, [0, *moments], [s, *needed[s]])))


def limited(s, low, high):
    """CFG within an interval of sigma / a."""

    def field(x, t):
        t_all, y = torch.full((len(x),), t), torch.full((len(x),), CLASS)
        return interval_eps(Perfect(), x, t_all, y, Perfect.null, scales(t)[1] / scales(t)[0], s, low, high)

    return field


truth = kept[5.0][:n]
runs = {
    "constant 5": clouds[5.0],
    "5 below noise 1": travel(limited(5.0, 0.0, 1.0), noise, steps),
    "5 in (0.5, 1]": travel(limited(5.0, 0.5, 1.0), noise, steps),
    "s_eff(t)": travel(scheduled(5.0), noise, steps),
}
fig, axes = plt.subplots(1, 4, figsize=(13, 3.2), sharey=True, layout="constrained")
for ax, (name, x) in zip(axes, runs.items()):
    show(ax, x, 5.0, f"{name}: distance {energy_distance(x, truth):.3f}")
plt.show()
floor = max(energy_distance(kept[5.0][k * n : (k + 1) * n], truth) for k in range(1, 6))
print(f"distance between two samples of the tilt: up to {floor:.4f}; share on the crowded island:", end=" ")
print({name: round(crowded(x), 3) for name, x in runs.items()})

# %% tags=["nbval-check-output"]
off = {name: energy_distance(x, truth) for name, x in runs.items()}
print("the interval removes over nine tenths of the distance:", off["5 below noise 1"] < 0.1 * off["constant 5"])
print("s_eff(t) removes over 98 %:", off["s_eff(t)"] < 0.02 * off["constant 5"])
noise_levels = torch.tensor([0.2, 0.5, 0.8, 1.0, 3.0])
print("scales on (0.5, 1]:", interval_scale(noise_levels, 5.0, 0.5, 1.0).tolist())

# %% [markdown]
# *Only the timing differs: the intervals keep both islands, if narrower; $s_\text{eff}(t)$ fills them.* Below noise 0.5 guidance adds so little that its evaluations can be saved. (On ImageNet the authors find it harmful at high, and largely unnecessary at low noise.)
#
# **What CFG is, exactly** (you may skip this). Write $g_c,g_u$ for the two scores. Beside a linear part that both share, in small steps, DDPM with guidance moves by $\beta\,[s\,g_c+(1-s)g_u]$ plus noise of variance $\beta$; DDIM on $p(x\mid y)$ alone moves by $\tfrac\beta2 g_c$. The difference, $\tfrac\beta2[(2s-1)g_c+(2-2s)g_u]$, is, with the noise, a Langevin step on $p_t(x\mid y)^{\gamma}\,p_t(x)^{1-\gamma}$ with $\gamma=2s-1$. So CFG with DDPM is a *predictor*, conditional DDIM, and a *corrector* towards a sharpened density (Bradley & Nakkiran 2024).

# %% tags=["nbval-check-output"]
worst, s = 0.0, 3.0
for t in (50, 300, 500, 700, 950):
    x, fresh, beta = 1.5 * noise[:100], noise[100:200], 1 - float(abar[t] / abar[t - 1])
    g_c, g_u = (-ask(x, t, label) / scales(t)[1] for label in (CLASS, None))
    whole = beta * (x / 2 + s * g_c + (1 - s) * g_u) + beta**0.5 * fresh
    predictor = beta * (x / 2 + g_c / 2)
    corrector = beta / 2 * ((2 * s - 1) * g_c + (2 - 2 * s) * g_u) + beta**0.5 * fresh
    worst = max(worst, float((whole - predictor - corrector).abs().max()))
print("guided DDPM step = predictor + corrector, to 1e-14:", worst < 1e-14)
in_equilibrium, ends_at = cfg_gaussian_var(1.0, 2.0, 2 * s - 1, "tilt"), cfg_gaussian_var(1.0, 2.0, s, "sde")
print(f"v_c = 1, v_u = 2, s = 3: corrected to equilibrium {in_equilibrium:.4f}, DDPM {ends_at:.4f}")

# %% [markdown]
# One corrector step per level is too few for equilibrium. Weights on samples can make it exact; lesson 10 does that.
#
# ## 8. Remedies
#
# **Standard deviations and clipping.** Extrapolation makes predictions too large: pixels beyond black and white. *Rescaling* (Lin et al. 2023, for networks that predict $v$) multiplies the guided prediction by $\varphi\,\mathrm{std}_c/\mathrm{std}_\text{guided}+1-\varphi$. *Dynamic thresholding* (Imagen) works on $\hat x_0$ in pixels: let $c$ be a high quantile of $|\hat x_0|$, at least 1, clip to $[-c,c]$ and divide by $c$. It needs pixels with a known range, which latents do not have.

# %% exercise="04.7"

# %% [markdown]
# Lin et al. mend the schedule as well, so that nothing of the picture is left at $t=T$. With Stable Diffusion's a network can read the brightness from "pure noise": a white picture (pixels 1) leaves a mean of twice the standard deviation of the noise's mean, $1/32$ for $32\times32$ pixels.

# %% tags=["nbval-check-output"]
beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
left = float((1 - beta).prod().sqrt())
print(f"mean at t = T of a white picture, 32 x 32: {left:.3f}, standard deviation of the noise's {1 / 32:.3f}")

# %% [markdown]
# Clipping and rescaling on digits, at $s=8$ (`affine` takes pixels in $[-1,1]$ to the network's units and back):

# %% tags=["nbval-ignore-output", "skip-grading"]
affine, strong = net.model.affine, digits_asked[::2]
black, white = affine.encode(torch.tensor([-1.0, 1.0])).tolist()


def rescaled(kind):
    def rule(x, t, y):
        eps_c, (a, sigma) = net(x, t, y), (pad(v.to(x).sqrt(), x) for v in (net.abar[t], 1 - net.abar[t]))
        eps = cfg(eps_c, net(x, t, torch.full_like(y, net.null)), 8.0)
        if kind == "eps":
            return rescale_cfg(eps, eps_c, 0.7)
        return (x - a * rescale_cfg((x - sigma * eps) / a, (x - sigma * eps_c) / a, 0.7)) / sigma

    return rule


def threshold(x0):
    return affine.encode(dynamic_threshold(affine.decode(x0), 0.995))


def beyond(x0):
    return float((affine.decode(x0).abs() > 1.05).float().mean())


# %% tags=["nbval-ignore-output", "skip-grading"]
eight = guide_with(net, 8.0)
remedies = {
    "s = 1": (guide_with(net, 1.0), None),
    "s = 8": (eight, None),
    "s = 8, clipped after guidance": (eight, lambda x0: x0.clamp(black, white)),
    "s = 8, dynamic threshold": (eight, threshold),
    "s = 8, rescaled in eps": (rescaled("eps"), None),
    "s = 8, rescaled in x0": (rescaled("x0"), None),
}
tiles = {}
for name, (rule, to_x0) in remedies.items():
    x0 = draw(rule, strong, to_x0=to_x0)
    tiles[name] = net.decode(x0)
    far = frechet_distance(judge.features(tiles[name]), real[::2])
    print(f"{name:>30}: pixels out of range {beyond(x0):.3f}, Frechet distance {far:.1f} (n = {len(strong)})")

fig, axes = plt.subplots(6, 1, figsize=(8, 6), layout="constrained")
for ax, (name, made) in zip(axes, tiles.items()):
    show_tile(ax, made[:: len(strong) // 20][:20], 20, name)
plt.show()

# %% [markdown]
# *At $s=8$ strokes are pure black and vary little. Clipping helps. Dynamic thresholding greys the paper: the two largest of 64 pixels set $c$, and all are divided by it. Rescaling $\epsilon$ does next to nothing, as its standard deviation is about 1 anyway; the same rule in $x_0$ acts. None comes near the distance at $s=1$: all change lengths, none the timing.*
#
# **Autoguidance** (Karras et al. 2024) keeps (2) and replaces $\epsilon_u$ by *a worse model with the same label*: smaller, or less trained. Both err in the same direction, so the difference points away from the error, not from other classes. Here the model knows blurred data (each island's covariance $+0.1$), the worse one more so ($+0.3$).


# %%
def blurred(extra):
    covs = world.covs + extra * torch.eye(2, dtype=torch.float64)
    return GaussianMixture(world.weights, world.means, covs, world.labels)


def island_size(x):
    """The mean trace of the covariances of the two islands' samples."""
    parts = [x[x[:, 0] > -0.45], x[x[:, 0] <= -0.45]]
    return sum(float(part.T.cov().trace()) for part in parts) / 2


good, bad, target = blurred(0.1), blurred(0.3), world.given(CLASS).sample(n, rng(10))[0]
runs = {
    "the model, s = 1": travel(lambda x, t: ask(x, t, CLASS, good), noise, steps),
    "autoguidance, s = 2": travel(lambda x, t: cfg(ask(x, t, CLASS, good), ask(x, t, CLASS, bad), 2.0), noise, steps),
    "CFG, s = 2": travel(guided(2.0, good), noise, steps),
}
print(f"data: trace {island_size(target):.3f}, crowded {crowded(target):.3f}")
for name, x in runs.items():
    off = energy_distance(x, target)
    print(f"{name}: trace {island_size(x):.3f}, crowded {crowded(x):.3f}, distance to p(x | y) {off:.4f}")

# %% tags=["nbval-check-output"]
close = energy_distance(runs["autoguidance, s = 2"], target) < 0.3 * energy_distance(runs["CFG, s = 2"], target)
print("autoguidance comes nearer to p(x | y) than CFG:", close)

# %% [markdown]
# Autoguidance mends *errors of the model* and keeps the islands; CFG sharpens classes. Part of CFG's success may be of the first kind, its null branch being the worse half of the network (lesson 02's "3.32 bits"). On MNIST, with a smaller network, trained for an eighth of the steps:

# %% tags=["nbval-ignore-output", "skip-grading"]
small = TableNetwork(load("mnist-small"), table).to(device)
rules = {
    "s = 1": big,
    "CFG, s = 2": guide_with(big, 2.0),
    "CFG, s = 5": guide_with(big, 5.0),
    "autoguidance, s = 2": lambda x, t, y: cfg(big(x, t, y), small(x, t, y), 2.0),
}
fig, axes = plt.subplots(4, 1, figsize=(9, 4.2), layout="constrained")
for ax, (name, rule) in zip(axes, rules.items()):
    made = big.decode(draw(rule, ten, side=28))
    right = class_accuracy(mnist_judge, made, ten)
    show_tile(ax, made[:: len(ten) // 20], 20, f"{name}: read as asked {right} of {len(ten)}")
plt.show()

# %% [markdown]
# *Each column begins from one noise. CFG makes all legible, at 5 also fat and alike. Autoguidance keeps the shapes; what it gains in accuracy is within the interval.*
#
# Every rule of this lesson at several scales, 1,000 MNIST digits each, stands in the course's `benchmarks/guidance.md` (`make bench` draws it again). At about 99 % read as asked, guidance in an interval ($t\le0.7$, scale 3) keeps a within-class diversity of 0.955 [0.934, 0.976], plain CFG (scale 1.5) 0.896 [0.875, 0.917]; real digits have 1.
#
# **Projection.** Some slides print a "Perp-CFG", $\epsilon_u+s\,\mathrm{proj}_\perp(\epsilon_c-\epsilon_u)$, perpendicular to the unconditional score, and cite a paper about *language models* without such a rule. **Test it at $s=1$**, where every guidance rule must return $\epsilon_c$:

# %% tags=["nbval-check-output"]
e_u, e_c = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0]])


def printed_rule(e_c, e_u, s):
    d = e_c - e_u
    return e_u + s * (d - (d * e_u).sum() / (e_u**2).sum() * e_u)


print("printed rule:", {f"s = {s}": printed_rule(e_c, e_u, s)[0].tolist() for s in (5, 1)})

# %% [markdown]
# $(1,1)$ instead of $\epsilon_c=(2,1)$: it fails. What does exist:
#
# - **APG**, adaptive projected guidance (Sadat et al. 2024): $\hat x_c+(s-1)(d_\perp+\eta\,d_\parallel)$ with $d=\hat x_c-\hat x_u$ shortened to length $r$ where it is longer, split along $\hat x_c$, the estimate of $x_0$ (the original adds a negative momentum). Its authors find that the part along the picture mostly oversaturates. (Check a library's default $\eta$, and what it does at $s=1$.)
# - **Perp-Neg** (Armandpour et al. 2023), for *negative prompts*: section 9.

# %% exercise="04.8"

# %% tags=["nbval-check-output"]
a, sigma, x = 0.6, 0.8, torch.tensor([[1.0, 1.0]])
x_c, x_u = (x - sigma * e_c) / a, (x - sigma * e_u) / a
for name, rule in (("plain", cfg), ("projected", apg)):
    in_eps, in_x0 = rule(e_c, e_u, 5.0)[0], ((x - a * rule(x_c, x_u, 5.0)) / sigma)[0]
    print(f"{name} in eps {[round(v, 2) for v in in_eps.tolist()]}, in x0 {[round(v, 2) for v in in_x0.tolist()]}")

# %% [markdown]
# Unlike plain guidance, projection gives another result in each kind of prediction (both printed as $\epsilon$). And "parallel to $\hat x_0$" means parallel to a line through the *origin*. **Predict:** move the whole world by $(3,3)$, nothing else. Which changes, CFG or APG?

# %%
guess_apg = ...  # "neither", "CFG", "APG" or "both"


# %%
def projected(s, world):
    def field(x, t):
        a, sigma = scales(t)
        x_c, x_u = ((x - sigma * ask(x, t, label, world)) / a for label in (CLASS, None))
        return (x - a * apg(x_c, x_u, s)) / sigma

    return field


shifted = GaussianMixture(world.weights, world.means + 3, world.covs, world.labels)
found = {}
for name, rule in (("CFG", guided), ("APG", projected)):
    for here, there in (("at home", world), ("moved by (3, 3)", shifted)):
        x = travel(rule(5.0, there), noise, steps) - (3 if there is shifted else 0)
        found[name, here] = crowded(x)
        print(f"{name} {here}: crowded {crowded(x):.3f}, distance to p(x | y) {energy_distance(x, target):.2f}")
moved = [rule for rule in ("CFG", "APG") if abs(found[rule, "at home"] - found[rule, "moved by (3, 3)"]) > 0.05]
reveal(guess_apg, {0: "neither", 1: moved[0] if moved else "", 2: "both"}[len(moved)])

# %% [markdown]
# APG beats CFG here, and its authors report good pictures (whose origin is grey); but it depends on where you put the zero.
#
# ## 9. Negative prompts
#
# "A castle, *not* foggy". Three rules:
#
# | form | rule | passes |
# |---|---|---|
# | two-pass (deployed pipelines) | $\epsilon_-+s(\epsilon_+-\epsilon_-)$ | 2; no effect at $s=1$ |
# | three-pass (slides; composable diffusion) | $\epsilon_u+s(\epsilon_+-\epsilon_u)-s(\epsilon_--\epsilon_u)$ | 3 |
# | Perp-Neg | as three-pass, with the part of $\epsilon_--\epsilon_u$ perpendicular to $\epsilon_+-\epsilon_u$ | 3 |
#
# The weights of the first two sum to one; they differ by $\epsilon_u-\epsilon_-$ at every $s$.

# %% exercise="04.9"

# %% tags=["nbval-check-output"]
e_u, e_pos, e_neg = (torch.tensor([[v]]) for v in (0.2, 1.0, 0.5))
for s in (7.5, 1.0):
    two, three = (float(negative(e_pos, e_neg, e_u, s, form)) for form in ("two-pass", "three-pass"))
    print(f"s = {s}: two-pass {two:.2f}, three-pass {three:.2f}")
e_pos, e_neg, e_u = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.zeros(1, 2)
print("Perp-Neg, d+ = (2, 0), d- = (1, 1), s = 7.5:", negative(e_pos, e_neg, e_u, 7.5, "perp")[0].tolist())

# %% [markdown]
# **Predict:** in the exact world, "class 0 and *not* class 1" at $s=3$. The samples' mean $\log p(x)$, which is about $-2.5$ for data: does it become about $-2$ (sharper), $-10$, or below $-100$?

# %%
guess_logp = ...  # -2, -10 or -100


# %%
def repelled(form):
    return lambda x, t: negative(ask(x, t, 0), ask(x, t, 1), ask(x, t), 3.0, form)


outcome = {}
fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for ax, form in zip(axes, ("two-pass", "three-pass", "perp")):
    x = travel(repelled(form), noise, steps)
    outcome[form] = log_p(x)
    ax.scatter(*x.T, s=3, color=COLOURS["guided"])
    ax.scatter(*world.sample(500, rng(11))[0].T, s=3, color=COLOURS["noise"])
    ax.set_title(f"{form}: mean log p(x) {log_p(x):.0f}, p(y | x) {obeys(x):.2f}", fontsize=10)
plt.show()
reveal(guess_logp, -100 if outcome["three-pass"] < -100 else -10 if outcome["three-pass"] < -5 else -2)

# %% tags=["nbval-check-output"]
print("every form leaves the support: mean log p(x) below -50:", all(value < -50 for value in outcome.values()))

# %% [markdown]
# *Orange: samples; grey: data. Two of the three even miss class 0: so far out the widest island's class fits least badly. Repulsion has no bound: where these samples end $p(x\mid +)/p(x\mid -)$ is $e^{400}$ to $e^{900}$. No form is safe; small scales and intervals only soften it (two-pass: $-10$ at $s=1.5$, $-30$ at $s=3$ below noise 0.5).*
#
# ## 10. The slider
#
# Turn $s$: dots are CFG, black lines the tilt, dotted lines $p(x\mid y)$; the last bar is CFG with guidance below noise level 1 only.


# %%
def draw_scale(s):
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    x = travel(guided(s), noise[:300], 40)
    show(left, x, s, f"s = {s:g}: CFG and the tilt")
    contours(left, 1, (-3.5, -0.5), "conditional", "dotted")
    within = crowded(travel(limited(s, 0.0, 1.0), noise, 40))
    names, colours = ("p(x|y)", "tilt", "CFG", "interval"), ("conditional", "data", "guided", "unconditional")
    right.bar(names, [0.5, crowded_in_tilt(s), crowded(x), within], color=[COLOURS[c] for c in colours])
    right.set(ylim=(0, 0.6), title="on the crowded island")
    return figure


def describe_scale(s):
    return f"At scale {s:g}: CFG samples, the tilt, and the share that each keeps on the crowded island."


slider(draw_scale, [1, 1.5, 2, 3, 4, 5, 7.5, 10], "s", describe_scale, start=3)

# %% [markdown]
# ## 11. Write the test
#
# `eps_u + s * (eps_c - eps_u)` has been published as `eps_c + s * (eps_c - eps_u)`, with $(s-1)\epsilon_u$ for $(1-s)\epsilon_u$, with the predictions exchanged, with one label in both passes, and for three channels of four. Write the test that none of them passes.

# %% exercise="04.10"

# %% [markdown]
# ## Twelve statements
#
# True or false? Sort them before the cell below does; each verdict is computed, where it can be.
#
# - **a** An unconditional model and a perfect classifier suffice to sample $p(x\mid y)$: keep each draw with the probability that the classifier gives it.
# - **b** At $s=0$ the label has no effect: samples are of class 0 as often as the data, three times in ten.
# - **c** At $s=1$, with exact predictions, CFG samples $p(x\mid y)$.
# - **d** At $s=5$ it samples $p(x)\,p(y\mid x)^5$.
# - **e** A larger scale makes samples more typical of the class and more varied.
# - **f** To guide one needs $\log p(y)$, which nobody can compute.
# - **g** Conditioning is a sum for scores. For densities it is a product that has to be normalised again.
# - **h** Guidance by the exact noisy classifier and CFG with exact predictions are one field.
# - **i** A classifier step always costs more than the two passes of CFG.
# - **j** Without dropped labels no network can be guided.
# - **k** CFG may guide noise, $x_0$ or velocity: the samples are the same.
# - **l** CFG samples are more varied than those of classifier guidance with the same predictions.

# %%
# "true" or "false"
guess_statements = dict(a=..., b=..., c=..., d=..., e=..., f=..., g=..., h=..., i=..., j=..., k=..., l=...)

# %%
points, clean = world.sample(20_000, rng(31))[0], torch.zeros(20_000, dtype=torch.float64)
likely = world.class_log_prob(points, clean, path, CLASS).exp()
by_rejection = points[torch.rand(20_000, generator=rng(32), dtype=torch.float64) < likely][:n]
x, t = noise[:100].clone().requires_grad_(), 400
logs = world.class_log_prob(x, torch.full((100,), float(t), dtype=torch.float64), path, CLASS)
(gradient,) = torch.autograd.grad(logs.sum(), x)
x, (a, sigma) = x.detach(), scales(t)
e_c, e_u = ask(x, t, CLASS), ask(x, t)
without = cfg(e_c, e_u, 3.0)
by_x0 = (x - a * cfg((x - sigma * e_c) / a, (x - sigma * e_u) / a, 3.0)) / sigma
one_field = torch.allclose(e_u - 3 * sigma * gradient, without)
truths = dict(
    a=energy_distance(by_rejection, target) < 0.1,
    b=abs(obeys(clouds[0.0]) - 0.3) < 0.1,
    c=energy_distance(clouds[1.0], target) < 0.1,
    d=energy_distance(clouds[5.0], truth) < 0.1,
    e=float(clouds[5.0].var(0).sum()) > float(clouds[1.0].var(0).sum()),
    f=False,  # its gradient with respect to x_t is 0: lesson 03
    g=True,  # log(ab) = log a + log b, and the gradient of the normaliser's logarithm is 0
    h=one_field,
    i=1 + 2 * 0.2 > 2,  # a classifier of a fifth of the network's size: lesson 03, section 9
    j=False,  # (3), a second model, or a classifier
    k=torch.allclose(by_x0, without),
    l=not one_field,
)
for letter, value in truths.items():
    print(letter, end=": ")
    reveal(guess_statements[letter], "true" if value else "false")

# %% tags=["nbval-check-output"]
print("true:", ", ".join(letter for letter, value in truths.items() if value))

# %% [markdown]
# ## 12. What it costs, what to keep
#
# **Cost.** Two evaluations per step (or one batch of $2B$: no faster on a CPU), three for some negative prompts. Is classifier guidance slower? Its classifier may be small (Dhariwal & Nichol's is the downward half of a U-Net); if it costs a share $c$ of the network, a step takes $1+2c$ (forward and backward): $1.4$ at $c=.2$, against 2. CFG's authors list its *speed* as a drawback; at equal compute they report an FID behind that of classifier guidance. Its advantages: nothing extra to train, any condition, no gradients through a classifier.

# %% tags=["nbval-ignore-output", "skip-grading"]
x, t = torch.randn(64, 1, 8, 8, generator=rng(12)).to(device), torch.full((64,), 500, device=device)
y = torch.zeros_like(t)
null = torch.full_like(y, net.null)
ways = {
    "one pass (s = 1)": lambda: net(x, t, y),
    "two passes": lambda: cfg(net(x, t, y), net(x, t, null), 2.0),
    "one batch of 2B": lambda: cfg_forward(net, x, t, y, net.null, 2.0),
}
with torch.no_grad():
    for name, way in ways.items():
        begin = time.perf_counter()
        for _ in range(10):
            float(way().sum())  # a number on the CPU: a GPU has finished by then
        print(f"{name}: {100 * (time.perf_counter() - begin):.1f} ms")

# %% [markdown]
# Models distilled from guided ones (LCM, FLUX-dev) are told the scale and take one pass. Nor do "all production systems use CFG": GLIDE, DALL-E 2, Imagen and Stable Diffusion do, the first DALL-E was autoregressive, and the insides of Midjourney and DALL-E 3 are unpublished.
#
# **Keep.**
# - CFG is classifier guidance with the implicit classifier, proportional to $p_t(x\mid y)/p_t(x)$.
# - Its weights sum to one, so the kind of prediction does not matter; for clipping, rescaling and projection it does.
# - Beyond $s=1$ it does **not** sample $p(x)p(y\mid x)^s$; ODE and SDE differ, too. Here and on our digits the tilt itself is nearly $p(x\mid y)$.
# - A constant scale is too strong at high noise, where modes are chosen; an interval, or $s_\text{eff}(t)$, addresses that.
# - Quote a scale together with its convention, and a guided result with adherence *and* variety.
#
# **Unsettled.** Does CFG improve pictures by correcting errors or by sharpening? And in high dimension? For classes $\mathcal N(\pm m,I)$ with $|m|=\sqrt D/2$ at $s=3$ we measure the SDE's class mean too far out by 0.72, 0.48, 0.12, 0.06 in $D=1,16,256,1024$; the ODE's by 0.78, then 1.04 throughout, small only beside $|m|$. Pavasovic et al. find that distortions vanish as $D$ grows, Ventura et al. that they return with very many classes.
#
# ## Questions
#
# 1. Derive CFG from Bayes. What happens as $s\to\infty$, to the tilt and to the samples?
# ### BEGIN SOLUTION
# *Equations (1) and (2). The tilt concentrates where $p(y\mid x)$ is largest: it keeps a plateau whole, and drifts to infinity without a maximum. Its entropy need not fall. CFG's samples are not the tilt: for Gaussians with $v_c=1$, $v_u=2$, $s=3$ their variance is .25 (ODE) or .3875 (DDPM) against .5. In the archipelago, at $s=5$, the crowded island has 46.8 % of the tilt, and 2.6 % of CFG's samples.*
# ### END SOLUTION
# 2. What fails with $p_\text{uncond}=0$, what with 1? How would you choose and validate a value?
# ### BEGIN SOLUTION
# *At 0 the null label is untrained: $s=1$ is fine, every other scale uses an arbitrary vector (the unconditional score still exists, by (3)). At 1 the labels are untrained: samples ignore or misread them. Train several values, sweep $s$ for each, and compare the fronts of adherence against variety (with intervals) and the distance to held-out data. Neighbouring values often tie.*
# ### END SOLUTION
# 3. Compare classifier guidance and CFG. What is the main advantage of CFG?
# ### BEGIN SOLUTION
# *The same field when both are exact. CFG needs no noise-aware classifier and takes any condition; it costs two passes and dropout in training. Classifier guidance also steers a model trained without labels. Both pay for adherence in variety.*
# ### END SOLUTION
# 4. What happens at $s=0$ and at $s=1$? And in a paper that writes $(1+w)\epsilon_c-w\epsilon_u$?
# ### BEGIN SOLUTION
# *$s=0$: unconditional, the label has no effect. $s=1$: conditional, the null pass has the weight 0 and can be saved. There $w=-1$ and $w=0$.*
# ### END SOLUTION
# 5. How does training for CFG differ from DDPM's? What changes in the network's input?
# ### BEGIN SOLUTION
# *The network also gets $y$, replaced by a null token with probability $p_\text{uncond}$ for each example. Noise, target and loss stay.*
# ### END SOLUTION
# 6. You may guide only half of the steps. Which half, and why?
# ### BEGIN SOLUTION
# *Not the noisiest ones: there the noised tilt asks for a scale near 1, and a constant $s$ picks modes (at $s=5$, guided above noise 1 only, 3 % stay on the crowded island). Guided in $(0.25, 1]$ only, 45 % stay there and $p(y\mid x_0)$ rises from .971 to .9999.*
# ### END SOLUTION
#
# **Sources.** Ho & Salimans 2022; Dhariwal & Nichol 2021; Bradley & Nakkiran 2024 (arXiv 2408.09000); Chidambaram et al. 2024 (2409.13074); Kynkäänniemi et al. 2024 (2404.07724); Karras et al. 2024 (2406.02507); Lin et al. 2023 (2305.08891); Saharia et al. 2022 (Imagen); Sadat et al. 2024 (APG: 2410.02416; ICG: 2407.02687); Armandpour et al. 2023 (2304.04968); Chung et al. 2024 (2406.08070); Chen et al. 2025 (2501.15420); Pavasovic et al. 2025 (2502.07849) and Ventura et al. 2026 (2602.00716), both by their abstracts. The rejection test, the curve $s_\text{eff}(t)$, the dependence of APG on the origin and the growth of CFG++ with the number of steps are measured here, not quoted.
