# %% [markdown]
# # 02 · Class-conditional training
#
# **Question.** How does a network learn to draw *the digit you ask for*, and how would you know that it does?
#
# **You need** lesson 01 (noise, $\epsilon^*$, DDIM). No GPU: the digits here are 8x8. MNIST comes at the end, if it is on this machine or can be fetched.
#
# **You build** every part of a class-conditional diffusion model: how time and class enter the network, how labels are dropped, the training step, the running mean of the weights, the sampler, and three honest measurements.

# %% tags=["setup"]

# %%
import time
from copy import deepcopy

from condiff_ref import data
from condiff_ref.judge import Judge
from condiff_ref.layers import Attention, group_norm, zero_init
from condiff_ref.mixture import archipelago
from condiff_ref.schedules import discrete
from condiff_ref.shapes import pad
from condiff_ref.unet import UNet
from condiff_ref.viz import COLOURS, show_tile
from condiff_ref.widgets import slider
from matplotlib.figure import Figure
from tqdm.auto import tqdm

T = 1000
abar = torch.cat([torch.ones(1), (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0).float()])


def rng(seed=0):
    return Generator().manual_seed(seed)  # on the CPU, always: so that every machine draws the same noise


# %% [markdown]
# ## 1. From $p(x)$ to $p(x\mid y)$
#
# Unconditional training minimises $\mathbb E\|\epsilon-\epsilon_\theta(x_t,t)\|^2$ and learns $\mathbb E[\epsilon\mid x_t]$. Hand the network the label as well, and minimise over pairs $(x_0,y)$ of the data:
#
# $$\mathcal L=\mathbb E_{(x_0,y),\,t,\,\epsilon}\big\|\epsilon-\epsilon_\theta(x_t,t,y)\big\|^2 .\tag{1}$$
#
# By the same argument as in lesson 01 its minimiser is $\mathbb E[\epsilon\mid x_t,y]$, so the network now knows the score of $p_t(x\mid y)$. That is all: *no other change*, neither in the forward process nor in the sampler. ($t$ is drawn from the integers $1..T$; some texts write Uniform$(1,T)$ and mean that; some hand the network an embedding that holds $t$ already, and $t$ once more beside it, which is harmless: once is enough.)
#

# %% [markdown]
# **One network, both answers.** Before each step, replace the label by a *null* token with probability $p$, independently for each example. As the coin knows nothing of $(x_0,y)$, the loss splits,
#
# $$\mathcal L=(1-p)\;\mathbb E\|\epsilon-\epsilon_\theta(x_t,t,y)\|^2+p\;\mathbb E\|\epsilon-\epsilon_\theta(x_t,t,\varnothing)\|^2 ,$$
#
# and the second term is unconditional training. So the same weights learn $\mathbb E[\epsilon\mid x_t,y]$ *and* $\mathbb E[\epsilon\mid x_t]$, as far as one network can hold both; lesson 04 subtracts them from each other. Usual values of $p$ are 0.1 to 0.2 (Ho & Salimans found these about equal, and 0.5 worse). The null token is a row of its own in the table of label embeddings: ten digits, eleven rows.
#
# Is it enough to *give* the label to the network? Conditional VAEs do just that. With unlimited data and an unlimited network it is enough; real networks tend to listen too little, which is what guidance (lessons 03 to 05, it exaggerates what the label changes) is for. (Exercises are numbered as in the package: this is 02.3.)

# %% exercise="02.3"

# %% [markdown]
# ## 2. How time and class enter the network
#
# A picture in, a picture out: an MLP on all pixels would not know that neighbours belong together. Two families do, U-Nets (here) and transformers (lesson 08). The network is a **U-Net**. It looks at the *noisy image* (some slides say: at the noise), halves the resolution, works where each pixel has seen most of the picture, and doubles it again; as the resolution halves, the channels double. *Skip connections* hand the fine detail of each level across, by concatenation; they also keep the path short for gradients. It was invented in 2015 to outline cells in microscope pictures, with convolutions that do not pad: 572 pixels in, 388 out. For diffusion one pads so that sizes halve cleanly (MNIST's 28 to 32), and adds attention at low resolution (16x16 in DDPM, 32, 16 and 8 in its successors).
#
# A condition can enter at four places:
#
# | where | how | in this course |
# |---|---|---|
# | embedding | added to the embedding of $t$, which modulates every block | class labels: this lesson |
# | features | attention to a sequence of words | text: lesson 06 |
# | input or skips | concatenated or added as a picture | outlines: lesson 07 |
# | everywhere, as gates | in a transformer | lesson 08 |
#
# They combine: a global condition (the class), a regional one (a word and its place) and a fine one (an outline) can enter together.
#

# %% [markdown]
# **Time.** The network has to know how noisy its input is. One number is a poor input; sines and cosines of many frequencies are a good one. There are $d/2$ frequencies; number $i$ is $10000^{-i/(d/2)}$. Here $t\in[0,1]$ is the table's $t$ divided by $T$ (the network divides by itself, so you hand it the integer), and it is multiplied by 1000 first, so that the fastest wave completes a turn about every six steps of the table. (Sines first or interleaved with cosines: both layouts exist, and a network does not mind.)
#
# **Predict before you run.** Leave out the factor 1000. How similar are the embeddings of $t=0.1$ and $t=0.9$ at width 64 (cosine; 1 = the same)? 0.15, 0.5 or 0.98?

# %%
guess_cosine = ...

# %% exercise="02.1"

# %%
grid = torch.linspace(0, 1, 101)
fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for ax, scale, title in ((axes[0], 1 / 1000, "t as it is"), (axes[1], 1.0, "1000 t")):
    rows = F.normalize(time_embedding(scale * grid, 64), dim=1)
    image = ax.imshow(rows @ rows.T, vmin=-0.2, vmax=1, extent=(0, 1, 1, 0), cmap="viridis")
    ax.set(title=title, xlabel="t", ylabel="t")
fig.colorbar(image, ax=axes, label="cosine of two embeddings")
plt.show()
unscaled = F.cosine_similarity(*time_embedding(torch.tensor([0.1, 0.9]) / 1000, 64), dim=0)
reveal(guess_cosine, round(float(unscaled), 2), close=0.02)

# %% [markdown]
# *Left: all times look alike, and the network can hardly tell them apart. Right: a time resembles itself and its near neighbours, and more distant ones much less.* This is a real bug from real code, and training "works" with it, only worse.
#

# %% [markdown]
# **Class.** A table with one row per class and one for null, `nn.Embedding(11, d)`: a label picks its row (the same as one-hot times a matrix). (1,000 classes at width 512 make 512,000 parameters.) The row is added to the time embedding; a small MLP on top lets the two interact.
#
# **Injection.** Inside each residual block, after the second normalisation, the embedding sets a scale and a shift for every channel (FiLM, Perez et al. 2018; "adaptive group normalisation", Dhariwal & Nichol 2021):
#
# $$h\leftarrow h\,(1+\text{scale})+\text{shift}.$$
#
# The 1 is there so that an embedding of 0 changes nothing.

# %% exercise="02.2"

# %% [markdown]
# Now put it together: a U-Net for 8x8 pictures around *your* `time_embedding` and `film`. Read it once; it has every kind of part that the large ones have: an encoder, a middle (on some slides a "midcoder") and a decoder, all of residual blocks.
#
# ```
#              encoder                       middle                decoder
#
# 8x8  x_t - stem - down1 -- high: 16 channels, handed across --------------- up1 - head - eps
#                     |                                                        |
#                   halve                                                   enlarge
#                     |                                                        |
# 4x4               down2 -- low: 32 channels, handed across ------- up2 ------+
#                     |                                               |
#                     +------------- attention - middle --------------+
#
# t, y - one embedding - a scale and a shift (your film) in each of the five blocks
# ```


# %%
class Block(nn.Module):
    """Two convolutions with a skip; the embedding modulates between them."""

    def __init__(self, channels, out, width):
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * out)
        self.norm2, self.conv2 = group_norm(out), zero_init(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = film(self.norm2(h), self.modulation(emb))
        return self.skip(x) + self.conv2(F.silu(h))


class SmallUNet(nn.Module):
    """(x_t (B, 1, 8, 8), integer t (B,), label (B,)) -> the predicted noise."""

    def __init__(self, classes=10, width=64):
        super().__init__()
        self.null, self.width = classes, width
        self.labels = nn.Embedding(classes + 1, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.down1, self.halve = Block(16, 16, width), nn.Conv2d(16, 32, 2, stride=2)
        self.down2, self.attention, self.middle = Block(32, 32, width), Attention(32, heads=4), Block(32, 32, width)
        self.up2, self.enlarge = Block(64, 32, width), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.up1 = Block(32, 16, width)
        self.head = nn.Sequential(group_norm(16), nn.SiLU(), zero_init(nn.Conv2d(16, 1, 3, padding=1)))

    def forward(self, xt, t, y):
        emb = F.silu(self.mlp(time_embedding(t / T, self.width) + self.labels(y)))
        high = self.down1(self.stem(xt), emb)  # 8x8
        low = self.down2(self.halve(high), emb)  # 4x4: each pixel sees the whole digit
        tokens = low.flatten(2).transpose(1, 2)
        h = low + self.attention(tokens).transpose(1, 2).reshape(low.shape)
        h = self.middle(h, emb)
        h = self.up2(torch.cat([h, low], dim=1), emb)
        h = self.up1(torch.cat([self.enlarge(h), high], dim=1), emb)
        return self.head(h)


torch.manual_seed(0)
model = SmallUNet()
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## 3. Training
#
# The data: 1,397 handwritten digits (8x8 pixels, part of scikit-learn). Formula (1) of lesson 01 keeps the variance at 1 only if the data have it, and what a schedule means by its signal-to-noise ratio depends on it; so they are centred and scaled by *two numbers for the whole set*.

# %%
images, labels = data.digits("train")
held_out, held_out_labels = data.digits("test")
centre, spread = images.mean(), images.std()
x0 = (images - centre) / spread


def to_pixels(x):
    return (spread * x + centre).clamp(-1, 1)


fig, ax = plt.subplots(figsize=(8, 1.2))
show_tile(ax, images[:20], 20, "twenty of the training digits")
plt.show()

# %% [markdown]
# One step of training, in words: draw a time for each example, noise the images, drop some labels, predict the noise, compare, follow the gradient. Everything random comes from `gen`, which lives on the CPU; what it draws is then moved to where the images are. The check watches a spy network that records all that it is asked.

# %% exercise="02.4"

# %% [markdown]
# **A running mean of the weights** (EMA). The last weights of a training run still tremble with the last batches. Their running mean, $\bar\theta\leftarrow\mu\,\bar\theta+(1-\mu)\,\theta$, trembles less, and large models that train at a constant rate sample visibly better with it. Here the learning rate falls to zero, which does much the same: compare `network` with `model` later. It is used for sampling only; training never sees it, and as it reaches back over about $1/(1-\mu)$ steps, the run must be many times as long.

# %% exercise="02.5"


# %%
def train(model, x0, labels, seconds, steps=None, lr=6e-3, batch=64, p=0.1, decay=0.99, seed=0):
    """Your step, your running mean; the learning rate rises for a moment and then falls to zero with the clock."""
    gen = rng(seed)
    opt = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95))
    ema, losses, start = EMA(model, decay), [], time.monotonic()
    model.train()
    bar = tqdm(total=steps or round(seconds), disable=None, desc="training")
    while True:
        done = len(losses) / steps if steps else (time.monotonic() - start) / seconds
        if done >= 1:
            break
        opt.param_groups[0]["lr"] = lr * min(1, (done + 1e-3) / 0.05, 1 - done)
        rows = torch.randint(len(x0), (batch,), generator=gen).to(x0.device)
        losses.append(train_step(model, opt, x0[rows], labels[rows], p, abar.to(x0.device), gen))
        if len(losses) < 100:  # a young mean should forget its random start
            ema = EMA(model, decay)
        ema.update(model)
        bar.update((len(losses) if steps else min(round(time.monotonic() - start), bar.total)) - bar.n)
    bar.close()
    return ema.model, losses


# %% tags=["nbval-ignore-output", "skip-grading"]
network, losses = train(model, x0, labels, seconds=60, steps=200 if SMOKE else None)
print(f"{len(losses)} steps, mean loss of the last 100: {sum(losses[-100:]) / 100:.3f}")

# %% [markdown]
# **Predict before you go on.** Is a network with this loss nearly perfect, or far from it? Keep your answer for section 5.
#
# ## 4. Sampling
#
# The DDIM step of lesson 01, from pure noise at $t=T$ down to $t=0$ in a few steps, with the label handed to the network each time. Three things that printed algorithms often leave open: the grid of times ends at 0, with $\bar\alpha_0=1$; it begins at a $T$ with $\bar\alpha_T\approx0$, or pure noise is the wrong start; and the network sees the same kind of $t$ as in training.

# %% exercise="02.6"

# %% tags=["skip-grading"]
y = torch.arange(10).repeat_interleave(10)
drawn = to_pixels(sample(network, y, 25, (1, 8, 8), abar, rng(1)))
fig, ax = plt.subplots(figsize=(6, 6))
show_tile(ax, drawn, 10, "ten samples of each class, 25 steps")
plt.show()

# %% [markdown]
# *Each row was asked for one digit (in the quick run of the tests, with few steps, not all obey).* How much of a picture is the noise's doing, and how much the label's? Keep the noise and slide the label:

# %% tags=["skip-grading"]
same_noise = {}


def draw_label(label):
    y = torch.full((8,), int(label))
    same_noise[label] = to_pixels(sample(network, y, 25, (1, 8, 8), abar, rng(5)))
    figure = Figure(figsize=(7, 1.2), layout="constrained")
    show_tile(figure.subplots(), same_noise[label], 8, f"label {int(label)}, the same eight noises")
    return figure


def describe(label):
    asked = "any digit (label 10, none)" if label == 10 else f"the digit {int(label)}"
    return f"Eight samples of {asked}, each begun from the same noise as for the other labels."


slider(draw_label, list(range(11)), "label", describe, start=3)

# %% [markdown]
# *Slant and weight of the stroke stay, the digit changes: the noise decides the style, the label the class. Label 10 is the null token: "some digit".* With a deterministic sampler one noise and one label give one image.
#
# ## 5. Does it draw what it was asked for?
#
# **Class accuracy.** A judge that was trained on *other* digits reads the samples. Two habits make this number honest: a look at what the judge says of real digits, and a 95 % interval. Wilson's stays sensible at an accuracy of 1. Its ends are the two shares $q$ from which the measured accuracy is 1.96 of *their* standard errors away, $|\mathrm{acc}-q|=z\sqrt{q(1-q)/n}$ with $z=1.96$. Solved for $q$ (a quadratic equation), they are
#
# $$\frac{\mathrm{acc}+\frac{z^2}{2n}\ \pm\ z\sqrt{\frac{\mathrm{acc}(1-\mathrm{acc})}{n}+\frac{z^2}{4n^2}}}{1+\frac{z^2}{n}} .$$

# %% exercise="02.7"


# %% tags=["skip-grading"]
class SvmJudge(nn.Module):
    """The course's judge of 8x8 digits, a support vector machine, as a network that returns logits."""

    def __init__(self):
        super().__init__()
        self.judge = Judge.digits()

    def forward(self, images):
        return F.one_hot(self.judge.classify(images), 10).double()


svm = SvmJudge()
n = 300 if SMOKE else 1000
asked = torch.arange(10).repeat_interleave(n // 10)
made = to_pixels(sample(network, asked, 25, (1, 8, 8), abar, rng(2)))
for name, pictures, classes in (("real digits", images, labels), ("samples", made, asked)):
    print("{}: {:.3f} [{:.3f}, {:.3f}] of {}".format(name, *class_accuracy(svm, pictures, classes), len(classes)))

# %% tags=["nbval-check-output", "skip-grading"]
print("far more samples are read as asked than guessing would give:", class_accuracy(svm, made, asked)[1] > 0.2)

# %% [markdown]
# **What the accuracy does not say**: whether the samples are varied, and whether they are new. Both can be seen. Below each sample stands the training digit that is nearest to it, pixel by pixel.

# %% tags=["skip-grading"]
some = made[:: n // 10][:10]
nearest = images[torch.cdist(some.flatten(1), images.flatten(1)).argmin(1)]
fig, ax = plt.subplots(figsize=(7, 1.8))
show_tile(ax, torch.cat([some, nearest]), 10, "samples (above) and the training digits nearest to them (below)")
plt.show()

# %% [markdown]
# **What the loss does not say.** Here is the loss at each noise level, for training digits and for held-out ones, beside the floor of lesson 01. Which floor? If "the data" are just our 1,397 pictures, then your `posterior_mean_eps` of lesson 01, run over the pictures of the class that was asked for, is the perfect network, and we can compute what it would reach (the same sum, for a whole batch).


# %% tags=["skip-grading"]
@torch.no_grad()
def loss_at(t, pictures, classes, gen):
    """The network's loss at one time, and that of the perfect memoriser of the training set."""
    eps = torch.randn(pictures.shape, generator=gen)
    xt = abar[t].sqrt() * pictures + (1 - abar[t]).sqrt() * eps
    mine = F.mse_loss(network(xt, torch.full((len(xt),), t), classes), eps)
    flat, a, sigma = xt.flatten(1), abar[t].sqrt(), (1 - abar[t]).sqrt()
    logits = -(torch.cdist(flat, a * x0.flatten(1)) ** 2) / (2 * sigma**2)
    weights = torch.softmax(logits.masked_fill(labels != classes[:, None], -math.inf), dim=1)  # of its class only
    remembered = (flat - a * (weights @ x0.flatten(1))) / sigma
    return float(mine), float(F.mse_loss(remembered, eps.flatten(1)))


times = [5, 10, 20, 50, 100, 200, 300, 400, 500, 600, 800, 950]
new = (held_out - centre) / spread
on_train = [loss_at(t, x0[:400], labels[:400], rng(t)) for t in times]
on_new = [loss_at(t, new, held_out_labels, rng(t)) for t in times]

plt.figure(figsize=(7, 3.4))
plt.plot(times, [a for a, _ in on_train], "o-", color=COLOURS["conditional"], label="network, training digits")
plt.plot(times, [a for a, _ in on_new], "s-", color=COLOURS["guided"], label="network, held-out digits")
plt.plot(times, [b for _, b in on_train], ":", color=COLOURS["data"], label="perfect memoriser, training digits")
plt.plot(times, [b for _, b in on_new], "--", color=COLOURS["noise"], label="perfect memoriser, held-out digits")
plt.gca().set(xlabel="t", ylabel="loss", yscale="log", ylim=(1e-3, 5), title="the same loss, four meanings")
plt.legend(fontsize=8)
plt.show()

# %% tags=["nbval-check-output", "skip-grading"]
print("at t = 100, the memoriser beats the network on training digits:", on_train[4][1] < on_train[4][0])
print("and loses to it on held-out digits:", on_new[4][1] > on_new[4][0])

# %% [markdown]
# *The lowest possible training loss belongs to a table that has learnt the pictures by heart (below $t=150$ its loss falls out of the picture): it would sample only copies. On new digits the same table is by far the worst at low noise, where it matters which picture it was; at high noise, where only averages count, it is as good as any.* So a loss of 0.03 tells neither that a network is perfect nor that it is good. The average over $t$ is ruled by noise levels where nothing about the digit is decided any more, and its best value is not what we want. (GANs and VAEs have other signs: a discriminator that can no longer tell, a bound that stops rising.)
#

# %% [markdown]
# What, then, do people report? The **Fréchet distance** between Gaussian fits of features of real and of made pictures (FID, if the features come from a well-known classifier called Inception): it sees blur and missing kinds. Always quote it beside its floor, real against real, and at the same number of samples; `condiff evaluate` does.
#

# %% [markdown]
# ## 6. How much does the label tell?
#
# The two answers of the network, with the label and without, differ by what the label tells. There is an exact statement (it ties information to mean square errors, hence its name I-MMSE; Guo, Shamai & Verdú 2005; for diffusion Kong et al. 2023): with $\lambda=\log\mathrm{SNR}$,
#
# $$I(x_0;y)=\tfrac12\int\mathbb E\big\|\mathbb E[\epsilon\mid x_t,y]-\mathbb E[\epsilon\mid x_t]\big\|^2\,\mathrm d\lambda ,\tag{2}$$
#
# in nats (natural logarithms); divide by $\log2$ for bits. The square is summed over the entries of an example and averaged over examples. It holds over all $\lambda$, for the exact conditional means of one and the same data. The integrand is half the mean square of the vector that guidance will multiply.

# %% exercise="02.8"

# %% [markdown]
# In the exact world both sides can be computed. The classes have probabilities .30, .30, .40, so a label holds $H(y)=1.571$ bits; how much of it survives in $x_0$ is $H(y)-\mathbb E[H(y\mid x_0)]$:

# %% tags=["nbval-check-output"]
world = archipelago()
points, classes = world.sample(4000, rng(1))
entropy = torch.zeros(4000, dtype=torch.float64)
for c in range(3):
    log_p = world.class_log_prob(points, torch.zeros(4000, dtype=torch.float64), discrete(abar.double()), c)
    entropy -= log_p.exp() * log_p
shares = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
left = (-(shares * shares.log()).sum() - entropy.mean()) / math.log(2)

logsnr = torch.linspace(-9, 9, 60, dtype=torch.float64)
noise = torch.randn(4000, 2, generator=rng(2), dtype=torch.float64)
gaps = []
for value in logsnr:
    a, sigma = torch.sigmoid(value).sqrt(), torch.sigmoid(-value).sqrt()
    path = discrete(torch.stack([torch.ones_like(a), a**2]))
    xt, t = a * points + sigma * noise, torch.ones(4000, dtype=torch.float64)
    uncond = -sigma * world.score(xt, t, path)
    cond = torch.stack([-sigma * world.score(xt, t, path, label=c) for c in range(3)])[classes, torch.arange(4000)]
    gaps.append((cond, uncond))
bits = conditioning_bits(torch.stack([c for c, _ in gaps]), torch.stack([u for _, u in gaps]), logsnr)
print(
    f"formula (2): {bits:.1f} bits; by entropies: {float(left):.1f} bits; they agree:", abs(bits - float(left)) < 0.03
)

# %% [markdown]
# **Predict before you run.** Ten equally frequent digits: a label holds $\log_2 10=3.32$ bits. What will (2) give for *your network*: less, about as much, or more?

# %%
guess_bits = ...  # "less", "equal" or "more"

# %% tags=["skip-grading"]
steps_t = torch.linspace(20, T, 30).round().long()
network_gaps, probe = [], x0[: 64 if SMOKE else 256]
n_probe = len(probe)
with torch.no_grad():
    for t in steps_t:
        xt = abar[t].sqrt() * probe + (1 - abar[t]).sqrt() * torch.randn(probe.shape, generator=rng(int(t)))
        time_, null = t.expand(n_probe), torch.full((n_probe,), network.null)
        network_gaps.append((network(xt, time_, labels[:n_probe]), network(xt, time_, null)))
eps_c, eps_u = (torch.stack(part) for part in zip(*network_gaps))
logsnr = (abar[steps_t] / (1 - abar[steps_t])).log()
measured_bits = conditioning_bits(eps_c, eps_u, logsnr)

density = ((eps_c - eps_u) ** 2).flatten(2).sum(2).mean(1) / 2 / math.log(2)
plt.figure(figsize=(6, 3))
plt.plot(logsnr, density, "o-", color=COLOURS["guided"])
plt.gca().set(
    xlabel="log SNR (noise on the left, data on the right)",
    ylabel="bits per unit",
    title=f"your network: {measured_bits:.1f} bits; a label holds 3.32",
)
plt.show()
reveal(guess_bits, "more" if measured_bits > 3.4 else "less" if measured_bits < 3.2 else "equal")

# %% [markdown]
# Formula (2) holds for the *exact* conditional means. Whatever a network gives beyond 3.32 bits cannot be information: it is the difference of two errors, and most of it sits in the null branch, which saw a tenth of the training (its loss exceeds the other's by about the excess seen here, even at low noise, where a label tells a perfect network nothing). Remember this picture in lesson 04, where that difference gets multiplied: part of what guidance does on real networks is to push away from a *worse model*.
#
# ## 7. The same on MNIST
#
# 28x28 pixels, 60,000 digits, the package's `UNet` (4x4 pixels folded into channels first, so that a CPU keeps up), *your* training step, running mean and sampler.
#
# One trick makes it work. So small a network cannot pass all the noise of 784 pixels through, as predicting $\epsilon$ would ask of it. So it predicts the velocity $v$ of lesson 01 and *answers* with $\epsilon=\sigma x_t+a\,v$: at high noise nearly all of the answer is $x_t$ itself, handed through.
#
# Where MNIST is neither on disk (`CONDIFF_MNIST`) nor to be fetched, the cell says so and the lesson ends well without it.


# %% tags=["nbval-ignore-output", "skip-grading"]
class MnistNetwork(nn.Module):
    """condiff_ref's U-Net with this lesson's arguments; it predicts v, and answers with eps."""

    def __init__(self):
        super().__init__()
        self.unet = UNet(1, (32, 64), classes=10, padding=2, patch=4)
        self.null = self.unet.null

    def forward(self, xt, t, y):
        a, sigma = (pad(table.to(xt), xt)[t] for table in (abar.sqrt(), (1 - abar).sqrt()))
        return sigma * xt + a * self.unet(xt, t / T, label=y)


mnist = None
if SMOKE:
    print("The quick run leaves MNIST out.")
else:
    try:
        mnist = data.mnist("train")
    except data.DataError as problem:
        print(f"No MNIST here, and that is fine: {problem}")

if mnist is not None:
    pictures, digits = (part.to(device) for part in mnist)
    middle, width = pictures.mean(), pictures.std()
    torch.manual_seed(0)
    big, big_losses = train(
        MnistNetwork().to(device), (pictures - middle) / width, digits, seconds=120, batch=32, lr=3e-3, decay=0.998
    )
    asked = torch.arange(10).repeat_interleave(20).to(device)
    made = sample(big, asked, 25, (1, 28, 28), abar.to(device), rng(3))
    made = (width * made + middle).clamp(-1, 1).cpu()
    fig, ax = plt.subplots(figsize=(8, 8))
    show_tile(ax, made[::2], 10, f"MNIST after {len(big_losses)} steps")
    plt.show()

# %% tags=["nbval-ignore-output", "skip-grading"]
if mnist is not None:
    judge = Judge.mnist()

    class MnistJudge(nn.Module):
        def forward(self, images):
            return F.one_hot(judge.classify(images), 10).double()

    print(
        "samples read as asked: {:.3f} [{:.3f}, {:.3f}] of 200".format(*class_accuracy(MnistJudge(), made, asked.cpu()))
    )
    print(f"loss {sum(big_losses[-200:]) / 200:.3f}; the judge reads {judge.test_accuracy} of real digits right")

# %% [markdown]
# ## 8. Write the test
#
# Dropping labels is one line, and code bases have got it wrong in many ways: a mask computed and never used, a coin for the whole batch, a null that is the digit zero. None of these stops training. Write the test that would have caught them.

# %% exercise="02.9"

# %% [markdown]
# ## 9. What it costs, what to keep
#
# **Cost.** A label costs one row of a table and no time. Training costs the same as without labels; sampling costs one evaluation per step (lesson 04 will make it two). A new class that resembles the old ones needs a new row and some fine-tuning, not a new model; rows can be mixed.
#
# **Keep.**
# - Conditioning changes the *input* of the network and nothing else: same noise, same loss, same sampler.
# - Time and class modulate every block; $t$ must be scaled so that the network can tell time.
# - Label dropout is one coin per example, and makes one network answer two questions.
# - A loss does not measure quality: its floor differs from 0, its average hides $t$, and its optimum on a finite set is a memoriser. Judge samples, with intervals and floors.
#
# ## Questions
#
# 1. What changes in training when a model becomes class-conditional with dropout? What in the forward process?
# ### BEGIN SOLUTION
# *The network gets the label, which becomes null with probability $p$ for each example. The forward process, the target and the loss stay as they are.*
# ### END SOLUTION
# 2. Why is the null token not simply class 0, or an embedding of zeros?
# ### BEGIN SOLUTION
# *Class 0 is a digit: the "unconditional" answer would be that of zeros. A fixed vector of zeros can work, as the MLP behind it learns around it, but a row of its own is learned like the others and cannot be hit by a class by accident.*
# ### END SOLUTION
# 3. The embedding of $t$ is added to that of the class. Could the network confuse a late seven with an early one?
# ### BEGIN SOLUTION
# *Both are vectors of 64 numbers, and the MLP after the sum separates directions. Concatenating them is as good; what fails is an embedding of $t$ that hardly varies.*
# ### END SOLUTION
# 4. A colleague samples with the live weights instead of their running mean and finds the pictures grainier, at nearly the same loss. Who is right, the eye or the loss?
# ### BEGIN SOLUTION
# *The eye. Errors of a sampler add up over its steps, and the loss averages them away. With a learning rate that has fallen to zero the two hardly differ.*
# ### END SOLUTION
# 5. You have 1,397 pictures and unlimited time. Why not train until the training loss stops falling?
# ### BEGIN SOLUTION
# *Its lowest value belongs to the memoriser of section 5. Watch the loss on held-out pictures, and the share of samples that are nearer to a training picture than real new ones are.*
# ### END SOLUTION
# 6. Name one thing that class labels cannot do and that later lessons add.
# ### BEGIN SOLUTION
# *Combine conditions that were never seen together, as words do; say where something is; follow an outline.*
# ### END SOLUTION
#
# **Sources.** Ronneberger et al. 2015 (U-Net); Vaswani et al. 2017 (sinusoids); Perez et al. 2018 (FiLM); Ho, Jain & Abbeel 2020; Dhariwal & Nichol 2021; Ho & Salimans 2022 (workshop 2021); Guo, Shamai & Verdú 2005; Kong et al. 2023 (arXiv 2310.07972).
