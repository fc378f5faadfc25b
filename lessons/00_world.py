# %% [markdown]
# # 00 · A world that can be checked
#
# **Question.** Samples look right. How would you know that they *are*?
#
# **You need** Python and PyTorch tensors. No GPU, no network, nothing of diffusion yet.
#
# **You get** a first conditional model on this machine within a minute; a world of six islands in which every answer is known; and the way the exercises of this course work.
#
# Run the cells from top to bottom (Shift+Enter). Where a cell says `raise NotImplementedError`, it is your turn.

# %% tags=["setup"]

# %%
import tempfile
from pathlib import Path

from condiff_ref import recipes
from condiff_ref.checkpoints import train_recipe
from condiff_ref.generate import Guidance, generate
from condiff_ref.guidance import cfg
from condiff_ref.mixture import archipelago
from condiff_ref.samplers import ddim_step, sample
from condiff_ref.schedules import cosine, time_grid
from condiff_ref.viz import COLOURS, show_tile
from condiff_ref.widgets import slider
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse


def rng(seed=0):
    return Generator().manual_seed(seed)


# %% [markdown]
# ## 1. First success: choose a digit
#
# A generative model draws samples $x\sim p(x)$ of what it was trained on: *some* digit. Mostly we want a say: this digit, this caption, this outline. That is **conditional generation**, $x\sim p(x\mid y)$, where $y$ may be a class label (this lesson to lesson 05), a text, a picture (06 to 09).
#
# The next cell trains a small conditional diffusion model (it starts from noise and removes it step by step) on 1,397 real handwritten digits, for 15 seconds. By lesson 05 you will have written every part of it yourself.

# %% tags=["nbval-ignore-output", "skip-grading"]
folder = Path(tempfile.mkdtemp())
budget = dict(steps=20) if SMOKE else dict(seconds=15.0)
model = train_recipe(
    recipes.find("digits-unet"), folder / "digits.safetensors", device=device, progress=False, **budget
)

# %% tags=["nbval-ignore-output", "skip-grading"]
wanted = 7  # change me, and run this cell again

pictures = generate(model, torch.full((10,), wanted), Guidance(scale=2.0), seed=wanted)
fig, ax = plt.subplots(figsize=(8, 1.2))
show_tile(ax, pictures, 10, f"ten samples of the digit {wanted}")
plt.show()

# %% [markdown]
# *Ten pictures that nobody has written, 8x8 pixels each.* The model was told "seven" in two ways: it was trained with labels, and at sampling time it was **guided**: the label was made to count double (`scale=2.0`). What guidance really does is the centre of this course, and it is not what is often said.
#
# | how to condition | idea | lesson |
# |---|---|---|
# | class-conditional training | give the network the label | 02 |
# | classifier guidance | steer an unconditional model with the gradient of a classifier | 03 |
# | classifier-free guidance | one network, with and without the label; stretch the difference | 04, 05 |
# | by architecture | text through cross-attention, outlines through ControlNet, gates in a transformer | 06 to 08 |
#
# Each costs something, and each trades how *varied* samples are against how well they *obey*; you will measure both.

# %% [markdown]
# Back to the question: these *look* right. Are they? How often does each way of writing a seven appear? Is one missing? Looking cannot tell.
#
# So each idea here is first tried in a world where the answer is known exactly, and only then on pictures.
#
# <details><summary>Where diffusion stands among its relatives</summary>
#
# | family | trained by | known trouble |
# |---|---|---|
# | GAN | a game: $\min_G\max_D\ \mathbb E_{x\sim p}\log D(x)+\mathbb E_z\log(1-D(G(z)))$; at its solution the value is $-2\log 2$ | unstable; *mode collapse*: kinds of samples go missing |
# | VAE | a bound: $-\log p(x)\le\mathbb E_q[-\log p(x\mid z)]+D_{KL}(q(z\mid x)\,\|\,p(z))$; the gap is $D_{KL}(q(z\mid x)\,\|\,p(z\mid x))$ | blur; *posterior collapse*: $q(z\mid x)$ ignores $x$ when the decoder is strong |
# | diffusion | least squares: predict the noise that was added | many steps per sample |
#
# Mode collapse is not memorisation, and posterior collapse is not about the prior being unrealistic, though both are often said to be.
# </details>

# %% [markdown]
# ## 2. How checks work
#
# Each exercise is followed by a check. It does not compare your code with ours: it tries *facts* that every right answer satisfies, on fresh random inputs. If one does not hold it says which, and often what you did. Here is a wrong answer to an exercise of lesson 01. Run the cell and read what the check makes of it.


# %% tags=["nbval-ignore-output"]
def wrong_q_sample(x0, t, eps, abar):
    a = abar[t].reshape(-1, *[1] * (x0.ndim - 1))
    return a * x0 + (1 - a).sqrt() * eps


_ = check("01.2", wrong_q_sample)

# %% [markdown]
# - ✓ and ✗ mark the facts; a dot is one that could not be tried, because the code stopped earlier. *You implemented* is the formula that the check read out of the code by calling it.
# - Stuck? `check("01.2", your_function, hint=2)` says where to look, `hint=3` gives the answer away.
# - A check returns your function if it is right, and else the course's own, so that the cells below always run.
# - `seed=...` repeats the inputs of an earlier check.
#
# There are also questions to answer *before* running a cell. Guess; being wrong is the useful case.
#
# ## 3. Six islands
#
# The world is a **Gaussian mixture** in the plane: a point is drawn by first drawing a component $k$ with probability $w_k$, then $x\sim\mathcal N(\mu_k,S_k)$. Its density is
#
# $$p(x)=\sum_k w_k\,\mathcal N(x;\mu_k,S_k),\qquad \log\mathcal N(x;\mu,S)=-\tfrac12\Big[(x-\mu)^\top S^{-1}(x-\mu)+\log|S|+D\log 2\pi\Big].$$
#
# The logarithm of the sum needs care. Far from all islands each term underflows to 0, and $\log 0=-\infty$, though the true value is an ordinary number such as $-500{,}000$. Take out the largest exponent $m$ first:
#
# $$\log\sum_k e^{l_k}=m+\log\sum_k e^{l_k-m}.$$
#
# The largest term of the new sum is 1, so the sum lies between 1 and $K$; terms may still underflow, but only where they do not count. This is `torch.logsumexp`.

# %% exercise="00.1"

# %%
world = archipelago()
w, mu, S = world.weights, world.means, world.covs  # six components; world.labels has the class of each
axis = torch.linspace(-3.2, 3.2, 161, dtype=torch.float64)
grid = torch.cartesian_prod(axis, axis)


def contours(ax, log_density, colour=COLOURS["data"]):
    """Lines of equal density, each a factor of e^1.5 apart; the innermost is just below the peak."""
    top = float(log_density.max())
    levels = [top - 6, top - 4.5, top - 3, top - 1.5, top - 0.3]
    ax.contour(
        axis, axis, log_density.reshape(161, 161).T, levels=levels, colors=colour, linewidths=0.8, linestyles="solid"
    )
    ax.set_aspect("equal")


fig, ax = plt.subplots(figsize=(4.5, 4.5))
contours(ax, gmm_logp(grid, w, mu, S))
for k, (x, y) in enumerate(mu.tolist()):
    ax.text(x, y, f"class {int(world.labels[k])}", ha="center", va="center", fontsize=8)
ax.set_title("the archipelago, drawn by your gmm_logp", fontsize=10)
plt.show()

# %% [markdown]
# *Three classes, two islands each. Class 0 has a lonely island (left) and a crowded one, pressed between those of class 1.*

# %% [markdown]
# **Responsibilities.** Which island did a point come from? By Bayes,
#
# $$r_k(x)=p(k\mid x)=\frac{w_k\,\mathcal N(x;\mu_k,S_k)}{\sum_j w_j\,\mathcal N(x;\mu_j,S_j)},$$
#
# a softmax over the same logarithms that you have just summed. Adding the responsibilities of a class's islands gives $p(y\mid x)$: the best possible classifier, for free (it is unsure where islands overlap, and rightly so). (The bars of a figure below are made of them.)

# %% [markdown]
# ## 4. Which way is uphill?
#
# Diffusion models do not learn densities, they learn their **score** $\nabla_x\log p(x)$. Autograd can compute it from any log-density; from here on it is the judge of every closed form (a formula, as against a trained network).
#
# One thing to think about: `logp(x)` gives $N$ numbers, and autograd differentiates a single one. The sum will do: $\log p(x_i)$ does not depend on $x_j$, so the gradient of the sum holds each point's own gradient.

# %% exercise="00.2"

# %%
coarse = torch.cartesian_prod(axis[::10], axis[::10])
arrows = autograd_score(lambda x: gmm_logp(x, w, mu, S), coarse)
arrows = arrows / (1 + arrows.norm(dim=1, keepdim=True))  # long ones are shortened

fig, ax = plt.subplots(figsize=(4.5, 4.5))
contours(ax, gmm_logp(grid, w, mu, S), COLOURS["noise"])
ax.quiver(*coarse.T, *arrows.T, color=COLOURS["conditional"], angles="xy", scale=18, width=0.004)
ax.set_title("the score of the clean world", fontsize=10)
plt.show()

# %% [markdown]
# *Every arrow climbs towards the islands. The empty strips are watersheds, where arrows part and the score is nearly 0.*

# %% [markdown]
# **With noise.** Diffusion works with noisy points, $x_t=\alpha x_0+\sigma\epsilon$ with $\epsilon\sim\mathcal N(0,I)$. How $\alpha$ and $\sigma$ run with the time $t$, from 0 (clean) to 1 (noise), is called a *path*; lesson 01 explains it. Here we take $t=\tfrac12$ on the "cosine" path, where $\alpha=\sigma=\sqrt{1/2}$.
#
# Noising turns $\mathcal N(\mu,S)$ into $\mathcal N(\alpha\mu,\ \alpha^2S+\sigma^2I)$, so a noised mixture is a mixture again. That is the whole trick of this world: whatever a network would have to learn, at every noise level, is a formula. Does the package's formula agree with your autograd, at the point $(0.3, 0.7)$?

# %% tags=["nbval-check-output"]
point, half = torch.tensor([[0.3, 0.7]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
path = cosine()
noised_logp = lambda x: gmm_logp(x, w, 0.5**0.5 * mu, 0.5 * S + 0.5 * torch.eye(2, dtype=torch.float64))  # noqa: E731
print("autograd:   ", [round(v, 9) for v in autograd_score(noised_logp, point)[0].tolist()])
print("closed form:", [round(v, 9) for v in world.score(point, half, path)[0].tolist()])
print("p(y | x):   ", [round(float(world.class_log_prob(point, half, path, y).exp()), 9) for y in range(3)])

# %% [markdown]
# Move the slider. The orange dot is the noisy point $x_t$, the arrow the score there, the blue dot and ellipse (two standard deviations) what can be known about the clean point $x_0$, the bars the class probabilities. The grey lines are the *clean* world; the ellipse may cover empty sea, where the truth is one of several islands. Change `here` and run again.

# %%
here = torch.tensor([[0.3, 0.7]], dtype=torch.float64)  # change me


def chances(t):
    time = torch.tensor([t], dtype=torch.float64)
    return [float(world.class_log_prob(here, time, path, y).exp()) for y in range(3)]


def look(t):
    time = torch.tensor([t], dtype=torch.float64)
    mean, cov = world.posterior_mean(here, time, path)[0], world.posterior_cov(here, time, path)[0]
    score = world.score(here, time, path)[0]
    lengths, axes_ = torch.linalg.eigh(cov)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    contours(left, gmm_logp(grid, w, mu, S), COLOURS["noise"])
    angle = math.degrees(math.atan2(float(axes_[1, 1]), float(axes_[0, 1])))
    width, height = (4 * lengths.flip(0).clamp(min=0).sqrt()).tolist()
    left.add_patch(Ellipse(mean.tolist(), width, height, angle=angle, color=COLOURS["conditional"], alpha=0.3))
    left.plot(*mean, "o", color=COLOURS["conditional"], ms=4)
    left.plot(*here[0], "o", color=COLOURS["guided"])
    tip = score / (1 + score.norm())
    left.annotate(
        "", (here[0] + tip).tolist(), here[0].tolist(), arrowprops=dict(arrowstyle="->", color=COLOURS["guided"])
    )
    left.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))
    right.bar(["0", "1", "2"], chances(t), color=COLOURS["conditional"])
    right.set(ylim=(0, 1), xlabel="class", title="p(class | here)")
    return figure


def describe(t):
    told = ", ".join(f"{p:.2f}" for p in chances(t))
    return f"At t = {t:g}: the score here, where the clean point may lie, and classes 0, 1, 2 with chances {told}."


slider(look, [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "noise t", describe, start=3)

# %% [markdown]
# ## 5. Drawing samples
#
# To draw from $\mathcal N(\mu,S)$, stretch standard noise by a factor $L$ with $LL^\top=S$: then $\mathrm{Cov}(Lz)=L\,\mathrm{Cov}(z)\,L^\top=S$. Cholesky's decomposition finds such an $L$.
#
# Randomness comes from a `torch.Generator` that is passed in, always: whoever calls you can then repeat exactly what happened, and nothing is seeded behind anybody's back. (`torch.randn` makes float32 unless told otherwise; this world is in float64.)

# %% exercise="00.3"

# %%
x, k = sample_gmm(w, mu, S, 1500, rng(1))
fig, ax = plt.subplots(figsize=(4.5, 4.5))
contours(ax, gmm_logp(grid, w, mu, S), COLOURS["noise"])
ax.scatter(*x.T, s=3, c=world.labels[k], cmap="Dark2")
ax.set_title("your samples on your density", fontsize=10)
plt.show()

# %% [markdown]
# ## 6. Are two clouds the same?
#
# The **energy distance** between two distributions is
#
# $$E(X,Y)=2\,\mathbb E\|X-Y\|-\mathbb E\|X-X'\|-\mathbb E\|Y-Y'\|\ \ge 0,$$
#
# with $X'$, $Y'$ independent copies. For distributions with a finite mean it is 0 only if they are equal (Székely & Rizzo 2013), needs no density and no bins, and works for samples of different sizes.

# %% exercise="00.4"

# %% [markdown]
# **Predict before you run.** Four clouds of 1,500 points. One is drawn correctly; one has the islands' *covariance* where its Cholesky factor belongs; one has two neighbouring islands in the wrong proportion; one is moved by 0.1. Can you see which is the right one?

# %%
n = 1500
shares = w.clone()
shares[1], shares[2] = shares[1] - 0.06, shares[2] + 0.06
clouds = {
    "A": sample_gmm(shares, mu, S, n, rng(2))[0],
    "B": sample_gmm(w, mu, S @ S, n, rng(3))[0],
    "C": sample_gmm(w, mu, S, n, rng(4))[0],
    "D": sample_gmm(w, mu, S, n, rng(5))[0] + 0.1,
}
fig, axes = plt.subplots(1, 4, figsize=(12, 3.2), sharex=True, sharey=True)
for ax, (name, cloud) in zip(axes, clouds.items()):
    ax.scatter(*cloud.T, s=2, color=COLOURS["conditional"])
    ax.set_title(name)
plt.show()

# %%
guess_cloud = ...  # "A", "B", "C" or "D"

# %%
truth = sample_gmm(w, mu, S, 2500, rng(6))[0]
distances = {name: float(energy_distance(cloud, truth)) for name, cloud in clouds.items()}
floor = [float(energy_distance(sample_gmm(w, mu, S, n, rng(s))[0], truth)) for s in range(10, 20)]
print({name: round(d, 4) for name, d in distances.items()}, f"   two right ones: at most {max(floor):.4f}")
reveal(guess_cloud, min(distances, key=distances.get))

# %% tags=["nbval-check-output"]
print("told from the right one:", sorted(name for name, d in distances.items() if d > max(floor)))

# %% [markdown]
# A number without its **floor** means nothing: two samples of the *same* world are not at distance 0 either. Here the floor is what ten right clouds show. Every distance that this course quotes comes with one.
#
# ## 7. Now you write the test
#
# Formula 01.2 of the next lesson noises data: with a table `abar` that falls from `abar[0] = 1`,
#
# $$x_t=\sqrt{\bar\alpha_t}\;x_0+\sqrt{1-\bar\alpha_t}\;\epsilon .$$
#
# Write `my_test(q_sample)`, which raises an error if it is given a wrong implementation and stays silent for a right one. You may compute the right result for inputs of your choice; but try first without the formula. The check hands it right functions, and five wrong ones; catch at least four. Think in *properties*: what must hold at some special input, whatever the code looks like? What if the batch has several examples, each with a time of its own?

# %% exercise="00.5"

# %% [markdown]
# ## 8. A bet for lesson 04
#
# Class 0 lives on two islands with equal shares: half of its points are on the crowded one. **Guidance** with scale $s$ is said to sample $p(x)\,p(y\mid x)^s$ (normalised), "the class, made to count more". The next cell compares two numbers at $s=5$: the share of that distribution that lies on the crowded island, by exact integration, and the share that guided sampling leaves there, with the *perfect* network.
#
# **Predict before you run:** how much does guided sampling leave on the crowded island, in per cent: 50, 47, 23 or 3?

# %%
guess_crowded = ...

# %%
# The names in this cell belong to lessons 02 and 04; here only the bars matter.
tilt = world.tilted(0, 5.0)
crowded_tilt = float(tilt.probs[tilt.points[:, 0] > -0.45].sum())

start = torch.randn(8000, 2, generator=rng(7), dtype=torch.float64)
guided = cfg(world.denoiser(path, label=0), world.denoiser(path), 5.0)
islands = sample(ddim_step(path), guided, start, time_grid(120))
crowded = float((islands[:, 0] > -0.45).double().mean())

fig, ax = plt.subplots(figsize=(4.5, 3))
shares = {"the class itself": 50.0, "p(x) p(y|x)^5": 100 * crowded_tilt, "guided sampling": 100 * crowded}
ax.bar(shares.keys(), shares.values(), color=[COLOURS["data"], COLOURS["noise"], COLOURS["guided"]])
ax.set(ylabel="% on the crowded island", title="scale 5")
plt.show()
reveal(guess_crowded, round(100 * crowded), " %", close=2)

# %% tags=["nbval-check-output"]
print(f"by integration: {100 * crowded_tilt:.1f} %")
print("guided sampling leaves less than a tenth of that:", crowded < crowded_tilt / 10)

# %% [markdown]
# With a perfect network, and a sampler whose own error is far smaller than this, the crowded island is almost gone; the usual explanation says that it should keep nearly all of its share. No picture of a digit would have told you. Lesson 04 finds out why.
#
# ## 9. What it costs, what to keep
#
# **Cost.** A mixture of $K$ components at $N$ points: $NK$ densities of $D\times D$ matrices. The energy distance of $N$ and $M$ points: $N^2+M^2+NM$ distances.
#
# **Keep.**
# - Sums of densities belong in `logsumexp`; responsibilities are the softmax over the same numbers.
# - Score $=\nabla\log p$: the gradient of the *sum* over a batch holds each example's own.
# - A distance counts only beside its floor. A test is worth what it catches.
# - *Conditional* means "given $y$"; *guided* means "with the condition made to count more". Some texts call the first "guided" too.
#
# ## Questions
#
# 1. Why does $\log\sum_k e^{l_k}$ not simply equal $\max_k l_k$ in your `gmm_logp`, and when does it nearly?
# ### BEGIN SOLUTION
# *Other islands contribute too. When one term is larger than all the rest together by a factor $e^{20}$, the two agree to eight decimals.*
# ### END SOLUTION
# 2. Name a wish that a class label cannot express, and what $y$ could be instead.
# ### BEGIN SOLUTION
# *"A cat playing chess": a text. "Along this outline": a picture. "In this style": an embedding of another picture. Lessons 06 to 09 build these.*
# ### END SOLUTION
# 3. An unconditional model of ten digits and a perfect classifier are given. How would you get sevens, and what does it cost?
# ### BEGIN SOLUTION
# *Draw, and keep a draw with the probability $p(7\mid x)$ that the classifier gives it: one in ten survives, and for a condition with probability $10^{-6}$ one in a million. Conditioning is what makes that affordable.*
# ### END SOLUTION
# 4. Your test of section 7 raises on an implementation that is right but computes in float32. Whose mistake is it?
# ### BEGIN SOLUTION
# *The test's: a tolerance belongs to every comparison of floating-point numbers.*
# ### END SOLUTION
#
# **Sources.** Székely & Rizzo 2013 (energy statistics); Goodfellow et al. 2014; Kingma & Welling 2014; Ho, Jain & Abbeel 2020; Dhariwal & Nichol 2021; Ho & Salimans 2022 (workshop 2021).
