# %% [markdown]
# # 05 · Flow matching and guidance
#
# **Question.** Newer image models (Stable Diffusion 3, FLUX) predict neither noise nor image, but a *velocity*. What is it, how do you sample with it, and is guidance of a velocity another guidance?
#
# **You need** lesson 01 (a network trained with squares learns a mean) and lesson 04 (guidance, and what it does not sample). No GPU, no download.
#
# **You build** the training pair of flow matching, two solvers, the conversion between all kinds of prediction, the guided velocity and its sampler, and CFG-Zero*. All of it is checked against the exact world; then it runs on the course's image networks, which *are* flow networks.
#
# **One card for the whole lesson.** Time runs as in the package, from 0 (data) to 1 (noise). A lecture that we follow here lets it run the other way; section 4 has the dictionary.
#
# | letter | meaning |
# |---|---|
# | $x_t=a\,x_0+\sigma\,\epsilon$ | a path from data to noise; straight: $a=1-t$, $\sigma=t$ |
# | $\dot a,\ \dot\sigma$ | their rates in time; straight: $-1$ and $1$ |
# | $u$ | velocity $\mathrm dx_t/\mathrm dt=\dot a\,x_0+\dot\sigma\,\epsilon$; straight: $\epsilon-x_0$ |
# | $w$ | guidance scale, the $s$ of lesson 04: 0 unconditional, 1 conditional, above 1 guided |

# %% tags=["setup"]

# %%
from itertools import pairwise

import sympy

from condiff_ref import data
from condiff_ref.checkpoints import TableNetwork, load
from condiff_ref.judge import Judge
from condiff_ref.metrics import bootstrap, class_accuracy, energy_distance, frechet_distance
from condiff_ref.mixture import archipelago
from condiff_ref.schedules import cosine, discrete, flow
from condiff_ref.shapes import pad
from condiff_ref.train import logit_normal
from condiff_ref.viz import COLOURS, show_tile
from condiff_ref.widgets import slider
from matplotlib.figure import Figure


def rng(seed=0):
    return Generator().manual_seed(seed)


def normal(n, seed):
    return torch.randn(n, 2, generator=rng(seed), dtype=torch.float64)


# %% [markdown]
# ## 1. Straight lines
#
# Take a picture $x_0$ and a noise $\epsilon$ and join them by a straight line, $x_t=(1-t)\,x_0+t\,\epsilon$. Who travels along it in one unit of time has the constant velocity
#
# $$u(x_t\mid x_0,\epsilon)=\frac{\mathrm dx_t}{\mathrm dt}=\epsilon-x_0 .$$
#
# **Flow matching** (Lipman et al. 2023; Liu et al. 2023; Albergo & Vanden-Eijnden 2023) trains a network to answer with the velocity when it is shown the place and the time. With $z$ for the data point, a lecture writes the loss as
#
# $$\mathcal L_{\mathrm{CFM}}(\theta)=\mathbb E_{z\sim p_{\mathrm{data}},\ t\sim U[0,1),\ x\sim p_t(x\mid z)}\big\|u^\theta_t(x)-u_t(x\mid z)\big\|^2 ,\tag{1}$$
#
# *conditional* flow matching, because $u_t(x\mid z)$ is the velocity of a path whose data end is known. Given $x$ and $z$ the noise is known as well, so both formulas say the same. Compare it with lesson 01: draw, mix, predict, square. Only the target is new.

# %% exercise="05.1"

# %% [markdown]
# **What does the network learn?** Through one point $x$ pass many lines, each with its own velocity, and the network can give only one answer. Let $u(x)=\mathbb E[\epsilon-x_0\mid x_t=x]$ be their mean, the *marginal* velocity. As in lesson 01 the cross term vanishes (given $x_t$, $f-u$ is a constant and $u-(\epsilon-x_0)$ has mean 0), so for every answer $f(x_t,t)$
#
# $$\mathbb E\|f-(\epsilon-x_0)\|^2=\underbrace{\mathbb E\|f-u\|^2}_{\text{what we want small}}+\underbrace{\mathbb E\,\mathrm{tr\,Cov}(\epsilon-x_0\mid x_t)}_{\text{does not depend on }f}.\tag{2}$$
#
# (tr Cov is the sum of the coordinates' variances.) The minimiser is the marginal velocity, and the gap is constant. On the straight line $\epsilon-x_0=(x_t-x_0)/t$, so the gap is $\mathbb E\big[\mathrm{tr\,Cov}(x_0\mid x_t)/t^2\big]$.
#
# **Why is the mean velocity the right one to follow?** The lines that belong to one data point $z$ carry the density $p_t(x\mid z)$, which obeys the continuity equation, $\partial_t p_t(x\mid z)=-\nabla\!\cdot\!\big(p_t(x\mid z)\,u_t(x\mid z)\big)$: what leaves a place arrives next to it ($\nabla\!\cdot$, the divergence, sums $\partial_i$ of the $i$-th entry: what flows out). Average over $z$: on the left stands $\partial_tp_t(x)$, on the right $-\nabla\!\cdot\int p(z)\,p_t(x\mid z)\,u_t(x\mid z)\,\mathrm dz=-\nabla\!\cdot\!\big(p_t(x)\,\mathbb E[u_t(x\mid z)\mid x]\big)$. So points that follow the *mean* velocity have, at every $t$, the density $p_t$.

# %% [markdown]
# **With a label** ("guided", says the lecture, and means: conditional) all of this holds for each $y$ by itself. What changes: $p_t(x\mid y)$, its score, its velocity, the network's arguments, and the loss. For one fixed $y$ draw $z\sim p_{\mathrm{data}}(z\mid y)$; for all at once draw pairs $(z,y)$ from the data,
#
# $$\mathcal L^{\mathrm{guided}}_{\mathrm{CFM}}(\theta)=\mathbb E_{(z,y)\sim p_{\mathrm{data}},\ t,\ x}\big\|u^\theta_t(x\mid y)-u_t(x\mid z)\big\|^2 ,$$
#
# and the minimiser is $\mathbb E[u_t(x\mid z)\mid x,y]$. In the exact world this velocity is a closed form, with no division by $t$ or $1-t$:


# %%
world, path = archipelago(), flow()


def exact(x, t, label=None):
    """The velocity E[eps | x_t] - E[x0 | x_t] of the exact world, with a label or without."""
    return -t[:, None] * world.score(x, t, path, label) - world.posterior_mean(x, t, path, label)


# %% [markdown]
# **Predict before you run.** What loss does this *perfect* velocity reach on class 0 of the archipelago (summed over both coordinates; the target has mean square about 6)? 0, 0.3, 2.5 or 6?

# %%
guess_floor = ...

# %%
n = 20_000
x0, label = world.given(0).sample(n, rng(1))[0], 0
t = torch.rand(n, generator=rng(2), dtype=torch.float64)
xt, u = fm_pair(x0, normal(n, 3), t)
gap = (world.posterior_cov(xt, t, path, 0).diagonal(dim1=1, dim2=2).sum(1) / t**2).mean()


def mean_square(v):
    return float((v**2).sum(1).mean())


best = exact(xt, t, 0)
answers = {"u(x | y)": best, "u(x)": exact(xt, t), "1.2 u(x | y)": 1.2 * best, "0": 0 * best}
print("answer          loss   distance to u(x | y)   difference")
for name, f in answers.items():
    loss, distance = mean_square(f - u), mean_square(f - best)
    print(f"{name:14} {loss:5.2f} {distance:12.2f} {loss - distance:18.2f}")
print(f"gap by closed form: {float(gap):.2f}")
reveal(guess_floor, round(mean_square(best - u), 1), close=0.3)

# %% tags=["nbval-check-output"]
gaps = [mean_square(f - u) - mean_square(f - best) for f in answers.values()]
print("the gap is the same for all four, and the closed form's:", all(abs(g - float(gap)) < 0.05 for g in gaps))
print("u(x), which ignores the label, does worse:", mean_square(answers["u(x)"] - u) > mean_square(best - u) + 0.2)

# %% [markdown]
# So, as for noise prediction: a loss that stays far above 0 says nothing bad about a network. (2) is also why nobody needs $u(x)$ itself as a target, which would be an average over the whole data set.
#
# ## 2. Following the velocity
#
# To sample, draw noise and follow $\mathrm dx=u\,\mathrm dt$ from $t=1$ back to $t=0$. **Euler's** method goes straight ahead for a small step from $t$ to the next time $s$ (below $t$ here, so $s-t$ is negative), $x\leftarrow x+(s-t)\,u(x,t)$. **Heun's** looks at the end of that step too and averages both slopes. It costs two evaluations per step; its last step is Euler's, because some fields (not this one) do not exist at the data end.

# %% exercise="05.4"

# %% [markdown]
# A lecture prints this as its *Algorithm 7, guided sampling*, in its own time $\tau=1-t$: choose $y$; draw $X_0\sim\mathcal N(0,I)$; follow $\mathrm dX_\tau=u_\tau(X_\tau\mid y)\,\mathrm d\tau$ from $\tau=0$ (noise) to $\tau=1$ (data). Its velocity points from noise to data, so it is ours with the opposite sign. Both, side by side:

# %% tags=["nbval-check-output"]
noise = normal(1000, 5)
ts = torch.linspace(1, 0, 101, dtype=torch.float64)
ours = euler(lambda x, t: exact(x, t, 0), noise, ts)
lecture = euler(lambda x, tau: -exact(x, 1 - tau, 0), noise, 1 - ts)
print("Algorithm 7, equal in both times:", float((ours - lecture).abs().max()) < 1e-10)

real = world.given(0).sample(1000, rng(6))[0]
print("its samples are distributed like class 0:", energy_distance(ours, real) < 0.02)

# %% [markdown]
# **ODE or SDE.** One may also add fresh noise on the way, if one corrects for it with the score: $\mathrm dX=\big(u+\tfrac{g^2}2\nabla\log p\big)\mathrm d\tau+g\,\mathrm dW$ in the lecture's time has the same $p_t$ at every $t$, for any strength $g$ (the correction undoes what the noise spreads). One noise then gives many pictures.

# %% tags=["nbval-check-output"]
wander, g, steps = noise, 1.0, 200
for i in range(steps):
    now = torch.full((len(wander),), 1 - i / steps, dtype=torch.float64)
    drift = -exact(wander, now, 0) + g**2 / 2 * world.score(wander, now, path, 0)
    wander = wander + drift / steps + g * steps**-0.5 * normal(len(wander), 100 + i)
print("SDE: distributed like class 0, too:", energy_distance(wander, real) < 0.02)
print("and not the same points as the ODE's:", float((wander - ours).norm(dim=1).mean()) > 0.5)

# %% [markdown]
# ### Straight lines, bent paths
#
# The training lines are straight and cross everywhere. **Predict:** do the paths that a sampler follows cross, too?

# %%
guess_cross = ...  # "yes" or "no"

# %%
few = normal(40, 7)
pairs = world.given(0).sample(40, rng(8))[0]


def follow(w, x, steps=60):
    """All points on the way (steps + 1, n, 2), guided with scale w."""
    grid, points = torch.linspace(1, 0, steps + 1, dtype=torch.float64), [x]
    for t, s in pairwise(grid):
        points.append(euler(lambda x, t: (1 - w) * exact(x, t) + w * exact(x, t, 0), points[-1], torch.stack([t, s])))
    return torch.stack(points)


def draw_paths(ax, points, title):
    ax.plot(points[..., 0], points[..., 1], color=COLOURS["guided"], lw=0.7)
    ax.scatter(*points[0].T, s=8, color=COLOURS["noise"], zorder=3, label="noise")
    ax.scatter(*points[-1].T, s=8, color=COLOURS["data"], zorder=3, label="data")
    ax.set_title(title, fontsize=10)


fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True, layout="constrained")
draw_paths(axes[0], torch.stack([few, pairs]), "training: one line per pair")
bent = follow(1.0, few, 60 if SMOKE else 200)
draw_paths(axes[1], bent, "sampling: the mean velocity, w = 1")
axes[0].legend(fontsize=8)
plt.show()
reveal(guess_cross, "no")

# %% [markdown]
# *Left: each pair is joined at random, and the lines cross. Right: at any place and time the mean velocity is one vector, so two paths that met would go on together for ever, backwards too: they never meet at the same time. (In the picture two may pass the same place, at different times.)* At first, near $t=1$, all head for the mean of the class; they bend where it is decided which island they reach. Bent paths are why one Euler step is not enough:

# %% tags=["nbval-check-output"]
one_step = euler(lambda x, t: exact(x, t, 0), noise, torch.tensor([1.0, 0.0], dtype=torch.float64))
mean_of_class = world.given(0).weights @ world.given(0).means
print(
    "one Euler step leads everybody to the mean of the class:", torch.allclose(one_step, mean_of_class.expand(1000, 2))
)

# %% [markdown]
# At $t=1$ a point $x$ is pure noise and says nothing about the data, so $u=x-\mathbb E[x_0\mid y]$ exactly. More steps, then, and how many? A solver's *order* is the power of the step size with which its error falls. (Heun's is 2, and one Euler step at the end, whose own error goes with the step squared, does not spoil that.)
#
# **Predict:** with half the step, Euler's error halves. By what factor does Heun's fall?

# %%
guess_heun = ...

# %%
start = noise[:100]


def field(x, t):
    return exact(x, t, 0)


truth = heun(field, start, torch.linspace(1, 0, 161 if SMOKE else 501, dtype=torch.float64))
counts = [2, 4, 8, 16, 32] if SMOKE else [2, 4, 8, 16, 32, 64, 128]
errors = {"Euler": [], "Heun": []}
for steps in counts:
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for name, solve_ode in (("Euler", euler), ("Heun", heun)):
        errors[name].append(float((solve_ode(field, start, grid) - truth).norm(dim=1).mean()))

fig, ax = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
ax.loglog(counts, errors["Euler"], "o-", color=COLOURS["conditional"], label="Euler, n evaluations")
ax.loglog([2 * c - 1 for c in counts], errors["Heun"], "s-", color=COLOURS["guided"], label="Heun, 2n - 1 evaluations")
ax.set(xlabel="evaluations of the velocity", ylabel="mean distance to the exact end", title="class 0, 100 paths")
ax.set_xticks(counts, counts)
ax.minorticks_off()
ax.legend()
plt.show()


def order(errors):
    """The slope of log error against log steps, over the finest steps."""
    rows = torch.stack([torch.tensor(counts[-4:]).log(), torch.ones(4)], dim=1)
    return -float(torch.linalg.lstsq(rows, torch.tensor(errors[-4:]).log()[:, None]).solution[0])


print(f"order: Euler {order(errors['Euler']):.2f}, Heun {order(errors['Heun']):.2f}")
reveal(guess_heun, round(errors["Heun"][-2] / errors["Heun"][-1], 1), close=0.6)

# %% tags=["nbval-check-output"]
print("orders, rounded:", round(order(errors["Euler"])), round(order(errors["Heun"])))

# %% [markdown]
# *Slopes of 1 and 2, once the steps are short. For the same number of evaluations Heun is ahead: hardly with a handful of them, twentyfold with 128.* Section 7 asks the same of pictures.
#
# ## 3. One system of two equations
#
# Noise, data, score, velocity, $v$: each is a combination of $x_0$ and $\epsilon$ with coefficients $p,q$ that depend on $t$ only. Together with the path that makes two equations with two unknowns,
#
# $$\begin{pmatrix}a&\sigma\\p&q\end{pmatrix}\begin{pmatrix}x_0\\\epsilon\end{pmatrix}=\begin{pmatrix}x_t\\\text{prediction}\end{pmatrix},\qquad \det=a\,q-\sigma\,p .\tag{3}$$
#
# | kind | $p$ | $q$ | $\det$ | no solution at |
# |---|---|---|---|---|
# | eps | 0 | 1 | $a$ | $t=1$ |
# | x0 | 1 | 0 | $-\sigma$ | $t=0$ |
# | score | 0 | $-1/\sigma$ | $-a/\sigma$ | $t=1$; not defined at $t=0$ |
# | v | $-\sigma$ | $a$ | $a^2+\sigma^2$ | nowhere |
# | u | $\dot a$ | $\dot\sigma$ | $a\dot\sigma-\sigma\dot a$ (straight: 1) | nowhere, as long as $\sigma/a$ changes |
#
# Solve for $(x_0,\epsilon)$, put them into another row, and every kind becomes every other. Write it for any path, whichever way its time runs. (At the ends some conversions divide by 0. Let them return `inf` or `nan`, as plain division does; `torch.linalg.solve` raises there, and a cell below looks at that end.)

# %% exercise="05.2"

# %% [markdown]
# Against the exact world, on three paths, all pairs of kinds:

# %% tags=["nbval-check-output"]
x, t = normal(50, 11), torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
kinds = ("eps", "x0", "score", "u", "v")


def truths(path, sign):
    """Each kind from the world itself; sign -1 for a clock that runs the other way."""
    a, sigma = path.alpha(t), path.sigma(t)
    da, dsigma = sign * path.d_alpha(t), sign * path.d_sigma(t)
    score, mean = world.score(x, t, path), world.posterior_mean(x, t, path)
    noise_mean = -sigma[:, None] * score
    velocity = da[:, None] * mean + dsigma[:, None] * noise_mean
    rotated = a[:, None] * noise_mean - sigma[:, None] * mean
    return dict(zip(kinds, (noise_mean, mean, score, velocity, rotated))), (a, sigma, da, dsigma)


for name, route, sign in (("straight", flow(), 1), ("cosine", cosine(), 1), ("straight, lecture's time", flow(), -1)):
    known, rates = truths(route, sign)
    worst = max(float((convert(known[i], i, j, x, *rates) - known[j]).abs().max()) for i in kinds for j in kinds)
    print(f"{name}: all 25 conversions agree with the world to 1e-9:", worst < 1e-9)

# %% [markdown]
# **Why velocities at all?** Look at the last column of the table. A sampler starts at $t=1$, where a network that predicts noise says nothing about the picture, and formulas divide by $a=0$. A velocity is *used as it is*: no division at $t=1$ nor at $t=0$.

# %% tags=["nbval-check-output"]
end = torch.ones(5, dtype=torch.float64)
eps_at_end = -world.score(x[:5], end, path)  # sigma = 1; equal to x itself: it says nothing
as_velocity = convert(eps_at_end, "eps", "u", x[:5], 1 - end, end, -end, end)
print("at t = 1 the best noise prediction is x itself:", torch.allclose(eps_at_end, x[:5]))
print("converted to a velocity it is finite:", bool(as_velocity.isfinite().any()))
print("the velocity itself is:", bool(exact(x[:5], end).isfinite().all()), bool(exact(x[:5], 0 * end).isfinite().all()))

# %% [markdown]
# ## 4. Whose time? A Rosetta stone
#
# | | this course, SD3, FLUX | a lecture; Lipman et al. (up to a small $\sigma_{\min}$); Liu et al. | DDPM's table |
# |---|---|---|---|
# | data at, noise at | 0, 1 | 1, 0 | 0, $T$ |
# | signal, noise scale | $1-t,\ t$ (SD3 writes $a_t,\ b_t$) | $\alpha_t=t,\ \beta_t=1-t$ | $\sqrt{\bar\alpha_t},\ \sqrt{1-\bar\alpha_t}$ |
# | target | $\epsilon-x_0$ | $z-\epsilon$ | $\epsilon$ |
# | a sampler goes | from 1 to 0 | from 0 to 1 | from $T$ to 0 |
# | guidance scale | $w$: 0 unconditional, 1 conditional | the lecture: the same $w$ | $s=w$; Ho & Salimans' $w$ is $s-1$ |
# | what $b_t$ means | in SD3 the scale of the noise | in the lecture the factor of the score, section 5 | – |
# | what $\beta_t$ means | – | scale of the noise | variance that one step adds |
#
# Two more traps. SD3's paper calls the noisy picture $z$ and conditions on the *noise*, $\mathbb E_{t,\,p_t(z\mid\epsilon),\,p(\epsilon)}\|v_\Theta(z,t)-u_t(z\mid\epsilon)\|^2$; the lecture's $z$ is the data, and it conditions on that. As given $x_t$ either end tells the other, it is the same target:

# %% tags=["nbval-check-output"]
t = torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
x0, eps, at = world.sample(50, rng(12))[0], normal(50, 13), t[:, None]
xt, u = fm_pair(x0, eps, t)
# SD3: z_t = a_t x0 + b_t eps with a_t = 1 - t, b_t = t, and u_t(z | eps) = (a'/a) z - eps b (a'/a - b'/b)
given_noise = -xt / (1 - at) - eps * at * (-1 / (1 - at) - 1 / at)
# the lecture: alpha = 1 - t, beta = t at its time 1 - t, where their rates are 1 and -1
given_data = (1 + (1 - at) / at) * x0 - xt / at
print("SD3's u(z | eps) is eps - x0:", torch.allclose(given_noise, u))
print("the lecture's u(x | z) is minus that:", torch.allclose(given_data, -u))

# %% [markdown]
# ## 5. Guidance of a velocity
#
# How does a label change the velocity? Take the lecture's letters ($\alpha,\beta$ for our $a,\sigma$; any path). One line's velocity, with the noise eliminated, is
#
# $$u_t(x\mid z)=\Big(\dot\alpha-\frac{\dot\beta}\beta\alpha\Big)z+\frac{\dot\beta}\beta x .$$
#
# Average over $z$ given $x$; Tweedie's formula (lesson 01) says $\mathbb E[z\mid x]=(x+\beta^2\nabla\log p_t(x))/\alpha$. So
#
# $$u_t(x)=\frac{\dot\alpha}\alpha x+b_t\,\nabla\log p_t(x),\qquad b_t=\frac{\dot\alpha\beta^2-\dot\beta\beta\alpha}{\alpha}.\tag{4}$$
#
# The same with $y$ everywhere; subtract, and use Bayes (lesson 03), $\nabla\log p_t(x\mid y)-\nabla\log p_t(x)=\nabla\log p_t(y\mid x)$:
#
# $$u_t(x\mid y)=u_t(x)+b_t\,\nabla\log p_t(y\mid x).$$
#
# **Guidance** multiplies what the label adds by $w$, and then needs no classifier:
#
# $$\tilde u_t(x\mid y)=u_t(x)+w\,b_t\nabla\log p_t(y\mid x)=(1-w)\,u_t(x)+w\,u_t(x\mid y).\tag{5}$$

# %% exercise="05.3"

# %% tags=["nbval-check-output"]
tau = sympy.symbols("t", positive=True)
for name, al, be in (
    ("linear", tau, 1 - tau),
    ("trigonometric", sympy.sin(sympy.pi * tau / 2), sympy.cos(sympy.pi * tau / 2)),
):
    b = (sympy.diff(al, tau) * be**2 - sympy.diff(be, tau) * be * al) / al
    print(f"{name}, lecture's time: b_t = {sympy.simplify(b)}")

x, t = normal(50, 14), torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
point = x.clone().requires_grad_()
gradient = torch.autograd.grad(world.class_log_prob(point, t, path, 0).sum(), point)[0]
ours = b_t(1 - t, t, -torch.ones_like(t), torch.ones_like(t))[:, None] * gradient
print("u(x | y) - u(x) = b_t grad log p(y | x):", torch.allclose(exact(x, t, 0) - exact(x, t), ours))
theirs = b_t(1 - t, t, torch.ones_like(t), -torch.ones_like(t))
print("in the lecture's time b_t is (1 - t) / t:", torch.allclose(theirs, t / (1 - t)))

# %% [markdown]
# $b_t$ is positive in the lecture's time ($\dot\alpha>0,\ \dot\beta<0$) and negative in ours, like the velocity itself. At the data end it is 0. At the noise end it is *infinite*: $(1-\tau)/\tau$ at $\tau=0$.
#
# **Predict:** and the guidance vector $b_t\nabla\log p_t(y\mid x)$ there? "zero", "finite" or "infinite"?

# %%
guess_limit = ...

# %% tags=["nbval-check-output"]
one_point = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
print("     t    |b_t|   |grad log p(y|x)|   b_t times gradient")
for time in (0.5, 0.9, 0.99, 0.9999):
    t = torch.tensor([time], dtype=torch.float64)
    b = t / (1 - t)  # its absolute value
    grad = world.score(one_point, t, path, 0) - world.score(one_point, t, path)
    product = (-b * grad)[0].tolist()
    print(f"{time:7} {float(b):8.0f} {float(grad.norm()):14.5f}         ({product[0]:+.3f}, {product[1]:+.3f})")
difference = world.weights @ world.means - mean_of_class
print(f"E[x0] - E[x0 | y]:                    ({float(difference[0]):+.3f}, {float(difference[1]):+.3f})")

# %%
reveal(guess_limit, "finite")

# %% [markdown]
# The product tends to $\dot a\,(\mathbb E[x_0\mid y]-\mathbb E[x_0])$, where $\dot a=-1$ on the straight path (and 1 in the lecture's time): pure noise says nothing, so the label can only move the mean. Hence the right-hand side of (5) is the form to *implement*; the middle one multiplies infinity by 0.

# %% [markdown]
# **Is it the same guidance?** You have a network that predicts noise and one that predicts velocity, both perfect. **Predict:** is the best $w$ different for the two?

# %%
guess_best_w = ...  # "yes" or "no"

# %% tags=["nbval-check-output"]
x, t = normal(50, 15), torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
rates = (1 - t, t, -torch.ones_like(t), torch.ones_like(t))
for w in (0.0, 1.0, 3.0, 7.5):
    eps_u, eps_c = (-t[:, None] * world.score(x, t, path, y) for y in (None, 0))
    guided_eps = (1 - w) * eps_u + w * eps_c
    guided_u = guided_velocity(exact(x, t), exact(x, t, 0), w)
    gap = (convert(guided_eps, "eps", "u", x, *rates) - guided_u).abs().max() / guided_u.abs().max()
    print(f"w = {w}: guided noise and guided velocity are the same to 1e-12:", bool(gap < 1e-12))

# %%
reveal(guess_best_w, "no")

# %% [markdown]
# By (3), every kind is $c(t)\,x_t+d(t)\cdot$(another kind). The weights $1-w$ and $w$ add up to 1, so the $x_t$ part passes through and the rest is guided. Clipping, rescaling and projections (lesson 04) are not of that form: *they* depend on the kind that they are applied to. And real networks, trained on different targets, make different errors, which guidance multiplies.
#
# What does $w$ do to the paths? (Class 0: a lonely island on the left, a crowded one on the right.)


# %%
def draw_w(w):
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    ax = figure.subplots()
    ax.scatter(*real.T, s=2, color=COLOURS["conditional"], alpha=0.4)
    draw_paths(ax, follow(w, few), f"forty paths, class 0, w = {w:g}")
    ax.set(xlim=(-4, 3), ylim=(-3, 3))
    return figure


def describe(w):
    return (
        f"Forty sampling paths of class 0 at guidance scale {w:g}, from grey noise to black end points; data in blue."
    )


slider(draw_w, [0, 1, 2, 3, 5, 7.5], "w", describe, start=4)

# %% [markdown]
# *At $w=1$ the ends lie on the islands. The larger $w$, the more the paths bend away from the other classes: first to the left, towards the lonely island, then past its middle. At $w=0$ they end on the islands of all classes.*

# %% [markdown]
# ## 6. One network, trained and guided
#
# Training is the guided loss of section 1 with label dropout (lesson 02). A lecture calls the probability $\eta$:
#
# $$\mathcal L^{\mathrm{CFG}}_{\mathrm{CFM}}(\theta)=\mathbb E_{(z,y),\ t,\ x}\big\|u^\theta_t(x\mid\tilde y)-u_t(x\mid z)\big\|^2,\qquad \tilde y=\varnothing\text{ with probability }\eta,\text{ else }y .$$
#
# One network over the labels and $\varnothing$. The coin knows nothing of $(z,y)$, so by (2) the null branch learns $\mathbb E[u_t(x\mid z)\mid x]=u_t(x)$, and the others $u_t(x\mid y)$. In two dimensions this takes seconds, with *your* pair:


# %%
class PointNetwork(nn.Module):
    """(x (B, 2), t (B,), label (B,)) -> velocity (B, 2); label 3 is null."""

    def __init__(self, width=128):
        super().__init__()
        self.null, self.labels = 3, nn.Embedding(4, 16)
        layers = [nn.Linear(2 + 9 + 16, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x, t, y):
        waves = math.pi * t[:, None] * torch.arange(1, 5)
        return self.body(torch.cat([x, t[:, None], waves.sin(), waves.cos(), self.labels(y)], dim=1))


def train_points(draw_time, steps, p=0.1, batch=256):
    """Flow matching with label dropout; draw_time(n, gen) draws the times."""
    torch.manual_seed(0)
    net, gen = PointNetwork(), rng(1)
    opt = torch.optim.Adam(net.parameters(), lr=4e-3)
    points, labels = world.sample(20_000, gen)
    for i in range(steps):
        opt.param_groups[0]["lr"] = 4e-3 * (1 - i / steps)
        rows = torch.randint(len(points), (batch,), generator=gen)
        y = torch.where(torch.rand(batch, generator=gen) < p, net.null, labels[rows])
        t = draw_time(batch, gen)
        xt, u = fm_pair(points[rows].float(), torch.randn(batch, 2, generator=gen), t)
        opt.zero_grad()
        F.mse_loss(net(xt, t, y), u).backward()
        opt.step()
    return net.eval()


# %% [markdown]
# **Algorithm 8, CFG sampling**, as a lecture prints it: choose $y$ (or $\varnothing$) and a scale $w>1$; draw $X_0\sim\mathcal N(0,I)$; follow $\mathrm dX_\tau=\big[(1-w)\,u_\tau(X_\tau\mid\varnothing)+w\,u_\tau(X_\tau\mid y)\big]\mathrm d\tau$ from 0 to 1. In our time, and for a batch:

# %% exercise="05.6"

# %% [markdown]
# First on the exact world, dressed as a network, where the lecture's time must give the same points:


# %% tags=["nbval-check-output"]
class WorldNetwork(nn.Module):
    """The exact velocities, asked as a network is; label 3 is null."""

    null = 3

    def forward(self, x, t, y):
        x, t = x.double(), t.double()
        u = torch.empty_like(x)
        for label in y.unique().tolist():
            rows = y == label
            u[rows] = exact(x[rows], t[rows], None if label == self.null else label)
        return u


y, w = torch.zeros(500, dtype=torch.long), 3.0
ours = sample_flow(WorldNetwork(), y, w, 50, (2,), rng(5))
first = torch.randn(500, 2, generator=rng(5)).double()
taus = torch.linspace(0, 1, 51, dtype=torch.float64)
lecture = euler(lambda x, tau: -(1 - w) * exact(x, 1 - tau) - w * exact(x, 1 - tau, 0), first, taus)
print("Algorithm 8, equal in both times:", float((ours - lecture).abs().max()) < 1e-4)

# %% [markdown]
# Now a trained one. At $w=1$ it should draw class 0, half of it on the crowded island.
#
# **Which law does Algorithm 8 sample for $w>1$?** The lecture does not say. Lesson 04 did: *not* the tilt $p(x\mid y)^w\,p(x)^{1-w}$, whose share on the crowded island stays near one half. **Predict:** a network trained for a few seconds, guided with $w=5$: is its share nearer to the tilt's or to that of the exact velocities, guided in the same way?

# %%
guess_law = ...  # "tilt" or "velocity"


# %% tags=["nbval-ignore-output", "skip-grading"]
def uniform(n, gen):
    return torch.rand(n, generator=gen)


def crowded(x):
    """The share of points that lie nearer to class 0's crowded island than to its lonely one."""
    lonely, full = world.given(0).means
    return float(((x - full).norm(dim=-1) < (x - lonely).norm(dim=-1)).double().mean())


n_points, train_steps = (200, 150) if SMOKE else (1000, 3000)
net = train_points(uniform, train_steps)
y, real = torch.zeros(n_points, dtype=torch.long), world.given(0).sample(n_points, rng(21))[0]
print(f"{n_points} points each, 50 steps; energy distance of two real samples:", end=" ")
print(f"{energy_distance(real, world.given(0).sample(n_points, rng(22))[0]):.4f}")
print("  w   crowded island: tilt   exact velocity   trained    distance of trained to p(x|y)")
for w in (1.0, 3.0, 5.0):
    tilt = world.tilted(0, w, points=101 if SMOKE else 201)
    in_tilt = crowded(tilt.sample(20_000, rng(23)))
    by_world, by_net = (sample_flow(m, y, w, 50, (2,), rng(24)).double() for m in (WorldNetwork(), net))
    shares = f"{in_tilt:21.2f} {crowded(by_world):14.2f} {crowded(by_net):12.2f}"
    print(f"{w:4.0f} {shares} {energy_distance(by_net, real):17.3f}")
shares = {"tilt": in_tilt, "velocity": crowded(by_world)}
reveal(guess_law, min(shares, key=lambda law: abs(shares[law] - crowded(by_net))))

# %% [markdown]
# *At $w=1$ the three agree and the samples are those of class 0. Guided, the trained network does nearly what the exact velocities do, and neither does what the formula of the tilt promises.* The departure from the tilt is not the network's error. (And the law is that of this ODE: a guided SDE ends in yet another, lesson 04.)

# %% [markdown]
# ### On pictures
#
# The course's image checkpoints are flow networks on the straight path: they answer with $\epsilon-x_0$. So your `sample_flow` runs on them, through three lines that pass the arguments on. (The shipped MNIST network pads 28x28 to 32x32, the size that the lab of a lecture uses, and its table has a row per digit and one for $\varnothing$, 11 in all.)


# %% tags=["nbval-ignore-output", "skip-grading"]
class FlowNetwork(nn.Module):
    """A shipped checkpoint, asked as sample_flow asks: (x, t, y) -> velocity, in the network's own scaling."""

    def __init__(self, model):
        super().__init__()
        self.model, self.null = model, model.network.null

    def forward(self, x, t, y):
        return self.model.raw(x, t, y)


mnist = load("mnist-unet")
side, rows = 28 + 2 * mnist.network.padding, mnist.network.null + 1
print(f"MNIST network: pictures of 1x{side}x{side} inside, {rows} labels with null")

# %% [markdown]
# **Predict:** the same twenty noises, two per class, at $w=1$ and $w=4$. What will change in the pictures, and what will be lost?

# %% tags=["nbval-ignore-output", "skip-grading"]
y = torch.arange(10).repeat(2)
made = {w: mnist.decode(sample_flow(FlowNetwork(mnist), y, w, 16, (1, 28, 28), rng(31))) for w in (1.0, 4.0)}
fig, axes = plt.subplots(2, 1, figsize=(7, 3.6), layout="constrained")
for ax, (w, pictures) in zip(axes, made.items()):
    show_tile(ax, pictures, 10, f"w = {w:g}")
plt.show()

# %% tags=["nbval-ignore-output", "skip-grading"]
judge = Judge.mnist()
n_each, steps = (2, 6) if SMOKE else (20, 16)
y = torch.arange(10).repeat_interleave(n_each)
for w in (0.0, 1.0, 2.0, 4.0):
    pictures = mnist.decode(sample_flow(FlowNetwork(mnist), y, w, steps, (1, 28, 28), rng(32)))
    share = class_accuracy(judge, pictures, y)
    within = torch.stack([torch.pdist(judge.features(pictures[y == c])).mean() for c in range(10)]).mean()
    print(f"w = {w:g}: read as asked {share}, distance of two pictures of a class {float(within):.2f}")

# %% [markdown]
# *At $w=1$ some strokes are odd and some digits wrong. At $w=4$ nearly all are read as asked, clean and bold, and alike: the distance between two pictures of a class falls.* The trade of lesson 04, in a velocity network: same $w$, same bargain.
#
# ## 7. How many steps do pictures need?
#
# An evaluation of the network is what costs time, so count those, for Euler, Heun, DDIM and DDPM. The last two run in DDPM's table, with the same network: `TableNetwork` of lesson 03 converts.
#
# On the straight path DDIM *is* Euler: $(1-s)\hat x_0+s\,\hat\epsilon=x_t+(s-t)(\hat\epsilon-\hat x_0)$. And in the table? Divide DDIM's step by $a_s$: it goes to $\hat x_0+\frac{\sigma_s}{a_s}\hat\epsilon$, and Euler on the straight path, divided by $1-s$, to $\hat x_0+\frac{s}{1-s}\hat\epsilon$. At equal noise levels $\sigma/a$ both are one method, whatever the shape of the path. They differ in *which* levels they visit: even steps in $t$, or even steps through the rows of the table.
#
# **Predict:** with 3 evaluations, which levels lead nearer to real digits: those of the straight path or those of the table? And what will the class accuracy of *one* evaluation be?

# %%
guess_levels, guess_one = ..., ...  # "straight" or "table"; a share

# %% tags=["nbval-ignore-output", "skip-grading"]
from condiff_ref.samplers import ddim_step, ddpm_step

T = 1000
table = torch.cat([torch.ones(1), (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0).float()])
digits = load("digits-unet")
straight, in_table = FlowNetwork(digits), TableNetwork(digits, table)


@torch.no_grad()
def draw(method, evaluations, y, gen):
    """Digits by a method that asks the network so many times; no guidance."""
    x = torch.randn(len(y), 1, 8, 8, generator=gen)
    if method == "Euler":
        return euler(lambda x, t: straight(x, t, y), x, torch.linspace(1, 0, evaluations + 1))
    if method == "Heun":
        return heun(lambda x, t: straight(x, t, y), x, torch.linspace(1, 0, (evaluations + 1) // 2 + 1))
    times = torch.linspace(T, 0, evaluations + 1).round()
    if method == "Euler, the table's levels":
        a, sigma = table[times.long()].sqrt(), (1 - table[times.long()]).sqrt()
        return euler(lambda x, t: straight(x, t, y), x / (a[0] + sigma[0]), sigma / (a + sigma))

    def denoiser(x, t):
        a, sigma = (pad(part[t.long()], x) for part in (table.sqrt(), (1 - table).sqrt()))
        return (x - sigma * in_table(x, t.long(), y)) / a

    step = ddim_step(discrete(table)) if method == "DDIM" else ddpm_step(discrete(table), generator=gen)
    for t, s in pairwise(times):
        x = step(denoiser, x, t.expand(len(x)), s.expand(len(x)))
    return x


# %% tags=["nbval-ignore-output", "skip-grading"]
y = torch.arange(10)
in_rows = draw("DDIM", 3, y, rng(41))
for method in ("Euler, the table's levels", "Euler"):
    gap = (draw(method, 3, y, rng(41)) - in_rows).square().mean().sqrt()
    print(f"root mean square difference of DDIM in the table and {method}: {float(gap):.6f}")
ratio = ((1 - table) / table).sqrt()[[1000, 667, 333, 0]]
print("rows 1000, 667, 333 and 0 lie at t =", [round(v, 2) for v in (ratio / (1 + ratio)).tolist()])

# %% [markdown]
# *The same pictures, to rounding, where the levels agree; others where they do not.* Even steps through the table spend themselves near the noise: the last of three must go from $t=0.59$ to 0.

# %% tags=["nbval-ignore-output", "skip-grading"]
judge = Judge.digits()
counts, per_class, draws = ([1, 3], 4, 4) if SMOKE else ([1, 3, 7, 15, 31], 30, 40)
y = torch.arange(10).repeat_interleave(per_class)
n_pictures, real_features = len(y), judge.features(data.digits("train")[0])
distances, shares = {}, {}
for method in ("Euler", "Heun", "DDIM", "DDPM"):
    for k in counts:
        pictures = digits.decode(draw(method, k, y, rng(41)))
        fake = judge.features(pictures)
        distances[method, k] = bootstrap(frechet_distance, fake, real_features, draws=draws, generator=rng(1))
        shares[method, k] = class_accuracy(judge, pictures, y)

# %% tags=["nbval-ignore-output", "skip-grading"]
floor = frechet_distance(judge.features(data.digits("test")[0])[:n_pictures], real_features)
styles = {
    "Euler": ("conditional", "o-"),
    "Heun": ("guided", "s-"),
    "DDIM": ("unconditional", "^--"),
    "DDPM": ("noise", "d:"),
}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for ax, values, name in ((axes[0], distances, "Fréchet distance"), (axes[1], shares, "class accuracy")):
    for i, (method, (role, style)) in enumerate(styles.items()):
        found = [values[method, k] for k in counts]
        bars = [[v.value - v.low for v in found], [v.high - v.value for v in found]]
        shifted = [k * 1.04**i for k in counts]
        ax.errorbar(shifted, [v.value for v in found], bars, fmt=style, color=COLOURS[role], label=method, ms=4)
    ax.set(xscale="log", xlabel="evaluations of the network", title=f"{name}, {n_pictures} digits, w = 1")
    ax.set_xticks(counts, counts)
    ax.minorticks_off()
axes[0].axhline(floor, color=COLOURS["data"], lw=0.8, ls=":", label="held-out real digits")
axes[0].set_yscale("log")
axes[0].legend(fontsize=8)
plt.show()
for k in counts:
    print(k, "evaluations:", {m: f"{distances[m, k].value:.1f} (acc. {shares[m, k].value:.2f})" for m in styles})
straight_wins = distances["Euler", 3].value < distances["DDIM", 3].value
reveal(guess_levels, "straight" if straight_wins else "table")
reveal(guess_one, shares["Euler", 1].value, close=0.02)

# %% [markdown]
# *One evaluation leads to the mean of each class: blurred, far from real digits, and read as asked every time. Class accuracy alone would call that the best sampler of all, and for Euler, Heun and DDIM it falls while the pictures become more like real ones; the distance tells. With few evaluations even steps on the straight path (Euler, Heun) are ahead of even rows of the table; DDPM, which adds noise, needs the most; and at 31 the deterministic methods cannot be told apart: what is left is the network's error and the finite number of pictures.* Heun's gain in the exact world was accuracy that these pictures do not ask for.
#
# The same on MNIST, guided: one column, one noise.

# %% tags=["nbval-ignore-output", "skip-grading"]
y = torch.arange(10)
steps_shown = [1, 2, 4, 8, 16]
made = [mnist.decode(sample_flow(FlowNetwork(mnist), y, 2.0, k, (1, 28, 28), rng(44))) for k in steps_shown]
fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
show_tile(ax, torch.cat(made), 10, "w = 2; from above: 1, 2, 4, 8, 16 Euler steps")
plt.show()

# %% [markdown]
# *The first row is blur of the right class; two steps decide the shape, later ones sharpen it.* Where MNIST itself is at hand, the distances:

# %% tags=["nbval-ignore-output", "skip-grading"]
mnist_images = None
if SMOKE:
    print("The quick run leaves the distances out.")
else:
    try:
        mnist_images, mnist_labels = data.mnist("train")
    except data.DataError as problem:
        print(f"No MNIST here, and that is fine: {problem}")
if mnist_images is not None:
    judge, asked = Judge.mnist(), torch.arange(10).repeat_interleave(20)
    real_features = judge.features(mnist_images[:5000])
    for k in (2, 4, 8, 16):
        pictures = mnist.decode(sample_flow(FlowNetwork(mnist), asked, 2.0, k, (1, 28, 28), rng(45)))
        distance = bootstrap(frechet_distance, judge.features(pictures), real_features, draws=40, generator=rng(1))
        print(
            f"{k:2} steps, w = 2, 200 pictures: distance {distance}, as asked {class_accuracy(judge, pictures, asked)}"
        )
    others = torch.cat([mnist_images[5000:][mnist_labels[5000:] == c][:20] for c in range(10)])
    print(f"200 other real ones: {frechet_distance(judge.features(others), real_features):.1f}")

# %% [markdown]
# ## 8. Which times to train at?
#
# (1) draws $t$ uniformly. The minimiser at each $t$ does not depend on how often that $t$ is drawn (by (2), each time has its own), so the choice is free; it decides where a network of finite size and training spends its effort. Where is there something to learn? At $t=1$ the best answer is $x_t$ minus a constant, at $t=0$ it is $-x_t$: both are easy, however large the loss stays. Stable Diffusion 3 draws mostly from the middle: $t=\mathrm{sigmoid}(z)$, $z\sim\mathcal N(m,1)$, the **logit-normal** law, of density
#
# $$\frac{1}{\sqrt{2\pi}\;t(1-t)}\;e^{-(\log\frac t{1-t}-m)^2/2}.$$
#
# The image networks of this course were trained with it ($m=0$ for the digits, $0.8$ for MNIST: more time at high noise, where the class is decided).
#
# **Predict:** train the network of section 6 again with logit-normal times. Where is its error *larger* than before: in the middle or at the ends?

# %%
guess_where = ...  # "middle" or "ends"

# %% tags=["nbval-ignore-output", "skip-grading"]
net_logit = train_points(logit_normal, train_steps)

n_times, n_each = (5, 500) if SMOKE else (13, 2000)
times = torch.linspace(0.02, 0.98, n_times, dtype=torch.float64)
points = world.given(0).sample(n_each, rng(51))[0]
excess, floors = {"uniform": [], "logit-normal": []}, []
for time in times:
    t = time.expand(n_each)
    xt = (1 - time) * points + time * normal(n_each, 52)
    floors.append(float((world.posterior_cov(xt, t, path, 0).diagonal(dim1=1, dim2=2).sum(1) / t**2).mean()))
    for name, network in (("uniform", net), ("logit-normal", net_logit)):
        answer = network(xt.float(), t.float(), torch.zeros(n_each, dtype=torch.long)).detach()
        excess[name].append(mean_square(answer - exact(xt, t, 0)))

fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
axes[0].hist(logit_normal(20_000, rng(53)), 50, density=True, color=COLOURS["guided"], alpha=0.5)
axes[0].axhline(1, color=COLOURS["conditional"])
axes[0].set(xlabel="t", title="how often t is drawn")
axes[1].plot(times, floors, color=COLOURS["data"])
axes[1].set(xlabel="t", ylim=(0, None), title="loss of the perfect velocity")
for name, role in (("uniform", "conditional"), ("logit-normal", "guided")):
    axes[2].semilogy(times, excess[name], "o-", color=COLOURS[role], label=name)
axes[2].set(xlabel="t", title="what the network adds to it")
axes[2].legend(fontsize=8)
plt.show()
middle = excess["logit-normal"][n_times // 2] / excess["uniform"][n_times // 2]
ends = sum(excess["logit-normal"][i] / excess["uniform"][i] for i in (0, -1)) / 2
print(f"error with logit-normal times, relative to uniform: middle {middle:.2f}, ends {ends:.2f}")
reveal(guess_where, "ends" if ends > middle else "middle")

# %% tags=["nbval-ignore-output", "skip-grading"]
y, real = torch.zeros(n_points, dtype=torch.long), world.given(0).sample(n_points, rng(21))[0]
for name, network in (("uniform", net), ("logit-normal", net_logit)):
    drawn = sample_flow(network, y, 1.0, 50, (2,), rng(24)).double()
    print(f"{name}: energy distance to p(x | y) {energy_distance(drawn, real):.4f} ({n_points} points)")

# %% [markdown]
# *Left: times near 0 and 1 are hardly drawn. Middle: the floor, which no choice changes. Right: the error moves to where one looked less.* In this small world the samples hardly differ once both are trained well (one seed each: conclude no more); on large images, where the middle is hard, it paid (Esser et al. 2024, who compared many combinations of paths and times).

# %% [markdown]
# ## 9. CFG-Zero*
#
# Two amendments to (5) for flow networks (Fan et al. 2025). The velocity that a network estimates is inaccurate, most of all early in training, and guidance multiplies errors. So **scale $v_u$ first to fit** $v_c$, example by example: $\min_r\|v_c-r\,v_u\|^2$ gives, by setting the derivative to 0, $r=\langle v_c,v_u\rangle/\|v_u\|^2$, and
#
# $$v=r\,v_u+w\,(v_c-r\,v_u).$$
#
# And **do nothing at first**: $v=0$ in the first few steps. At $w=1$ the first amendment must change nothing.

# %% exercise="05.5"

# %% [markdown]
# ### From the museum of real bugs: scaled too late
#
# When this method came to the library diffusers (pull request 11205, 2025), one of its authors reported possible bugs in the draft and posted a corrected file. In the released code $v_u$ is scaled first, and the difference is formed after that. Here is what comes of the other order, with the difference $v_c-v_u$ formed *before* the scaling: $r\,v_u+w\,(v_c-v_u)$. (Whether this was the draft's error, we could not verify. It is one exchange of two lines away.)
#
# **Predict:** in the exact world at $w=5$, plain guidance leaves about 4 % on the crowded island (half would be right). What do CFG-Zero* and the version scaled too late leave: more, the same, or less?

# %%
guess_star, guess_late = ..., ...


# %% tags=["skip-grading"]
def too_late(v_c, v_u, scale, step, zero_steps=1):
    """As it should not be: scaled after the difference was formed (and no step left out)."""
    fit = (v_c * v_u).sum(1, keepdim=True) / (v_u**2).sum(1, keepdim=True)
    return fit * v_u + scale * (v_c - v_u)


def guided_by(rule, zero_steps, n, steps=60 if SMOKE else 120):
    """Class 0 of the exact world at w = 5, guided by a rule of two velocities."""
    x, grid = normal(n, 61), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for i, (t, s) in enumerate(pairwise(grid)):
        now = t.expand(n)
        x = x + (s - t) * rule(exact(x, now, 0), exact(x, now), 5.0, i, zero_steps)
    return x


def plain(v_c, v_u, scale, step, zero_steps):
    return guided_velocity(v_u, v_c, scale)


n_star = 500 if SMOKE else 2000
real = world.given(0).sample(n_star, rng(62))[0]
left_over = {}
print(f"{n_star} points, w = 5                  crowded island   distance to p(x | y)")
for name, rule, zero_steps in (
    ("plain guidance", plain, 0),
    ("CFG-Zero*, no step left out", cfg_zero_star, 0),
    ("CFG-Zero*, first 4 % left out", cfg_zero_star, 2 if SMOKE else 5),
    ("scaled too late, no step left out", too_late, 0),
):
    x = guided_by(rule, zero_steps, n_star)
    left_over[name] = crowded(x)
    print(f"{name:34} {crowded(x):10.3f} {energy_distance(x, real):18.3f}")
reveal(guess_star, "more")
reveal(guess_late, "less")

# %% tags=["nbval-check-output", "skip-grading"]
v_c, v_u = normal(20, 63), normal(20, 64)
share = left_over
print("scaled first, more of the crowded island survives:", share["CFG-Zero*, no step left out"] > 0.25)
print(
    "scaled too late, even less than with plain guidance:",
    share["scaled too late, no step left out"] < share["plain guidance"],
)
print("w = 1 gives v_c: CFG-Zero*", torch.allclose(cfg_zero_star(v_c, v_u, 1.0, 3), v_c), end=", ")
print("scaled too late", torch.allclose(too_late(v_c, v_u, 1.0, 3), v_c))

# %% [markdown]
# Scaled too late, the coefficient of $v_u$ is $r-w$ where it should be $r\,(1-w)$. That still guides, so it is easily overlooked; the property "$w=1$ returns $v_c$" finds it at once.
#
# Why does the method help *here*, where both velocities are exact and there is no wrong length to mend? $v=v_c+(w-1)(v_c-r\,v_u)$, and $v_c-r\,v_u$ is the part of $v_c$ perpendicular to $v_u$, the shortest of all $v_c-r'v_u$. So what is multiplied by $w-1$ has become shorter: it is a milder guidance. In the plane one direction of two is projected away, which is much. And the projection depends on the origin: move the whole world, and all velocities gain a constant, the same for $v_c$ and $v_u$, which cancels in $v_c-v_u$ but changes $r$.

# %% tags=["nbval-ignore-output", "skip-grading"]
home = world
world = type(home)(home.weights, home.means + 3, home.covs, home.labels)
for name, rule, before in (
    ("plain", plain, "plain guidance"),
    ("CFG-Zero*", cfg_zero_star, "CFG-Zero*, no step left out"),
):
    after = crowded(guided_by(rule, 0, n_star))
    print(f"{name}: {left_over[before]:.3f} at home, {after:.3f} in the world moved by (3, 3)")
world = home


@torch.no_grad()
def shortened(v_c, v_u):
    """Root mean square of v_c - r v_u over that of v_c - v_u."""
    v_c, v_u = v_c.flatten(1), v_u.flatten(1)
    rest = cfg_zero_star(v_c, v_u, 2.0, 1) - v_c  # scale 2 adds v_c - r v_u once
    return float((rest.square().sum() / (v_c - v_u).square().sum()).sqrt())


digit = torch.arange(10).repeat_interleave(1 if SMOKE else 5)
clean = sample_flow(FlowNetwork(mnist), digit, 1.0, 8, (1, 28, 28), rng(73))
for time in (0.95, 0.8, 0.5):
    t, x = torch.full((n_each,), time, dtype=torch.float64), normal(n_each, 71) * time + (1 - time) * points
    in_plane = shortened(exact(x, t, 0), exact(x, t))
    xt, t = (1 - time) * clean + time * torch.randn(clean.shape, generator=rng(72)), torch.full((len(digit),), time)
    v_c, v_u = (FlowNetwork(mnist)(xt, t, label) for label in (digit, torch.full_like(digit, mnist.network.null)))
    print(f"t = {time}: guidance is shortened to {in_plane:.2f} in the plane, to {shortened(v_c, v_u):.2f} on MNIST")

# %% [markdown]
# *Plain guidance does not notice the move (the same points, moved along); CFG-Zero\* does.* And on MNIST, with 784 dimensions, the projection onto one direction shortens the guidance by about one per cent at most at these times, where in the plane it takes 30: for this network the first amendment is all but plain guidance. A gain that was measured in one world, for one scaling, need not be one in another.
#
# ## 10. Write the test
#
# Time reversed, sign reversed, noise and data exchanged, square roots kept from DDPM: a training pair has many ways to be wrong, and training runs with all of them.

# %% exercise="05.7"

# %% [markdown]
# ## 11. What it costs, what to keep
#
# **Cost.** Training: one evaluation and its backward pass per example, as ever. Sampling: one evaluation per Euler step, $2n-1$ for $n$ Heun steps, each doubled by guidance (one batch of twice the size).
#
# **Keep.**
# - The target is $\epsilon-x_0$; what is learned is its mean given $x_t$ (and $y$). Lines are straight, paths are not.
# - $x_0$, $\epsilon$, score, $v$, $u$ are one piece of information. The velocity needs no division at either end.
# - DDIM in any table is Euler on the straight path: with one network, the table only chooses the noise levels to visit.
# - Guidance is the same in all of them, because $1-w$ and $w$ add up to 1. $b_t$ is infinite at the noise end, so implement $(1-w)\,u(x)+w\,u(x\mid y)$.
# - Before you copy a formula, ask for its clock: data at 0 or at 1?
# - Flow or diffusion, guidance (Algorithm 8) does not sample the tilt.
#
# ## Questions
#
# 1. A lecture's velocity is $z-\epsilon$, ours is $\epsilon-x_0$. You sample with a network of theirs in our loop, from 1 to 0. What do you have to change?
# ### BEGIN SOLUTION
# *Ask it at time $1-t$ and change the sign of its answer.*
# ### END SOLUTION
# 2. The paths are straight lines, so why does one Euler step not suffice?
# ### BEGIN SOLUTION
# *The lines of single pairs are straight. The field that is learned is their mean, and it bends. It would be straight if each noise were tied to one data point without crossings, which "rectified flow" tries to reach by retraining on its own pairs.*
# ### END SOLUTION
# 3. Where does equation (5) break down if you implement its middle form, and why does the right-hand form not?
# ### BEGIN SOLUTION
# *At the noise end: $b_t$ is infinite and the gradient 0. Their product is finite, $\mathbb E[x_0]-\mathbb E[x_0\mid y]$ in our time, and it is just the difference of the two velocities.*
# ### END SOLUTION
# 4. Name two things done to predictions that do depend on whether the network predicts noise, data or velocity.
# ### BEGIN SOLUTION
# *Clipping to a range, rescaling to a standard deviation, projections such as those of APG and CFG-Zero\*: none of them is a combination with weights that are given and add up to 1. So convert first to the kind that they were made for, such as $\hat x_0$ for clipping.*
# ### END SOLUTION
# 5. A network was trained with logit-normal times. Is its velocity at $t=0.02$ biased?
# ### BEGIN SOLUTION
# *Not by the law of $t$: the minimiser at each $t$ is the same. It is merely less trained there, as section 8 shows.*
# ### END SOLUTION
# 6. In the table of section 7 the one-step sampler is read as asked every time. What would you show a colleague who wants to publish that?
# ### BEGIN SOLUTION
# *The pictures (all of a class alike), and their Fréchet distance beside that of real digits. Or any measure of variety.*
# ### END SOLUTION
#
# **Sources.** Lipman et al. 2023 (arXiv 2210.02747); Liu, Gong & Liu 2023 (2209.03003); Albergo & Vanden-Eijnden 2023 (2209.15571); Zheng et al. 2023 (guided flows, 2311.13443); Esser et al. 2024 (Stable Diffusion 3, 2403.03206); Fan et al. 2025 (CFG-Zero*, 2503.18886; github.com/huggingface/diffusers/pull/11205); Ho & Salimans 2022; Karras et al. 2022 (Heun). Numbers of the exact world are computed in the cells above.
