# %% [markdown]
# # 01 · Score and noise
#
# **Question.** You hold a noisy picture. Which way is the data?
#
# **You need** PyTorch tensors and a little probability; lesson 00 for how checks work. No GPU, no download.
#
# **You build** the forward process, its score, what a perfect network would say, and one step of DDPM and of DDIM (two ways to walk back from noise to data). Each is checked against a world in which the answer is known exactly.
#
# **One card for the whole lesson** (the letters of the papers):
#
# | letter | meaning |
# |---|---|
# | $x_0,\ \epsilon,\ x_t$ | clean data, standard normal noise, their mixture at time $t$ |
# | $\beta_t,\ \alpha_t=1-\beta_t$ | what one step adds, what one step keeps (as variances) |
# | $\bar\alpha_t=\prod_{i\le t}\alpha_i$ | what is left of the signal's variance after $t$ steps: `abar[t]`, with `abar[0] = 1` |
# | $a=\sqrt{\bar\alpha_t},\ \sigma=\sqrt{1-\bar\alpha_t}$ | scale of signal and of noise |
#
# Time runs from 0 (data) to $T$ (noise). Because the table starts at `abar[0] = 1`, the index in code is the $t$ of the text. Lesson 00 and the package write $\alpha$ for what is $a$ here, and let $t$ run over $[0,1]$; in this lesson $\alpha_t$ is always $1-\beta_t$, as in the DDPM paper.

# %% tags=["setup"]

# %%
import sympy

from condiff_ref.metrics import energy_distance
from condiff_ref.mixture import archipelago, line2
from condiff_ref.schedules import discrete
from condiff_ref.shapes import pad
from condiff_ref.viz import COLOURS
from condiff_ref.widgets import slider
from matplotlib.figure import Figure

torch.set_default_dtype(torch.float64)  # here we compare with exact answers


def rng(seed=0):
    return Generator().manual_seed(seed)


# %% [markdown]
# ## 1. Forward: from data to noise
#
# One step keeps a bit less of the signal and adds a bit of fresh noise $z\sim\mathcal N(0,I)$:
#
# $$x_t=\sqrt{1-\beta_t}\;x_{t-1}+\sqrt{\beta_t}\;z_t .$$
#
# Why the square roots? If $x_{t-1}$ has variance 1, then $x_t$ has variance $(1-\beta_t)+\beta_t=1$ again: nothing explodes.
#
# **Two steps are one step.** Put one into the other: the signal is multiplied by $\sqrt{\alpha_t\alpha_{t-1}}$, and the two independent noises have variance $\alpha_t\beta_{t-1}+\beta_t=1-\alpha_t\alpha_{t-1}$. Go on like this, $q(x_{1:t}\mid x_0)=\prod_i q(x_i\mid x_{i-1})$, and all $t$ steps collapse into one jump,
#
# $$x_t=\sqrt{\bar\alpha_t}\;x_0+\sqrt{1-\bar\alpha_t}\;\epsilon,\qquad\epsilon\sim\mathcal N(0,I).\tag{1}$$
#
# The choice of the table $\bar\alpha_t$ is called the *noise schedule*. Two are famous: *linear* betas from $10^{-4}$ to $0.02$ (Ho et al. 2020) and the *cosine* curve (Nichol & Dhariwal 2021).

# %% exercise="01.1"

# %% [markdown]
# **Predict before you run.** After all 1,000 steps of the linear schedule, how much of the picture's *amplitude* is left, in per cent: 0.006, 0.6 or 6?

# %%
guess_left = ...

# %%
T = 1000
abar = make_abar(T, "linear")
cosine_table = make_abar(T, "cosine")

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for name, table, colour in (("linear", abar, COLOURS["conditional"]), ("cosine", cosine_table, COLOURS["guided"])):
    left.plot(table.sqrt(), color=colour, label=f"{name}: signal")
    left.plot((1 - table).sqrt(), color=colour, ls=":", label=f"{name}: noise")
    right.plot(torch.arange(1, T), (table / (1 - table)).log()[1:T], color=colour, label=name)
left.set(xlabel="t", title="scales of signal and noise")
right.set(xlabel="t", title="log signal-to-noise ratio")
left.legend(fontsize=7), right.legend(fontsize=7)
plt.show()
reveal(guess_left, round(100 * float(abar[T].sqrt()), 1), " %")

# %% [markdown]
# *Left: the signal (solid) fades while the noise (dotted) grows, and their squares always add up to 1. Right: the same as one number per time, the logarithm of the signal-to-noise ratio $\bar\alpha_t/(1-\bar\alpha_t)$.*
#
# What is left at $t=T$ matters when you sample: a sampler starts from *pure* noise, so $\bar\alpha_T$ should be about 0. Stable Diffusion's schedule leaves 6.8 % of the amplitude. In training its network therefore still sees a picture's mean brightness at $t=T$ and learns to rely on it; real noise has none to show, and pictures come out middling grey (Lin et al. 2023). The cosine table has the opposite trouble: its last entry is 0 (but for rounding), and you will soon divide by $\sqrt{\bar\alpha_t}$. So never evaluate it at $t=T$ (Nichol & Dhariwal cut the betas at 0.999); this lesson uses the linear table.

# %% tags=["nbval-check-output"]
print("amplitude left at T: linear", f"{float(abar[T].sqrt()):.5f},", "cosine", f"{float(cosine_table[T].sqrt()):.5f}")
sd_betas = torch.linspace(0.00085**0.5, 0.012**0.5, T) ** 2  # Stable Diffusion's betas
print("Stable Diffusion:", f"{float((1 - sd_betas).prod().sqrt()):.5f}")

# %% [markdown]
# Now formula (1) itself. The batch may have any number of axes after the first, and every example has its own $t$.

# %% exercise="01.2"

# %% [markdown]
# ### The world in which we know everything
#
# `archipelago()` is a mixture of six Gaussians in the plane: three classes, two islands each. Noised, it is a mixture of Gaussians again, so whatever a network would have to *learn*, here it is a closed form. Your `q_sample` draws the picture.

# %%
world = archipelago()
x0, label = world.sample(1500, rng(1))
eps = torch.randn(x0.shape, generator=rng(2))

fig, axes = plt.subplots(1, 5, figsize=(12, 2.7), sharex=True, sharey=True)
for ax, time in zip(axes, (0, 100, 250, 500, 1000)):
    t = torch.full((len(x0),), time)
    ax.scatter(*q_sample(x0, t, eps, abar).T, s=2, c=label, cmap="Dark2")
    ax.set_title(f"t = {time}", fontsize=10)
plt.show()

# %% [markdown]
# *Six islands (colour: class): their centres move to the origin while noise widens them; at $t=1000$ all is one standard normal.*

# %% [markdown]
# ## 2. The score
#
# The **score** of a density is the gradient of its logarithm, $\nabla_x\log p(x)$: the direction in which the density grows, scaled by how fast. It needs no normalising constant, because $\nabla\log(p/Z)=\nabla\log p$.
#
# **If we knew $x_0$**, the density of $x_t$ would be a plain Gaussian, $q(x_t\mid x_0)=\mathcal N(a\,x_0,\ \sigma^2 I)$. Six steps lead to its score, in $d$ dimensions:
#
# 1. $q(x_t\mid x_0)=(2\pi)^{-d/2}\,|\Sigma|^{-1/2}\exp\big(-\tfrac12 (x_t-ax_0)^\top\Sigma^{-1}(x_t-ax_0)\big)$ with $\Sigma=\sigma^2I$
# 2. $|\Sigma|=\sigma^{2d}$ and $\Sigma^{-1}=I/\sigma^2$, so $q=(2\pi\sigma^2)^{-d/2}\exp\big(-\|x_t-ax_0\|^2/2\sigma^2\big)$
# 3. $\log q=-\tfrac d2\log(2\pi\sigma^2)-\|x_t-ax_0\|^2/2\sigma^2$
# 4. the first term does not depend on $x_t$: its gradient is 0
# 5. $\nabla_u\,u^\top u=2u$ (in general $\nabla_u\,u^\top A u=2Au$ for symmetric $A$), so $\nabla_{x_t}\log q=-(x_t-ax_0)/\sigma^2$
# 6. by (1), $x_t-ax_0=\sigma\epsilon$, so
#
# $$\nabla_{x_t}\log q(x_t\mid x_0)=-\frac{x_t-\sqrt{\bar\alpha_t}\,x_0}{1-\bar\alpha_t}=-\frac{\epsilon}{\sqrt{1-\bar\alpha_t}}.\tag{2}$$
#
# The score points *against* the noise. Let a computer-algebra system check steps 3 to 6, in one dimension (each coordinate is one):

# %% tags=["nbval-check-output"]
x, x_0, e = sympy.symbols("x x0 epsilon", real=True)
ab = sympy.symbols("abar", positive=True)
log_q = -sympy.log(2 * sympy.pi * (1 - ab)) / 2 - (x - sympy.sqrt(ab) * x_0) ** 2 / (2 * (1 - ab))
score = sympy.diff(log_q, x)
print("step 5 holds:", sympy.simplify(score + (x - sympy.sqrt(ab) * x_0) / (1 - ab)) == 0)
in_eps = score.subs(x, sympy.sqrt(ab) * x_0 + sympy.sqrt(1 - ab) * e)
print("step 6 holds:", sympy.simplify(in_eps + e / sympy.sqrt(1 - ab)) == 0)

# %% exercise="01.3"

# %% [markdown]
# **Find the wrong line.** A published set of lecture notes derives (2) in three lines:
#
# $$\text{(i)}\ -\frac{x_t-\sqrt{\bar\alpha_t}x_0}{1-\bar\alpha_t}\qquad\text{(ii)}\ -\frac{x_t-\sqrt{\bar\alpha_t}x_0}{\sqrt{1-\bar\alpha_t}}\cdot\frac{1}{1-\bar\alpha_t}\qquad\text{(iii)}\ -\frac{\epsilon}{\sqrt{1-\bar\alpha_t}}$$
#
# Which line is wrong, and by which factor? Settle it with numbers: $\bar\alpha=0.75,\ x_0=1,\ x_t=1.2$.

# %% tags=["nbval-check-output"]
ab_, x0_, xt_ = 0.75, 1.0, 1.2
e_ = (xt_ - ab_**0.5 * x0_) / (1 - ab_) ** 0.5
line_i = -(xt_ - ab_**0.5 * x0_) / (1 - ab_)
line_ii = -(xt_ - ab_**0.5 * x0_) / (1 - ab_) ** 0.5 / (1 - ab_)
line_iii = -e_ / (1 - ab_) ** 0.5
print(f"(i) {line_i:.9f}   (ii) {line_ii:.9f}   (iii) {line_iii:.9f}")

# %% [markdown]
# ### BEGIN SOLUTION
# Line (ii) is wrong: its last factor must be $1/\sqrt{1-\bar\alpha_t}$. As printed it is $-\epsilon/(1-\bar\alpha_t)$, too long by $1/\sqrt{1-\bar\alpha_t}$, here by a factor 2. Lines (i) and (iii) agree.
# ### END SOLUTION

# %% [markdown]
# ### One equation, three unknowns
#
# (1) ties $x_0$, $\epsilon$ and $x_t$ together: two of them give the third. A network may therefore predict whichever is convenient. A popular third choice is the *velocity* $v=a\,\epsilon-\sigma\,x_0$ (Salimans & Ho 2022): with $a=\cos\varphi$ and $\sigma=\sin\varphi$, the pair $(x_t,v)$ is the pair $(x_0,\epsilon)$ turned by the angle $\varphi$, and $v=\mathrm d x_t/\mathrm d\varphi$.

# %% exercise="01.4"

# %% [markdown]
# ## 3. But we do not know $x_0$
#
# When we sample there is no $x_0$ yet; we need the score of the **marginal** $p_t(x)=\int p(x_0)\,q(x\mid x_0)\,\mathrm dx_0$, an integral over all data that nobody can compute for pictures (for mixtures one can). Differentiate under the integral, and use $\nabla q=q\,\nabla\log q$:
#
# $$\nabla\log p_t(x)=\frac{\int p(x_0)\,q(x\mid x_0)\,\nabla\log q(x\mid x_0)\,\mathrm dx_0}{p_t(x)}=\mathbb E\big[\nabla\log q(x\mid x_0)\,\big|\,x_t=x\big]=-\frac{\mathbb E[\epsilon\mid x_t=x]}{\sigma}.\tag{3}$$
#
# The marginal score is the **average** of the conditional scores over all $x_0$ that could have led here, weighted by how likely each did. So, writing $\epsilon^*(x,t)=\mathbb E[\epsilon\mid x_t=x]$:
#
# > "The score is the negative scaled noise" is true of the noise's *conditional mean*, not of the noise that was drawn. The drawn $\epsilon$ is not a function of $x_t$: many $(x_0,\epsilon)$ make the same $x_t$.
#
# Solve (1) for $x_0$ inside the expectation and you have **Tweedie's formula**: $\ \mathbb E[x_0\mid x_t]=\big(x_t+\sigma^2\,\nabla\log p_t(x_t)\big)/a$.
#
#
# %% [markdown]
# With data points instead of an integral, (3) is a weighted average that you can program. For $M$ equally likely points, $q(x\mid x_0^{(m)})\propto\exp(-\|\epsilon_m\|^2/2)$ where $\epsilon_m$ is the noise that leads from point $m$ to $x$.

# %% exercise="01.5"

# %% [markdown]
# Does an average over data points find the exact $\epsilon^*$ of the world that they came from? Its error should be of the order of $1/\sqrt{\mathrm{ESS}}$, as each $\epsilon$ varies by about 1; we allow five times that. ESS $=1/\sum w_m^2$, the effective sample size, counts how many points really contribute.


# %% tags=["nbval-check-output"]
def exact_eps(xt, t):
    """E[eps | xt], from the closed form of the world."""
    sigma = pad((1 - abar[t]).sqrt(), xt)
    return -sigma * world.score(xt, t.double(), discrete(abar))


data = world.sample(20_000, rng(3))[0]
for time in (100, 300, 600):
    point = q_sample(torch.tensor([[-2.0, 1.0]]), torch.tensor([time]), torch.tensor([[0.5, -0.5]]), abar)[0]
    each = (point - abar[time].sqrt() * data) / (1 - abar[time]).sqrt()
    weights = torch.softmax(-(each**2).sum(1) / 2, 0)
    ess = float(1 / (weights**2).sum())
    error = float(
        (posterior_mean_eps(point, data, time, abar) - exact_eps(point[None], torch.tensor([time]))[0]).norm()
    )
    print(f"t = {time}: within 5 / sqrt(ESS):", error < 5 / ess**0.5)

# %% [markdown]
# **Predict before you run.** Class 0 lives on two islands, centred at $(-2,\,1)$ and $(1.1,\,1)$. Take a point between them, but nearer to the right one (all of it shrunk by $\sqrt{\bar\alpha_t}$, as the noised islands are). At *high* noise, does the score point to the nearer island, or to the middle of the two?

# %%
guess_high = ...  # "nearer" or "middle"

# %% tags=["nbval-check-output"]
pair = world.given(0)
start = torch.tensor([[0.2, 1.0]])  # the middle is at -0.45
for time in (50, 800):
    t = torch.tensor([time])
    xt = abar[t].sqrt()[:, None] * start
    direction = float(pair.score(xt, t.double(), discrete(abar))[0, 0])
    toward = "nearer" if direction > 0 else "middle"
    print(f"t = {time}: the score points to the {toward}")

# %%
reveal(guess_high, toward)

# %% [markdown]
# At high noise the score points between the islands, where there is no data at all. As the noise falls it turns towards one of them. Sampling runs from $T$ down to 0, so it cannot skip the levels in between: the *middle* of the way, here from about $t=600$ to $t=100$, decides which island a sample lands on. Before it nobody knows, after it nothing can change it (lesson 04 hangs on this).

# %%
grid = torch.cartesian_prod(torch.linspace(-3.2, 3.2, 17), torch.linspace(-3.2, 3.2, 17))


def draw_field(time):
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    ax = figure.add_subplot()
    t = torch.full((len(grid),), int(time))
    noisy = q_sample(x0[:600], torch.full((600,), int(time)), eps[:600], abar)
    ax.scatter(*noisy.T, s=3, color=COLOURS["noise"])
    arrows = -exact_eps(grid, t) / (1 - abar[t]).sqrt()[:, None]
    arrows = arrows / (1 + arrows.norm(dim=1, keepdim=True))  # long arrows are shortened, directions stay
    ax.quiver(*grid.T, *arrows.T, color=COLOURS["conditional"], angles="xy", scale=18, width=0.004)
    ax.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), title=f"score at t = {int(time)}")
    ax.set_aspect("equal")
    return figure


def describe(t):
    return f"The score field at t = {t:g}: at low noise to single islands, at high noise to the middle of all."


slider(draw_field, [10, 50, 100, 200, 300, 450, 600, 800], "t", describe, start=3)

# %% [markdown]
# ## 4. What a network learns
#
# Train a network $f$ with squares, $\mathbb E\|\epsilon-f(x_t,t)\|^2$. Write $\epsilon-f=(\epsilon-\epsilon^*)+(\epsilon^*-f)$; the cross term vanishes, because $\epsilon-\epsilon^*$ has mean 0 given $x_t$ while $\epsilon^*-f$ is a function of $x_t$:
#
# $$\mathbb E\|\epsilon-f\|^2=\underbrace{\mathbb E\|\epsilon-\epsilon^*\|^2}_{\text{floor: no network can go below}}+\underbrace{\mathbb E\|\epsilon^*-f\|^2}_{\text{what training removes}}.\tag{4}$$
#
# So least squares learns exactly $\epsilon^*$ (given enough data and a network that can express it; on a finite set it learns that set's $\epsilon^*$, see lesson 02), and by (3) **a network that predicts noise is a network that knows the score**: $\ s_\theta(x,t)=-\epsilon_\theta(x,t)/\sigma$ (the index $\theta$ stands for the network's weights). Dividing (4) by $\sigma^2$ turns it into the statement of *denoising score matching* (Vincent 2011): the loss $\mathbb E\|-\epsilon/\sigma-s_\theta(x_t,t)\|^2$, which compares with the conditional score that we know, is minimised by the same network as the comparison with the marginal score, which we do not know; the two differ by a constant $C$, the floor.

# %% exercise="01.6"

# %% [markdown]
# **Predict before you run.** We run your `dsm_loss` on a *perfect* network (the closed form), at the time when signal and noise are equally strong, $\bar\alpha_t\approx\tfrac12$. The loss is: 0, about 0.05, or about 0.5?

# %%
guess_loss = ...


# %%
class Perfect(nn.Module):
    def forward(self, xt, t):
        return exact_eps(xt, t)


n = 20_000
clean, noise = world.sample(n, rng(4))[0], torch.randn(n, 2, generator=rng(5))
half = int((abar - 0.5).abs().argmin())
perfect_loss = float(dsm_loss(Perfect(), clean, torch.full((n,), half), noise, abar))
reveal(guess_loss, round(perfect_loss, 1), close=0.05)

# %% [markdown]
# A perfect network has a large loss! The floor of (4) is the variance of $\epsilon$ given $x_t$; since $\sigma\epsilon=x_t-ax_0$, that is $(a/\sigma)^2\,\mathrm{Cov}(x_0\mid x_t)$, which this world knows in closed form. Per entry ($d=2$):

# %%
times = torch.tensor([10, 25, 50, 100, 150, 200, 250, 300, 400, 500, 650, 800, 950])
measured, floor = [], []
for time in times:
    t = time.expand(4000)
    measured.append(float(dsm_loss(Perfect(), clean[:4000], t, noise[:4000], abar)))
    xt = q_sample(clean[:4000], t, noise[:4000], abar)
    trace = world.posterior_cov(xt, t.double(), discrete(abar)).diagonal(dim1=1, dim2=2).sum(1)
    floor.append(float((abar[time] / (1 - abar[time]) * trace / 2).mean()))

plt.figure(figsize=(6, 3))
plt.plot(times, floor, color=COLOURS["data"], label="floor, closed form")
plt.plot(times, measured, "o", color=COLOURS["guided"], label="your dsm_loss on a perfect network")
plt.gca().set(xlabel="t", ylabel="loss per entry", ylim=(0, 1.05), title="a perfect network's loss")
plt.legend()
plt.show()

# %% tags=["nbval-check-output"]
print("agree within 0.03 everywhere:", all(abs(a - b) < 0.03 for a, b in zip(measured, floor)))

# %% [markdown]
# *At low noise almost everything about $\epsilon$ is unknowable (the loss is near 1), at high noise almost nothing. A loss by itself says little; the gap to the floor is what training can still remove. The bump near $t=250$ is where the islands merge and it becomes uncertain which one a point came from.*

# %% [markdown]
# **The same floor by another route** (you may skip this). Divided by $\sigma^2$ and summed over the $d$ entries, the floor is also $C=\dfrac{d}{1-\bar\alpha}-J$, where $J=\mathbb E\|\nabla\log p_t\|^2$ (the Fisher information of $p_t$): the mean square of the conditional score minus that of the marginal one. It does not depend on the network, but it does depend on $t$. Two cases that you can do by hand: data $\mathcal N(0,1)$ stay $\mathcal N(0,1)$, so $J=1$; data $\mathcal N(0,v)$ become $\mathcal N(0,\bar\alpha v+1-\bar\alpha)$ with $J=1/(\bar\alpha v+1-\bar\alpha)$.

# %% tags=["nbval-check-output"]
for v, ab_ in ((1.0, 0.5), (0.25, 0.75)):
    by_fisher = 1 / (1 - ab_) - 1 / (ab_ * v + 1 - ab_)
    posterior_variance = 1 / (1 / v + ab_ / (1 - ab_))  # precisions add
    by_posterior = ab_ / (1 - ab_) ** 2 * posterior_variance
    print(f"v = {v}, abar = {ab_}: by Fisher information {by_fisher:.9f}, by posterior variance {by_posterior:.9f}")

# %% [markdown]
# A third case needs an integral (here a sum over a fine grid): two islands, $\mathcal N(-1,\tfrac14)$ and $\mathcal N(1,\tfrac14)$, equally likely, at $\bar\alpha=\tfrac12$.

# %% tags=["nbval-check-output"]
two, level = line2(1.0, 0.25), discrete(torch.tensor([1.0, 0.5]))  # a table of one step
fine = torch.linspace(-8, 8, 4001)[:, None]
ones = torch.ones(len(fine))
mass = two.log_prob(fine, ones, level).exp() * 16 / 4000
by_fisher = 1 / 0.5 - float((mass * two.score(fine, ones, level)[:, 0] ** 2).sum())
by_posterior = 0.5 / 0.5**2 * float((mass * two.posterior_cov(fine, ones, level)[:, 0, 0]).sum())
print(f"two islands: by Fisher information {by_fisher:.9f}, by posterior variance {by_posterior:.9f}")

# %% [markdown]
# ### "The factor $1/(1-\bar\alpha_t)$ is just a constant": is it?
#
# Plain score matching, (4) divided by $\sigma^2$, weights each time with $1/(1-\bar\alpha_t)$; DDPM's *simple loss* leaves that out, and lecture notes often say "it is just a constant". At one fixed $t$ that is harmless: the minimum stays where it is. But one network serves all times, and over the table the factor changes. By how much?

# %% tags=["nbval-check-output"]
print(f"{float((1 - abar[T]) / (1 - abar[1])):.1f} : 1")

# %% [markdown]
# A small experiment settles it. Let a "network" have a single number, $\epsilon_\theta=\theta x$, shared by two noise levels $1-\bar\alpha\in\{0.1,\,0.9\}$, with data $\mathcal N(0,1)$. Then $\mathbb E[\epsilon x_t]=\sigma$ and $\mathbb E[x_t^2]=1$, so the loss is $\sum_i w_i(\theta^2-2\theta\sigma_i+1)$ with its minimum at $\theta=\sum w_i\sigma_i/\sum w_i$.

# %% tags=["nbval-check-output"]
sigmas = torch.tensor([0.1, 0.9]).sqrt()
simple = sigmas.mean()
weighted = (sigmas / sigmas**2).sum() / (1 / sigmas**2).sum()
print(f"simple loss: theta = {float(simple):.9f}    weighted by 1/(1 - abar): theta = {float(weighted):.9f}")

# %% [markdown]
# Two different networks. Dropping the factor is a *choice of weights* across noise levels (DDPM found that it makes better pictures), not the removal of a constant.
#
# ## 5. One step back: DDPM
#
# $q(x_{t-1}\mid x_t)$ is what we would like to sample from. For most data it is *not* a Gaussian, except in the limit of small steps. What is exactly Gaussian is the same thing with $x_0$ given: the product of $q(x_t\mid x_{t-1})$ and $q(x_{t-1}\mid x_0)$, as a function of $x_{t-1}$. Precisions add, so its variance is
#
# $$\tilde\beta_t=\Big(\frac{\alpha_t}{\beta_t}+\frac1{1-\bar\alpha_{t-1}}\Big)^{-1}=\frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t,$$
#
# and its mean is $\tilde\beta_t\Big(\dfrac{\sqrt{\alpha_t}}{\beta_t}x_t+\dfrac{\sqrt{\bar\alpha_{t-1}}}{1-\bar\alpha_{t-1}}x_0\Big)$. With $x_0=(x_t-\sigma\epsilon)/a$ put in, it becomes
#
# $$\mu=\frac1{\sqrt{\alpha_t}}\Big(x_t-\frac{\beta_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon\Big).\tag{5}$$

# %% tags=["nbval-check-output"]
A, B, xt_s, e_s = sympy.symbols("A B x_t epsilon", positive=True)  # A = alpha_t, B = abar_{t-1}; abar_t = A B
x0_s = (xt_s - sympy.sqrt(1 - A * B) * e_s) / sympy.sqrt(A * B)
variance = 1 / (A / (1 - A) + 1 / (1 - B))
mean = variance * (sympy.sqrt(A) / (1 - A) * xt_s + sympy.sqrt(B) / (1 - B) * x0_s)
print("variance:", sympy.simplify(variance - (1 - B) / (1 - A * B) * (1 - A)) == 0)
print("mean (5):", sympy.simplify(mean - (xt_s - (1 - A) / sympy.sqrt(1 - A * B) * e_s) / sympy.sqrt(A)) == 0)

# %% [markdown]
# Sampling uses (5) with $\epsilon^*$, or a network's estimate, for the unknown $\epsilon$. For the variance two choices are in use, each exact for one extreme: $\tilde\beta_t$ (exact if the data were a single point) and $\beta_t$ (exact if the data were $\mathcal N(0,I)$); they agree as the steps get small (later models learn the variance, in between). The last step adds no noise: its result is the picture.

# %% exercise="01.7"

# %% [markdown]
# **Where sources disagree.** Two slides of one deck print (5) with other bars: once with $\sqrt{1-\alpha_t}$ under the fraction, once with bars on all alphas. At $t=500$, $x_0=0.7$, $x_t=-0.4$ (so that we know which $\epsilon$ leads there), they give different steps.

# %% tags=["nbval-check-output"]
t, xt, x0_one = torch.tensor([500]), torch.tensor([[-0.4]]), torch.tensor([[0.7]])
e_one = eps_from_x0(xt, x0_one, t, abar)
alpha_t = abar[t] / abar[t - 1]
no_bar = (xt - (1 - alpha_t) / (1 - alpha_t).sqrt() * e_one) / alpha_t.sqrt()
all_bars = (xt - (1 - abar[t]) / (1 - abar[t]).sqrt() * e_one) / abar[t].sqrt()
print(
    f"(5): {float(ddpm_mean(xt, e_one, t, abar)):.9f}   no bar: {float(no_bar):.9f}   all bars: {float(all_bars):.9f}"
)

# %% [markdown]
# With bars everywhere the formula gives back $x_0$ itself: it is `x0_from_eps`, a jump to the end in one step. Without the bar the noise is divided by $\sqrt{1-\alpha_t}$ instead of $\sqrt{1-\bar\alpha_t}$, so the step removes 9.6 times too much of it here.
#
# **Is $q(x_{t-1}\mid x_t)$ Gaussian?** Take two data points $\pm1$, $\bar\alpha_{t-1}=0.9$, and look from $x_t=0$. The excess kurtosis, $\mathbb E z^4/(\mathbb E z^2)^2-3$, is 0 for a Gaussian.

# %% tags=["nbval-check-output"]
z = torch.linspace(-6, 6, 240_001)
for beta in (0.9, 0.1, 0.001):
    log_p = -((z[:, None] - 0.9**0.5 * torch.tensor([-1.0, 1.0])) ** 2 / 0.2).double()
    log_p = log_p.logsumexp(1) - ((1 - beta) ** 0.5 * z) ** 2 / (2 * beta)
    p = log_p.softmax(0)
    m2, m4 = (p * z**2).sum(), (p * z**4).sum()
    print(f"beta = {beta}: excess kurtosis {float(m4 / m2**2 - 3):.6f}")

# %% [markdown]
# "If the forward step is Gaussian, so is the reverse step" is true for all data only as $\beta\to0$ (Feller): this is why DDPM takes a thousand small steps.
#
# **The bound behind it** (you may skip this). DDPM's training bound, in nats, is $\mathbb E_q[L_T+\sum_{t=2}^{T}L_{t-1}+L_0]$, with $L_T=D_{KL}(q(x_T\mid x_0)\,\|\,p(x_T))$, $L_{t-1}=D_{KL}(q(x_{t-1}\mid x_t,x_0)\,\|\,p_\theta(x_{t-1}\mid x_t))$ and $L_0=-\log p_\theta(x_0\mid x_1)$. $L_T$ has nothing to learn. $L_{t-1}$ compares two Gaussians whose variances are fixed ($p_\theta(x_{t-1}\mid x_t)=\mathcal N(\mu_\theta(x_t,t),\sigma_t^2I)$), so it is a squared distance of means, $\mathbb E\big[\|\tilde\mu-\mu_\theta\|^2/2\sigma_t^2\big]+C$, where $C$ has no parameters and is 0 for $\sigma_t^2=\tilde\beta_t$; and with (5) a squared distance of noises with the weight $\frac{\beta_t^2}{2\sigma_t^2\alpha_t(1-\bar\alpha_t)}$. (The weight at $t=1$ is that of $L_0$ with a Gaussian decoder of variance $\beta_1$. Slides often mix $L_t$ and $L_{t-1}$, or give the simple loss a subscript $t$ that it averages over.) The simple loss sets that weight to 1.

# %% tags=["nbval-check-output"]
print(f"L_T, per entry, for x0 = 1: {float(-(1 - abar[T]).log() / 2):.3e} nats")
for time in (1, 1000):
    alpha_t = abar[time] / abar[time - 1]
    weight = (1 - alpha_t) ** 2 / (2 * (1 - alpha_t) * alpha_t * (1 - abar[time]))
    print(f"weight at t = {time}, variance beta: {float(weight):.6f}")

# %% [markdown]
# ## 6. Leaping: DDIM
#
# DDPM forgets its own noise at each step. DDIM (Song, Meng & Ermon 2021) keeps it: estimate $\hat x_0$ from $x_t$ and $\hat\epsilon$, then put the *same* $\hat\epsilon$ back at the strength of any earlier time $s<t$,
#
# $$x_s=\sqrt{\bar\alpha_s}\;\hat x_0+\sqrt{1-\bar\alpha_s}\;\hat\epsilon.\tag{6}$$
#
# No randomness, and no need for $s=t-1$. At $s=0$ it returns $\hat x_0$, because `abar[0]` is 1.

# %% exercise="01.8"

# %% [markdown]
# A closed form to hold it against: for data $\mathcal N(0,1)$ we have $\epsilon^*=\sigma x_t$, and with $\sqrt{\bar\alpha}=\cos\varphi$ one step of (6) multiplies by $\cos\varphi_t\cos\varphi_s+\sin\varphi_t\sin\varphi_s=\cos(\varphi_t-\varphi_s)$.

# %% tags=["nbval-check-output"]
xt, t, s = torch.tensor([[0.7], [-1.2]]), torch.tensor([900, 400]), torch.tensor([500, 0])
phi = torch.acos(abar.sqrt())
step = ddim_step(xt, (1 - abar[t]).sqrt()[:, None] * xt, t, s, abar)
print("DDIM on a Gaussian is a multiplication by cos:", torch.allclose(step, torch.cos(phi[t] - phi[s])[:, None] * xt))

# %% [markdown]
# The product of these cosines along the way is below 1: 50 steps leave a standard deviation of 0.964, a single one leaves the mean and nothing else. DDIM leaps, but not for free.

# %% [markdown]
# ### From noise to islands
#
# Everything is in place: $\epsilon^*$ is exact, the steps are yours. **Predict before you run:** DDPM with 1,000 steps or DDIM with 50, which comes closer to the data (energy distance, 0 = equal)?

# %%
guess_closer = ...  # "DDPM", "DDIM" or "equal"


# %%
def walk(method, steps, x, generator):
    """All the points on the way from x_T to x_0."""
    times = torch.linspace(T, 0, steps + 1).round().long()
    path = [x]
    for t, s in zip(times[:-1].tolist(), times[1:].tolist()):
        t_all, s_all = torch.full((len(x),), t), torch.full((len(x),), s)
        if method == "DDIM":
            x = ddim_step(x, exact_eps(x, t_all), t_all, s_all, abar)
        else:
            x = ddpm_step(x, exact_eps(x, t_all), t_all, torch.randn(x.shape, generator=generator), abar)
        path.append(x)
    return path


n = 500 if SMOKE else 2000
start = torch.randn(n, 2, generator=rng(6))
runs = {"DDIM": walk("DDIM", 50, start, rng(7)), "DDPM": walk("DDPM", T, start, rng(7))}

fig, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharex=True, sharey=True)
for ax, (name, path) in zip(axes, runs.items()):
    ax.scatter(*path[-1].T, s=2, color=COLOURS["conditional"])
    for k, colour in enumerate((COLOURS["guided"], COLOURS["data"], COLOURS["unconditional"])):
        way = torch.stack([p[k] for p in path])
        ax.plot(*way.T, color=colour, lw=1.4 if name == "DDIM" else 0.4)
        ax.plot(*way[0], "x", color=colour, ms=7)
        ax.plot(*way[-1], "o", color=colour, ms=5)
    ax.set_title(f"{name}: samples, and three paths from x to dot, {len(path) - 1} steps", fontsize=10)
plt.show()

# %% tags=["nbval-check-output"]
truth = world.sample(n, rng(8))[0]
distances = {name: energy_distance(path[-1], truth) for name, path in runs.items()}
floor_distance = max(float(energy_distance(world.sample(n, rng(k))[0], truth)) for k in range(9, 19))
print("both within 0.05 of the data:", all(float(d) < 0.05 for d in distances.values()))

# %%
print({name: f"{float(d):.4f}" for name, d in distances.items()}, f"ten samples of the data: <= {floor_distance:.4f}")
closer = min(distances, key=distances.get)
difference = abs(float(distances["DDIM"] - distances["DDPM"]))
reveal(guess_closer, "equal" if difference < floor_distance else closer)

# %% [markdown]
# *Same starting points, same field, two kinds of path: DDIM's are smooth, DDPM's wander. Both stay below the floor: with so many samples they cannot be told from the data, nor from each other.* With DDIM each starting noise always leads to the same picture; "one noise gives one image" is true of deterministic samplers only.
#
# ### From the museum of real bugs: the last step
#
# Several published code bases end their sampling loop at $t=1$, or use $\bar\alpha_{\text{prev}}\ne1$ in the last step. **What do you expect to see?** Nothing, with the naked eye:

# %% tags=["nbval-check-output"]
xs, es = world.sample(5000, rng(8))[0], torch.randn(5000, 2, generator=rng(9))
t = torch.full((5000,), 500)
xt = q_sample(xs, t, es, abar)
for end in (0, 1):
    result = ddim_step(xt, es, t, torch.full_like(t, end), abar)
    print(f"ending at s = {end}: distance from the clean points {float((result - xs).std()):.4f}")

# %% [markdown]
# A grain of 0.01, which is $\sqrt{1-\bar\alpha_1}$: invisible in a picture, not for a measurement, and found by the one-line property "at $s=0$ the step returns $\hat x_0$". Properties see what eyes do not. So now *you* write the test.

# %% exercise="01.9"

# %% [markdown]
# ## 7. The same thing in the package
#
# `condiff_ref` writes all this for any path $x_t=\alpha x_0+\sigma\epsilon$ (its $\alpha$ is our $a$), with $t\in[0,1]$, and lets a network predict any `kind`: each is `out = a x0 + b eps`, which together with $x_t$ makes two equations in two unknowns. Your functions are its special case for DDPM's table:

# %% tags=["nbval-check-output", "skip-grading"]
from condiff_ref.predictions import solve, target
from condiff_ref.schedules import add_noise

path = discrete(abar)
xs, es, t = (
    torch.randn(5, 3, generator=rng(1)),
    torch.randn(5, 3, generator=rng(2)),
    torch.tensor([1, 250, 500, 750, 1000]),
)
xt, t_float = q_sample(xs, t, es, abar), t.double()
print("add_noise:", torch.allclose(xt, add_noise(xs, es, t_float, path)))
print("solve:", torch.allclose(x0_from_eps(xt, es, t, abar), solve("eps", es, xt, t_float, path)[0]))
print("v:", torch.allclose(v_from(xs, es, t, abar), target("v", xs, es, t_float, path)))
print("score:", torch.allclose(score_from_eps(es, t, abar), target("score", xs, es, t_float, path)))

# %% [markdown]
# ## 8. What it costs, what to keep
#
# **Cost.** One network evaluation per step: 1,000 for DDPM, 20 to 50 for DDIM, at a small loss of quality. Training costs one evaluation and its backward pass per example, at one random $t$.
#
# **Keep.**
# - $x_t=\sqrt{\bar\alpha_t}x_0+\sqrt{1-\bar\alpha_t}\epsilon$: everything follows from this line.
# - Score $=-\mathbb E[\epsilon\mid x_t]/\sigma$. A network trained with squares learns that mean, and its loss has a floor far above 0.
# - Given two of $x_0,\epsilon,x_t$ you have the third; $v$ and the score are further names for the same information.
# - $q(x_{t-1}\mid x_t,x_0)$ is exactly Gaussian, $q(x_{t-1}\mid x_t)$ in general only for small steps. DDIM needs no Gaussian, but it holds $\hat\epsilon$ fixed during a step, which is exact only for small ones too.
#
# ## Questions
#
# 1. Is a network's output $\epsilon_\theta(x_t,t)$ an estimate of the noise that was added?
# ### BEGIN SOLUTION
# *Of its mean given $x_t$. That differs from the noise that was added by something with variance about 0.5 per entry at half noise (in this world), and no training removes it.*
# ### END SOLUTION
# 2. Why does the score suffice to sample, when we never learn the density itself?
# ### BEGIN SOLUTION
# *Each step needs only $\epsilon^*=-\sigma\,\nabla\log p_t$ at the present point. The normalising constant drops out of the gradient, which is why diffusion models need not compute it.*
# ### END SOLUTION
# 3. Someone reports a training loss of 0.03 on pictures and concludes that their network is nearly perfect. What is missing?
# ### BEGIN SOLUTION
# *The floor. Neighbouring pixels are so alike that most of the noise can be told from the picture even at modest noise, so the floor itself is low; only the distance to it counts, and the floor depends on $t$ and on the weights.*
# ### END SOLUTION
# 4. DDPM's variance may be $\beta_t$ or $\tilde\beta_t$. At which $t$ do they differ most, as a ratio?
# ### BEGIN SOLUTION
# *At $t=1$, where $\tilde\beta_1=0$ and $\beta_1=10^{-4}$: the ratio is infinite. Late in the table they agree to a fraction of a per cent.*
# ### END SOLUTION
# 5. In (4), where was it used that $f$ sees only $x_t$ and $t$?
# ### BEGIN SOLUTION
# *In the cross term: given $x_t$, $\epsilon^*-f$ is a constant and $\epsilon-\epsilon^*$ has mean 0. A network that also saw $x_0$ could reach loss 0.*
# ### END SOLUTION
#
# **Sources.** Sohl-Dickstein et al. 2015; Ho, Jain & Abbeel 2020 (equations 4 to 14); Vincent 2011; Song et al. 2021; Song, Meng & Ermon 2021; Nichol & Dhariwal 2021; Salimans & Ho 2022; Lin et al. 2023.
