# %% [markdown]
# # 09 · Latent diffusion
#
# **Question.** Stable Diffusion does not diffuse pictures, it diffuses *latents*. What is a latent, what does it leave out, and what has to be right at the two joints between autoencoder and diffusion?
#
# **You need** lesson 02 (training, label dropout, the DDIM sampler) and lesson 04 (guidance); section 10 looks back at lessons 06 to 08. No GPU, no download; where MNIST is at hand, one figure is drawn from it.
#
# **You build** the loss of a variational autoencoder, with which you train one; the scale factor; training and sampling between its two ends; a ledger of the cost; and a rate-distortion curve.
#
# | letter | meaning |
# |---|---|
# | $x,\ \hat x$ | a picture, pixels in $[-1,1]$; its reconstruction |
# | $z,\ q(z\mid x)=\mathcal N(\mu,\mathrm{diag}\,e^{\mathrm{logvar}})$ | its latent; what the encoder says of it |
# | $\beta$ | weight of the KL term |
# | $c$ | the scale factor, `factor` in code: the diffusion model sees $z_0=c\,\mu$ (in shapes, (B, c, h, w), c counts a latent's channels) |
# | $s$ | guidance scale, as ever: 0 unconditional, 1 conditional |

# %% tags=["setup"]

# %%
import time

from condiff_ref import data
from condiff_ref.autoencoder import Autoencoder
from condiff_ref.checkpoints import TableNetwork, load
from condiff_ref.cost import unet_cost
from condiff_ref.judge import Judge
from condiff_ref.metrics import class_accuracy, frechet_distance, precision_recall
from condiff_ref.mixture import archipelago, line2
from condiff_ref.schedules import discrete
from condiff_ref.shapes import pad
from condiff_ref.unet import UNet
from condiff_ref.viz import COLOURS, show_tile
from condiff_ref.widgets import slider
from matplotlib.figure import Figure
from torch.distributions import Normal

T = 1000
# the cosine table, stopped just before a = 0: samplers divide by a
abar = (torch.cos(math.pi / 2 * torch.linspace(0, 0.998, T + 1, dtype=torch.float64)) ** 2).float()


def rng(seed=0):
    return Generator().manual_seed(seed)


# %% [markdown]
# ## 1. Why not pixels?
#
# Most bits of a picture are spent on what nobody sees: grain, the exact grey of each pixel. A model of pixels spends its effort there, too. **Latent diffusion** (Rombach et al. 2022) splits the work. *Stage 1*: an autoencoder makes pictures small; it takes care of the *perceptual* bits, how things look close by. *Stage 2*: a diffusion model learns the distribution of the small things, the *semantic* bits: what there is, and where. Stage 1 is trained once, frozen, and shared by many models.
#
# Some slides say that the autoencoder strips away "irrelevant high-level details". It is the other way round: **high-frequency** detail that one hardly perceives goes, the high-level content stays (section 9 measures it). They also give pixel models "multiple GPU days"; the paper says *hundreds*, 150 to 1000 days of a V100 to train the strong ones of that time, and about five days of an A100 to draw 50,000 samples.
#
# How small? Stable Diffusion 1 makes 64x64x4 numbers of 512x512x3, Stable Diffusion 3 makes 128x128x16 of 1024x1024x3. **Predict:** which one compresses more?

# %%
guess_smaller = ...  # "SD 1" or "SD 3"

# %% tags=["nbval-check-output"]
compression = {"SD 1": 512 * 512 * 3 / (64 * 64 * 4), "SD 3": 1024 * 1024 * 3 / (128 * 128 * 16)}
compression |= {"digits, this lesson": 8 * 8 / (4 * 4 * 2), "MNIST, this lesson": 28 * 28 / (8 * 8 * 2)}
for name, ratio in compression.items():
    print(f"{name}: {ratio:g} times fewer numbers")

# %%
reveal(guess_smaller, max(("SD 1", "SD 3"), key=compression.get))

# %% [markdown]
# SD 3 keeps four times as many numbers per place: more channels make better reconstructions and harder latents, and larger diffusion models can cope with those (Esser et al. 2024).
#
# Not every well-known model is latent. *Imagen* (Saharia et al. 2022) is shown in the latent part of some slides, but diffuses **pixels**, in a cascade: 64x64 first, then two diffusion models that enlarge to 256 and to 1024. Make-A-Video (Singer et al. 2022), shown beside it, is a cascade of decoder, interpolation and two super-resolution models as well.
#
# ## 2. Two Gaussians, and a bound
#
# The encoder does not say "this point" but "about here": a Gaussian $q(z\mid x)$. How far it is from the standard normal is measured by $\mathrm{KL}(q\,\|\,p)=\mathbb E_q[\log q(z)-\log p(z)]$. For one entry, with variance $v=e^{\mathrm{logvar}}$, the two logarithms are $-\tfrac12\log v-\tfrac{(z-\mu)^2}{2v}$ and $-\tfrac{z^2}2$ (the $2\pi$ cancel). As $\mathbb E_q(z-\mu)^2=v$ and $\mathbb E_q z^2=\mu^2+v$,
#
# $$\mathrm{KL}\big(\mathcal N(\mu,v)\,\|\,\mathcal N(0,1)\big)=\tfrac12\big(\mu^2+v-1-\log v\big),\tag{1}$$
#
# in nats (natural logarithms; one bit is $\ln2$ nats). The entries of $z$ are independent, so their KLs add up.

# %% exercise="09.1"

# %% [markdown]
# To train the encoder, gradients must pass through a *sample* of $q$. So write it as a function of $\mu$, $v$ and a noise that does not depend on them, $z=\mu+\sqrt v\,\epsilon$: the **reparameterisation** (Kingma & Welling 2014). It is the forward process of diffusion once more, with scales that are learned.

# %% exercise="09.2"

# %% [markdown]
# **What to maximise.** A model with latents, $p(x)=\int p(z)\,p(x\mid z)\,\mathrm dz$, has an integral that we cannot do. So take any $q(z\mid x)$ and insert it:
#
# $$\log p(x)=\mathbb E_q\Big[\log\frac{p(x\mid z)\,p(z)}{q(z\mid x)}\Big]+\mathbb E_q\Big[\log\frac{q(z\mid x)}{p(z\mid x)}\Big]
# =\underbrace{\mathbb E_q\log p(x\mid z)-\mathrm{KL}(q\,\|\,p(z))}_{\text{ELBO}}+\underbrace{\mathrm{KL}\big(q\,\|\,p(z\mid x)\big)}_{\ge0}.\tag{2}$$
#
# (Check: the logarithms add up to $\log\frac{p(x\mid z)p(z)}{p(z\mid x)}=\log p(x)$, by Bayes, whatever $z$.) A KL is never negative (Jensen), so the **evidence lower bound** is below $\log p(x)$, by exactly the KL from $q$ to the true posterior $p(z\mid x)$.
#
# In one dimension all of it is known: $z\sim\mathcal N(0,1)$, $x\mid z\sim\mathcal N(z,\tfrac12)$. Then $x\sim\mathcal N(0,\tfrac32)$ and $z\mid x\sim\mathcal N(\tfrac23x,\tfrac13)$. **Predict:** at $x=1.2$, with the prior itself as $q$, how far (in nats) does the bound lie below $\log p(x)$? 0, 0.4, 1.4 or 4?

# %%
guess_gap = ...

# %%
x_seen, n = 1.2, 200_000
log_p = float(Normal(0, 1.5**0.5).log_prob(torch.tensor(x_seen)))
gaps = {}
print(f"log p(x) = {log_p:.3f}\nq                  ELBO, sampled     gap   KL(q || posterior)")
for name, mean, var in (("posterior", 0.8, 1 / 3), ("right mean, wide", 0.8, 1.0), ("prior", 0.0, 1.0)):
    mu, logvar = torch.full((n, 1), mean), torch.full((n, 1), math.log(var))
    z = reparam(mu, logvar, rng(1))
    elbo = float(Normal(z, 0.5**0.5).log_prob(torch.tensor(x_seen)).mean() - kl_gauss(mu, logvar).mean())
    v = var * 3  # in units of the posterior's standard deviation, q is N((mean - 0.8) / std, 3 var)
    exact = 0.5 * ((mean - 0.8) ** 2 * 3 + v - 1 - math.log(v))
    gaps[name] = (log_p - elbo, exact)
    print(f"{name:18} {elbo:8.3f} {log_p - elbo:15.3f} {exact:12.3f}")
reveal(guess_gap, round(gaps["prior"][0], 1), close=0.2)

# %% tags=["nbval-check-output"]
print("the gap is the KL to the posterior:", all(abs(gap - exact) < 0.02 for gap, exact in gaps.values()))

# %% [markdown]
# **With pictures.** Let the decoder's answer be the mean of a Gaussian, $p(x\mid z)=\mathcal N(\hat x(z),\tfrac\beta2I)$. Then $-\beta\log p(x\mid z)=\|x-\hat x\|^2$ up to a constant, and $-\beta\cdot$ELBO is
#
# $$\mathcal L=\mathbb E\big[\|x-\hat x\|^2+\beta\,\mathrm{KL}(q(z\mid x)\,\|\,\mathcal N(0,I))\big],\tag{3}$$
#
# both terms **summed** over what one picture has. So $\beta=1$ assumes pixels that are uncertain by $\sqrt{1/2}=0.7$, of a range of 2: very much. (Read with the decoder's variance fixed at $\tfrac12$ and $\beta>1$, it is the $\beta$-VAE of Higgins et al. 2017. Stable Diffusion's autoencoder has $10^{-6}$ in its published configuration, beside two losses that keep pictures sharp: one compares features, one is an adversary's.)

# %% exercise="09.3"

# %% [markdown]
# ## 3. Stage 1: an autoencoder
#
# The course's `Autoencoder` is a small convolutional network: the encoder halves the sides once and answers with a mean and a log-variance for each entry of the latent, 4x4 places with 2 channels; the decoder goes the same way back. Train it on 1,097 of the 8x8 digits. Neither the autoencoder nor the judge (a support vector machine, fitted on yet other digits) sees the other 300.

# %%
images, labels = data.digits("train")
seen, seen_labels, unseen, unseen_labels = images[:1097], labels[:1097], images[1097:], labels[1097:]
judge = Judge.digits()


def train_autoencoder(beta, steps, loss=None, lr=5e-3):
    """Your reparam, your loss: 64 digits a step, on the CPU."""
    torch.manual_seed(0)
    autoencoder, gen = Autoencoder(1, 2, 2, width=16), rng(1)
    opt = torch.optim.AdamW(autoencoder.parameters(), lr)
    for i in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, (i + 1) / 50, 1 - i / steps)
        x = seen[torch.randint(len(seen), (64,), generator=gen)]
        mu, logvar = autoencoder.posterior(x)
        value = (loss or vae_loss)(x, autoencoder.decoder(reparam(mu, logvar, gen)), mu, logvar, beta)
        autoencoder.zero_grad()
        value.backward()
        opt.step()
    return autoencoder.requires_grad_(False).eval()


def there_and_back(autoencoder, x, seed=2):
    """x, its reconstruction from a sample of q(z | x), and the parameters of q."""
    mu, logvar = autoencoder.posterior(x)
    return x, autoencoder.decoder(reparam(mu, logvar, rng(seed))), mu, logvar


# %% tags=["nbval-ignore-output", "skip-grading"]
BETA = 1e-2
# the quick run takes one that is trained already, on all of these digits
autoencoder = load("digits-autoencoder").network if SMOKE else train_autoencoder(BETA, 500)
_, rec, mu, _ = there_and_back(autoencoder, unseen)
mean_digit = seen.mean(0).expand_as(unseen)
print(f"squared error per pixel {F.mse_loss(rec, unseen):.4f}; of the mean digit {F.mse_loss(mean_digit, unseen):.2f}")
print(f"the judge reads {class_accuracy(judge, unseen, unseen_labels)} of the originals")
print(f"and             {class_accuracy(judge, rec.clamp(-1, 1), unseen_labels)} of the reconstructions")

fig, axes = plt.subplots(2, 1, figsize=(8, 3.6), layout="constrained")
show_tile(axes[0], torch.cat([unseen[:10], rec[:10].clamp(-1, 1)]), 10, "originals, reconstructions")
channels = mu[:10].transpose(0, 1).flatten(0, 1)[:, None] / mu.abs().max()
show_tile(axes[1], channels, 10, "their latents: first and second channel, 4x4 each (dark: large)")
plt.show()

# %% [markdown]
# *Half as many numbers, and the digits are still read. A latent is itself a small picture, as convolutions keep places in place (though in 4x4 of them one hardly recognises a digit): U-Nets and transformers work on it as it is.*
#
# Can one *draw* with it, without any diffusion? Take $z\sim\mathcal N(0,I)$, as the model behind the ELBO says, and decode:

# %% tags=["nbval-ignore-output", "skip-grading"]
random_latent = torch.randn(20, 2, 4, 4, generator=rng(3))
fig, ax = plt.subplots(figsize=(8, 1.2))
show_tile(ax, autoencoder.decoder(random_latent).clamp(-1, 1), 20, "decoded random latents")
plt.show()

# %% [markdown]
# *Strokes, but hardly a digit: with so small a $\beta$ little makes the latents of all digits together (the **aggregate posterior**) look like $\mathcal N(0,I)$. Neighbours in a latent depend on one another; in independent noise they do not.* Either make latents look so, by a larger $\beta$, or learn how they are distributed: stage 2.
#
# ## 4. The weight of the KL
#
# **Predict before you run.** $\beta=1$ instead of $0.01$. Which of the three get worse, and which better: the reconstructions, the latents as a code (how much of each is noise), the pictures decoded from random latents? (The cell judges the last by their Fréchet distance to digits.)

# %%
guess_rec, guess_latents, guess_random = ..., ..., ...  # "better" or "worse", each

# %% tags=["nbval-ignore-output", "skip-grading"]
ladder = {BETA: autoencoder}
for beta in (1.0, 10.0) if SMOKE else (1e-3, 0.1, 1.0, 10.0):
    ladder[beta] = train_autoencoder(beta, 30 if SMOKE else 500)
ladder = dict(sorted(ladder.items()))

found = {}
print("beta    error  read right  std of mu  std of q  distance of decoded random latents to digits")
for beta, net in ladder.items():
    _, rec, mu, logvar = there_and_back(net, unseen)
    made = net.decoder(torch.randn(300, 2, 4, 4, generator=rng(3))).clamp(-1, 1)
    right = class_accuracy(judge, rec.clamp(-1, 1), unseen_labels).value
    far = frechet_distance(judge.features(made), judge.features(seen))
    found[beta] = (F.mse_loss(rec, unseen).item(), (0.5 * logvar).exp().mean().item() / mu.std().item(), far)
    print(f"{beta:<6g} {found[beta][0]:6.3f} {right:10.2f} {mu.std():10.2f}", end="")
    print(f"{(0.5 * logvar).exp().mean():10.2f} {far:11.1f}")
for guess, k in ((guess_rec, 0), (guess_latents, 1), (guess_random, 2)):
    reveal(guess, "worse" if found[1.0][k] > found[BETA][k] else "better")

# %% tags=["nbval-ignore-output", "skip-grading"]
first = torch.tensor([int((unseen_labels == digit).nonzero()[0]) for digit in range(10)])


def draw_weight(beta):
    net = ladder[beta]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots(2, 1, height_ratios=[2, 1])
    rec = there_and_back(net, unseen[first])[1].clamp(-1, 1)
    show_tile(axes[0], torch.cat([unseen[first], rec]), 10, f"KL weight {beta:g}: originals, reconstructions")
    made = net.decoder(torch.randn(10, 2, 4, 4, generator=rng(3))).clamp(-1, 1)
    show_tile(axes[1], made, 10, "decoded random latents")
    return figure


def describe(beta):
    return f"KL weight {beta:g}: ten held-out digits, what a decoder makes of their latents, and of ten random latents."


slider(draw_weight, list(ladder), "KL weight", describe, start=len(ladder) - 2)

# %% [markdown]
# *With $\beta=1$ reconstructions blur, and many are misread; most of each latent is noise; random latents decode to something nearer to digits. With $\beta=10$ every picture becomes the same mean digit.* No $\beta$ here gives both sharp reconstructions and a simple distribution. Latent diffusion need not choose: a tiny $\beta$ for sharpness (the KL merely keeps latents from running away), and a diffusion model for the distribution.
#
# ### Posterior collapse, exactly
#
# At $\beta=10$ the encoder says $\mathcal N(0,I)$ whatever it sees: **posterior collapse**. Some slides blame the Gaussian prior, for being unrealistic. Test that where the prior is *perfectly* realistic: data $x\sim\mathcal N(0,\lambda)$, one latent, encoder mean $ux$ with variance $v$, decoder $wz$. Then (3) is
#
# $$\mathcal L=\lambda(1-uw)^2+w^2v+\tfrac\beta2\,(u^2\lambda+v-1-\log v).$$
#
# Set the derivatives with respect to $v$ and $u$ to 0: $v=\beta/(2w^2+\beta)$, $u=wv\cdot2/\beta$; then that with respect to $w$ gives $w^2=\lambda-\tfrac\beta2$, or $w=0$ where this would be negative. With it $v=\tfrac\beta{2\lambda}$, and
#
# $$\text{rate}=\mathbb E\,\mathrm{KL}=\tfrac12\log\frac{2\lambda}{\beta}\ \text{ nats for }\beta<2\lambda,\qquad 0\ \text{ from } \beta=2\lambda\text{ on}.\tag{4}$$
#
# **Predict:** $\lambda=1$ and $\beta=2.5$. How many bits does the latent carry?

# %%
guess_bits = ...


# %%
def linear_vae(beta, steps=300):
    """Train encoder and decoder of the linear world by your loss; its rate in bits, and the variance of all z."""
    weights = torch.tensor([0.5, 0.5, -1.0], requires_grad=True)  # u, w, log v
    opt, gen = torch.optim.Adam([weights], 0.2), rng(1)
    for i in range(steps):
        opt.param_groups[0]["lr"] = 0.2 * (1 - i / steps)
        u, w, log_v = weights
        x = torch.randn(2000, 1, 1, 1, generator=gen)
        mu, logvar = u * x, log_v.expand(x.shape)
        weights.grad = None
        vae_loss(x, w * reparam(mu, logvar, gen), mu, logvar, beta).backward()
        opt.step()
    u, v = weights[0].item(), weights[2].exp().item()
    return (u**2 + v - 1 - math.log(v)) / 2 / math.log(2), u**2 + v


print("beta   bits, trained   bits, formula (4)   variance of all latents together")
exact_bits = {beta: max(0.0, 0.5 * math.log2(2 / beta)) for beta in (0.05, 0.2, 1.0, 1.5, 2.5)}
trained = {beta: linear_vae(beta) for beta in exact_bits}
for beta, (bits, variance) in trained.items():
    print(f"{beta:<6g} {bits:10.2f} {exact_bits[beta]:16.2f} {variance:22.2f}")
reveal(guess_bits, round(trained[2.5][0], 1), close=0.05)

# %% tags=["nbval-check-output"]
print("trained and printed rates agree:", all(abs(trained[b][0] - exact_bits[b]) < 0.06 for b in trained))
print("the latents together are N(0, 1) at every beta:", all(abs(v - 1) < 0.06 for _, v in trained.values()))

# %% [markdown]
# The prior fits exactly, at every $\beta$, and the posterior collapses all the same: the **KL term** does it, as soon as a latent costs more than it saves. A prior that does not fit causes another fault, the one of section 3: random latents that decode to nothing.
#
# And a **strong decoder** makes it cheap to collapse. Give the decoder a variance $\sigma^2$ of its own to learn. For every $\sigma^2\le\lambda$ the best $w$ has $w^2=\lambda-\sigma^2$, as above with $\sigma^2=\tfrac\beta2$, and makes $x\sim\mathcal N(0,w^2+\sigma^2)=\mathcal N(0,\lambda)$: the *same* ELBO, at a rate of $\tfrac12\log(\lambda/\sigma^2)$ that may be anything. At $\sigma^2=\lambda$ the decoder models the data by itself, and the latent is not needed:

# %% tags=["nbval-check-output"]
for variance in (0.01, 0.25, 1.0):
    w = (1 - variance) ** 0.5
    v = variance / (w**2 + variance)  # the posterior of z, given x: N(w x, v)
    kl = (w**2 + v - 1 - math.log(v)) / 2  # averaged over x, whose variance is 1
    squared_error = (1 - w**2) ** 2 + w**2 * v
    elbo = -0.5 * math.log(2 * math.pi * variance) - squared_error / (2 * variance) - kl
    print(f"decoder variance {variance:4}: rate {kl / math.log(2) + 0:.2f} bits, ELBO {elbo:.4f}")
print(f"log-likelihood of the data, E log p(x): {-0.5 * math.log(2 * math.pi) - 0.5:.4f}")

# %% [markdown]
# In practice it is well known from text, whose decoders predict each word from those before (Bowman et al. 2016).
#
# **Its sibling.** GANs are charged with *mode collapse*, and some slides explain: "it learns the data, not the distribution". That would be memorising, another fault. Mode collapse is *missing modes*. Two samplers of the archipelago, one with each fault:

# %% tags=["nbval-check-output"]
world = archipelago()
real, islands = world.sample(1000, rng(11))
training, _ = world.sample(1000, rng(12))
memoriser = training[torch.randint(1000, (1000,), generator=rng(13))]
one_class = world.given(1).sample(1000, rng(14))[0]  # two islands of six
for name, made in (("memoriser", memoriser), ("mode collapse", one_class)):
    precision, recall = precision_recall(real, made)
    copies = (torch.cdist(made, training).amin(1) < 1e-9).double().mean()
    print(f"{name}: misses no mode: {recall.value > 0.8}; copies training points: {bool(copies > 0.5)}")

# %% [markdown]
# ### From the museum of real bugs: the mean that weighed 784
#
# In the summer of 2016 the VAE example of Keras decoded every place of the latent space to nearly the same picture (issue 3373). A commit had lost a factor, the number of pixels, so that the error (there a cross-entropy) was a *mean* over the 784 pixels of MNIST, beside a KL that was a sum; pull request 3383 put it back. A mean over $D$ pixels plus $\beta\,\mathrm{KL}$ is $1/D$ times the sum plus $D\beta\,\mathrm{KL}$, a KL weight $D$ times yours. Here $D=64$.
#
# **Predict:** in a linear autoencoder (4) holds for each principal direction of the data by itself. The largest variance of the digits along one is about 3. With this bug and $\beta=1$, how many directions keep any information?

# %%
guess_kept = ...

# %% tags=["nbval-ignore-output", "skip-grading"]
lam = torch.linalg.eigvalsh(torch.cov(seen.flatten(1).T.double())).flip(0).clamp(min=0)


def mean_error(x, rec, mu, logvar, beta):
    """As it should not be: a mean over pixels plus a sum over latents."""
    return F.mse_loss(rec, x) + beta * kl_gauss(mu, logvar).mean()


blob = train_autoencoder(1.0, 30 if SMOKE else 250, mean_error)
_, rec, mu, logvar = there_and_back(blob, unseen[first])
print(f"largest variance {lam[0]:.2f}: linear theory collapses everything from beta = {2 * lam[0]:.1f} on")
print(f"with the mean: {kl_gauss(mu, logvar).mean():.2f} nats a digit; same weight, summed: ", end="")
print(f"{kl_gauss(*ladder[1.0].posterior(unseen[first])).mean():.1f} nats")
fig, ax = plt.subplots(figsize=(7, 1.6))
show_tile(ax, torch.cat([unseen[first], rec.clamp(-1, 1)]), 10, "originals, and what the buggy loss makes of them")
plt.show()
reveal(guess_kept, int((2 * lam > 64).sum()))

# %% [markdown]
# *The same blob ten times. Nothing crashes, and nothing warns.* When you meet a KL weight in a paper or a configuration, ask over what each term is summed before you compare it with yours.
#
# ## 5. The scale factor
#
# Stage 2 takes $z_0$ and mixes it with noise of variance 1. What a schedule calls half noise is half noise only for data of variance 1. Multiply the data by $c$, and the signal-to-noise ratio at each $t$ becomes
#
# $$\mathrm{SNR}_c(t)=\frac{\bar\alpha_t\,c^2\,\mathrm{Var}(z)}{1-\bar\alpha_t},$$
#
# shifted by $\log c^2$ on the logarithmic axis at every $t$. Latents have whatever variance training gave them; Stable Diffusion 1 multiplies its own by $c=0.18215$, one over the standard deviation that its authors measured once, over *all* entries. One number, so that channels keep their proportions, and stored with the weights: a latent means nothing without it. (SD 3 also subtracts a shift, as its latents' mean is not 0.)

# %% exercise="09.4"

# %% [markdown]
# And without it? In the exact world, with $\epsilon^*$ (the best prediction of the noise there is, by formula), no network can be blamed. Take two classes on a line with variance exactly 1, multiply them by $c$, and sample with 10 or 25 steps from $\mathcal N(0,1)$; then scale back, and measure how far the sorted samples are from sorted data.
#
# **Predict:** with the cosine table, which is worse: latents 30 times too large, or 30 times too small?

# %%
guess_scale = ...  # "large", "small" or "equal"

# %%
linear_table = torch.cat([torch.ones(1).double(), (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)])
n_line = 4000
line_data = line2(0.9, 0.19).sample(n_line, rng(21))[0].sort(0).values  # variance 0.9^2 + 0.19 = 1
line_noise = torch.randn(n_line, 1, generator=rng(22), dtype=torch.float64)


def wrong_by(c, table, steps):
    """Mean distance between samples and data (Wasserstein), both at unit scale, at standard deviation c."""
    scaled, path, x = line2(0.9 * c, 0.19 * c**2), discrete(table), line_noise
    times = torch.linspace(T, 0, steps + 1).round().long().tolist()
    for i in range(steps):
        now, after = table[times[i]], table[times[i + 1]]
        t = torch.full((n_line,), float(times[i]), dtype=torch.float64)
        eps = -((1 - now) ** 0.5) * scaled.score(x, t, path)
        x = after**0.5 * (x - (1 - now) ** 0.5 * eps) / now**0.5 + (1 - after) ** 0.5 * eps
    return float((x.sort(0).values / c - line_data).abs().mean())


stds = [0.01, 0.033, 0.1, 0.33, 1.0, 3.0, 10.0, 30.0, 100.0]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
off = {}
for ax, name, table in zip(axes, ("cosine table", "DDPM's linear table"), (abar.double(), linear_table), strict=True):
    for steps, role in ((10, "conditional"), (25, "guided")):
        off[name, steps] = [wrong_by(c, table, steps) for c in stds]
        ax.loglog(stds, off[name, steps], "o-", color=COLOURS[role], label=f"{steps} steps")
    ax.set(xlabel="standard deviation of the latents", title=name)
axes[0].set(ylabel="distance of samples to data")
axes[0].legend(fontsize=8)
plt.show()
small, large = off["cosine table", 25][1], off["cosine table", 25][7]
reveal(guess_scale, "equal" if 0.6 < small / large < 1.6 else "small" if small > large else "large")

# %% tags=["nbval-check-output"]
curves = [off["cosine table", steps] for steps in (10, 25)]
print("cosine table: unit variance is best:", all(min(curve) == curve[4] for curve in curves))
print(
    "ten times off costs at least fourfold, either way:",
    all(curve[i] > 4 * curve[4] for i in (2, 6) for curve in curves),
)

# %% [markdown]
# *Left: best at 1, and about as bad on either side. Too small: nearly all steps see nothing but noise, and the picture is decided in the last one. Too large: it is decided in the first one. Right: DDPM's table spends three quarters of its steps where noise outweighs the signal, which is where large latents are decided, so it forgives these (and is best at 3), but not small ones.* "Which is worse" depends on the table; and as $\epsilon^*$ is exact, none of it is a fault of training. Training adds its own: at the wrong scale most draws of $t$ teach next to nothing, and a network's first layer meets numbers of the wrong size.
#
# ## 6. Stage 2: diffusion between the two ends
#
# Training encodes a picture, multiplies by $c$, and goes on as in lesson 02; the encoder is frozen. Sampling divides by $c$ and decodes, **once, at the end**. Nothing else is new. (Others train on a *sample* of $q$ instead of its mean; with so small a $\beta$ they hardly differ.)

# %% exercise="09.5"

# %% [markdown]
# The network is the course's `UNet`, on 4x4 "pictures" with two channels. As in lesson 02 it predicts $v$ and answers with $\epsilon$.


# %%
class LatentNetwork(nn.Module):
    """(z_t (B, 2, 4, 4), integer t (B,), label (B,)) -> the predicted noise."""

    def __init__(self):
        super().__init__()
        self.unet = UNet(2, (48,), classes=10, emb_dim=64)
        self.null = self.unet.null

    def forward(self, zt, t, y):
        a, sigma = (pad(table.to(zt), zt)[t] for table in (abar.sqrt(), (1 - abar).sqrt()))
        return sigma * zt + a * self.unet(zt, t / T, label=y)


class Encoder(nn.Module):
    """The first half of an autoencoder: pictures to mean and log-variance."""

    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x):
        return self.autoencoder.posterior(x)


def train_latents(factor, steps, lr=4e-3):
    torch.manual_seed(0)
    model, encoder, gen = LatentNetwork(), Encoder(autoencoder), rng(4)
    opt, losses = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95)), []
    for i in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, (i + 1) / 50, 1 - i / steps)
        rows = torch.randint(len(seen), (64,), generator=gen)
        losses.append(ldm_train_step(model, encoder, factor, opt, seen[rows], seen_labels[rows], 0.1, abar, gen))
    return model.eval(), sum(losses[-100:]) / len(losses[-100:])


# %% [markdown]
# **Predict:** with a wrong factor, so that latents are ten times too large, the training loss comes out *higher* than with the right one; ten times too small, *lower*. Which of the two networks draws pictures nearer to digits (Fréchet distance) than the one with the right scale?

# %%
guess_wrong = ...  # "large", "small", "both" or "neither"

# %% tags=["nbval-ignore-output", "skip-grading"]
factor = scale_factor(autoencoder.posterior(seen)[0])
asked = torch.arange(10).repeat_interleave(5 if SMOKE else 30)
shown, distance = {}, {}
print(f"factor {factor:.3f}")
print(f"{'latents':15} loss    {'read as asked, s = 1 and 2':46}distance, spread in a class (s = 1)")
for name, multiple in (("right", 1.0), ("10 x too large", 10.0), ("10 x too small", 0.1)):
    wrong = factor * multiple
    model, loss = train_latents(wrong, 25 if SMOKE else 400)
    args = (10 if SMOKE else 25, (2, 4, 4), abar)
    made = {s: ldm_sample(model, autoencoder.decoder, wrong, asked, s, *args, rng(5)) for s in (1.0, 2.0)}
    shown[name] = made[1.0].clamp(-1, 1)
    distance[name] = frechet_distance(judge.features(shown[name]), judge.features(seen))
    right = [str(class_accuracy(judge, pictures.clamp(-1, 1), asked)) for pictures in made.values()]
    spread = shown[name].unflatten(0, (10, -1)).var(1).mean()
    print(f"{name:15} {loss:.3f}   {right[0]}   {right[1]}   {distance[name]:.1f}   {spread:.2f}")
real_spread = torch.stack([seen[seen_labels == digit].var(0).mean() for digit in range(10)]).mean()
print(f"spread in a class of real digits: {real_spread:.2f}")
better = [kind for kind in ("large", "small") if distance[f"10 x too {kind}"] < distance["right"]]
reveal(guess_wrong, {0: "neither", 2: "both"}.get(len(better), better[0] if better else ""))

# %% tags=["nbval-ignore-output", "skip-grading"]
fig, axes = plt.subplots(3, 1, figsize=(8, 2.6), layout="constrained")
per_row = len(asked) // 10
for ax, (name, made) in zip(axes, shown.items(), strict=True):
    show_tile(ax, made.unflatten(0, (10, per_row))[:, :2].flatten(0, 1), 20, f"{name}: two of each digit, s = 1")
plt.show()

# %% [markdown]
# *The same architecture, steps and noise, sampled as trained: only the scale differs. (One seed each.) Large latents spoil the digits. Small ones are read as asked no less often, and yet are twice as far from real digits: decided in the last steps, they come out near the average of their class, with half of the spread of real digits.* So accuracy alone does not show the fault. Nor do losses help, as their floors differ: for Gaussian latents the best possible loss at $t$ is $\mathrm{SNR}_c/(1+\mathrm{SNR}_c)$, nearly 1 for large latents and nearly 0 for small ones, where it is enough to copy the input.
#
# **Latents have no range.** A picture's pixels end at $-1$ and $1$, so samplers of pixels clip $\hat x_0$, and Imagen's *dynamic thresholding* rescales it per picture when guidance pushes it outside. In a latent there is nothing to clip to: a large entry is a strong feature, not an error.

# %% tags=["nbval-ignore-output", "skip-grading"]
z0 = to_model(autoencoder.posterior(unseen)[0], factor)
clipped = autoencoder.decoder(from_model(z0.clamp(-1, 1), factor))
print(f"{(z0.abs() > 1).double().mean():.0%} of the entries of real latents lie outside of [-1, 1]")
print(f"clipped there and decoded, the error is {F.mse_loss(clipped, unseen):.3f} per pixel; ", end="")
print(f"left alone {F.mse_loss(autoencoder.decoder(from_model(z0, factor)), unseen):.3f}")

# %% [markdown]
# ## 7. The same on MNIST
#
# 28x28 pixels are padded to 32x32 and encoded to 8x8x2; the course ships the autoencoder and a U-Net trained on its latents. The checkpoint knows its own factor (its `decode` divides by it), so here the factor is 1. *Your* sampler, guided:

# %% tags=["nbval-ignore-output", "skip-grading"]
mnist = TableNetwork(load("mnist-latent"), abar)
mnist_judge = Judge.mnist()
asked = torch.arange(10).repeat_interleave(2 if SMOKE else 20)
pictures = {}
for s in (1.0, 2.0) if SMOKE else (0.0, 1.0, 2.0, 4.0, 8.0):
    pictures[s] = ldm_sample(mnist, mnist.decode, 1.0, asked, s, 10 if SMOKE else 25, mnist.model.shape, abar, rng(6))
    print(f"s = {s:g}: read as asked {class_accuracy(mnist_judge, pictures[s], asked)}")
fig, ax = plt.subplots(figsize=(8, 1.9))
show_tile(ax, pictures[2.0].unflatten(0, (10, -1))[:, :2].transpose(0, 1).flatten(0, 1), 10, "latent diffusion, s = 2")
plt.show()

# %% [markdown]
# *Guidance works on latents as it works on pixels: $s=0$ ignores the label, a scale above 1 obeys it better than 1 does. (What large scales cost, accuracy does not show: lesson 04.)*
#
# ## 8. What it saves
#
# Count what one picture costs. The encoder is needed in training only. The decoder runs once per picture, the network once per step and label. (One multiply-add is two FLOPs.)

# %% exercise="09.6"

# %% [markdown]
# Three ways to draw one MNIST digit, with the same trunk (widths 32 and 64): on the 32x32 pixels; on pixels folded, 4x4 of them, into 16 channels of an 8x8 picture, as this course's `mnist-unet` does; and on latents. Folding loses nothing and costs nothing. **Predict:** how many times cheaper than unfolded pixels is a picture (25 steps, guided, decoder included) with latents? 2, 6, 15 or 50?

# %%
guess_cheaper = ...


# %% tags=["nbval-ignore-output", "skip-grading"]
def count(function, *inputs):
    """Multiply-adds of the convolutions and linear layers that function(*inputs) runs, by watching them run."""
    total = []

    def watch(layer, args, out):
        # each weight is used once per output pixel, in a transposed convolution once per input pixel
        place = args[0] if isinstance(layer, nn.ConvTranspose2d) else out
        total.append(layer.weight.numel() * (1 if isinstance(layer, nn.Linear) else place.shape[2:].numel()))

    root = function if isinstance(function, nn.Module) else function.__self__
    layers = [layer for layer in root.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    hooks = [layer.register_forward_hook(watch) for layer in layers]
    function(*inputs)
    for hook in hooks:
        hook.remove()
    return sum(total)


ends = mnist.network.autoencoder
trunks = {
    "pixels": (UNet(1, (32, 64), classes=10, padding=2, emb_dim=64), 28),
    "pixels, 4x4 folded": (UNet(1, (32, 64), classes=10, padding=2, patch=4, emb_dim=64), 28),
    "latents": (mnist.network.unet, 8),
}
decoder = count(ends.decode, torch.zeros(1, 2, 8, 8))
encoder = count(ends.posterior, torch.zeros(1, 1, 28, 28))
ledgers = {}
print("                    one evaluation   25 steps, s = 2   thereof decoder   (million FLOPs)")
for name, (net, side) in trunks.items():
    latent = name == "latents"
    macs = unet_cost(net, side, side).macs
    ledgers[name] = compute_ledger(encoder if latent else 0, macs, decoder if latent else 0, 25, 2.0)
    book = ledgers[name]
    print(f"{name:20} {2 * macs / 1e6:12.1f} {book['total'] / 1e6:16.0f} {book['decoder'] / 1e6:16.1f}")
cheaper = ledgers["pixels"]["total"] / ledgers["latents"]["total"]
reveal(guess_cheaper, round(cheaper), close=3)

# %% tags=["nbval-check-output", "skip-grading"]
net, side = trunks["latents"]
watched = count(net, torch.zeros(1, 2, 8, 8), torch.zeros(1))
print("watched and computed multiply-adds of the network agree:", watched == unet_cost(net, side, side).macs)
ratio = unet_cost(*trunks["pixels"], 28).macs / unet_cost(*trunks["latents"], 8).macs
print(f"places: {32 * 32 // (8 * 8)} times fewer; cost of one evaluation: {ratio:.0f} times lower")

# %% tags=["nbval-ignore-output", "skip-grading"]
seconds = {}
with torch.inference_mode():
    for name, (net, side) in trunks.items():
        x, t = torch.randn(20, net.channels, side, side), torch.full((20,), 0.5)
        net(x, t)
        runs = []
        for _ in range(2 if SMOKE else 5):
            start = time.perf_counter()
            net(x, t)
            runs.append(time.perf_counter() - start)
        seconds[name] = min(runs)
        print(f"{name:20} {1000 * min(runs) / 20:6.2f} ms per picture and evaluation, measured")

# %% [markdown]
# The cost of convolutions goes with the number of places, so 16 times fewer places cost about 16 times less; measured times follow, less well. But look at the middle row: **folding alone saves as much.** What, then, does the autoencoder buy?
#
# - *Fewer numbers.* Folded pixels are 16 channels at each place, latents 2: the last layer makes all 16 at once from 32 features. Folding further (the patches of lesson 08) asks for a wider trunk.
# - *Other numbers.* Squared error in pixels spends the network's effort on all frequencies alike. In the latent, much of what the eye ignores is gone already, and a decoder trained for it draws the lines.
#
# Does either matter for MNIST? Here is the folded network, sampled by *your* sampler, with nothing to decode. (Not at equal training: the cell prints the steps of each. `benchmarks/latents.md` compares at equal time.)

# %% tags=["nbval-ignore-output", "skip-grading"]
folded = TableNetwork(load("mnist-unet"), abar)
print("trained: folded", folded.model.card["steps"], "steps, latents", mnist.model.card["steps"])
made = ldm_sample(folded, folded.decode, 1.0, asked[::2], 2.0, 10 if SMOKE else 25, (1, 28, 28), abar, rng(6))
print(f"folded pixels, s = 2: read as asked {class_accuracy(mnist_judge, made, asked[::2])}")
print(f"latents,       s = 2: read as asked {class_accuracy(mnist_judge, pictures[2.0], asked)}")
fig, axes = plt.subplots(2, 1, figsize=(8, 2.2), layout="constrained")
show_tile(axes[0], made.unflatten(0, (10, -1))[:, 0], 10, "folded pixels")
show_tile(axes[1], pictures[2.0].unflatten(0, (10, -1))[:, 0], 10, "latents")
plt.show()

# %% [markdown]
# *Judge by eye, too: look for specks in the background of the one, and for soft or broken strokes in the other.* At this size a lossless fold is the simpler choice and a fair rival. The case for latents is made by large photographs, where 8x8 pixels have 192 numbers and SD 1 keeps 4.
#
# ## 9. What it loses
#
# The KL, averaged over pictures, has a meaning of its own: it is the **rate**, the bits it takes to tell someone who knows the prior which $z$ to decode. The squared error is the **distortion**. Each $\beta$ makes one point. (A rate near 0 is no good compression but a collapse: look at the distortion beside it.)

# %% exercise="09.7"

# %% [markdown]
# For a Gaussian of the same variances $\lambda_i$ along the principal directions, (4) holds for each $i$: direction $i$ keeps an error of $\min(\lambda_i,\tfrac\beta2)$ at $\max(0,\tfrac12\log_2\tfrac{2\lambda_i}\beta)$ bits. This is the rate-distortion function of a Gaussian, "reverse water-filling" (Shannon): on such data no code does better. Digits are not Gaussian.
#
# **Predict:** is the trained autoencoder above that curve (worse) or below it (better)? And a label holds 3.3 bits: how many bits does a latent carry, in the cheapest of the five autoencoders whose reconstructions are read right in 19 of 20 cases? (Within 20 bits counts.)

# %%
guess_curve, guess_read = ..., ...  # "above" or "below"; bits

# %% tags=["nbval-ignore-output", "skip-grading"]
betas = torch.logspace(-3.5, math.log10(2 * float(lam[0])), 60, dtype=torch.float64)[:, None]
water_rate = (0.5 * (2 * lam / betas).log2()).clamp(min=0).nan_to_num().sum(1)
water_error = torch.minimum(lam, betas / 2).sum(1) / 64

points = {}
print("beta    bits   error   read right")
for beta, net in ladder.items():
    trip = there_and_back(net, unseen)
    right = class_accuracy(judge, trip[1].clamp(-1, 1), unseen_labels).value
    points[beta] = (*rate_distortion(*trip), right)
    print(f"{beta:<6g} {points[beta][0]:6.1f} {points[beta][1]:7.4f} {points[beta][2]:8.2f}")

# %% tags=["nbval-ignore-output", "skip-grading"]
bits, errors, read = zip(*points.values(), strict=True)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
axes[0].plot(water_rate, water_error, color=COLOURS["data"], label="Gaussian with the digits' variances, formula")
axes[0].plot(bits, errors, "o", color=COLOURS["guided"], label="autoencoder, held-out digits")
axes[0].set(xlabel="bits per picture", ylabel="squared error per pixel", yscale="log")
axes[0].legend(fontsize=8)
axes[1].plot(bits, read, "o-", color=COLOURS["guided"])
axes[1].axvline(math.log2(10), color=COLOURS["data"], ls=":")
axes[1].set(xlabel="bits per picture (dotted: a label's)", ylabel="reconstructions read right")
axes[1].set(xscale="symlog", xlim=(-0.3, 400))
plt.show()
line = torch.tensor([float(water_error[(water_rate - b).abs().argmin()]) for b in bits])
inside = [k for k, b in enumerate(bits) if 1 < b < float(water_rate.max())]
reveal(guess_curve, "below" if all(errors[k] < line[k] for k in inside) else "above")
enough = [b for b, share in zip(bits, read, strict=True) if share > 0.95]
reveal(guess_read, round(min(enough)) if enough else "more than these have", " bits", close=20)

# %% [markdown]
# *Left: rate against error. Right: what is in the bits. The first few dozen say which digit it is; the hundred and more after them make the error smaller, and the judge reads the digits hardly any better for it.* Semantic bits come first, and are few; perceptual bits are many. (Digits are not Gaussian, so a perfect code would be below the line. This one is small and briefly trained, has 32 latents for 64 pixels, and its bits are counted against $\mathcal N(0,I)$, which its latents do not follow.)
#
# **And in which frequencies is the error?** Compare the spectrum of the error with that of the pictures, ring by ring. **Predict:** what does the autoencoder lose?

# %%
guess_lost = ...  # "low" or "high" frequencies


# %%
def ring_power(pictures):
    """Mean power of pictures (n, 1, h, h) at the frequencies 1 .. h // 2; the corners count to the last."""
    h = pictures.shape[-1]
    power = torch.fft.fft2(pictures[:, 0] - pictures.mean()).abs().square().mean(0)
    k = torch.fft.fftfreq(h, 1 / h)
    radius = (k[:, None] ** 2 + k**2).sqrt().round().long().clamp(max=h // 2)
    sums = torch.zeros(h // 2 + 1).index_add(0, radius.flatten(), power.flatten())
    return sums[1:] / torch.bincount(radius.flatten())[1:]


# %% tags=["nbval-ignore-output", "skip-grading"]
originals, source = unseen, "8x8 digits"
if not SMOKE:
    try:
        originals, source = data.mnist("test")[0][:1000], "MNIST"
    except data.DataError as problem:
        print(f"No MNIST here, and that is fine: {problem}")
if source == "MNIST":
    back = mnist.decode(mnist.encode(originals))
else:
    back = autoencoder.decoder(autoencoder.posterior(originals)[0])
lost = ring_power(back - originals) / ring_power(originals)
fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", width_ratios=[2, 1])
rings = range(1, len(lost) + 1)
axes[0].semilogy(rings, ring_power(originals), "o-", color=COLOURS["data"], label=f"originals ({source})")
axes[0].semilogy(rings, ring_power(back - originals), "o-", color=COLOURS["guided"], label="error of reconstructions")
axes[0].set(xlabel="frequency (waves per picture)", ylabel="power")
axes[0].legend(fontsize=8)
show_tile(axes[1], torch.cat([originals[:3], back[:3], (back - originals)[:3]]), 3, "original, back, difference")
plt.show()
print(f"share of the power lost: lowest ring {float(lost[0]):.1%}, highest {float(lost[-1]):.1%}")
reveal(guess_lost, "high" if lost[-1] > lost[0] else "low")

# %% [markdown]
# *The power of the error varies much less with frequency than that of the pictures, which sit at the low ones: of these next to nothing is lost, of the highest a good part.* So it is high-**frequency** detail that goes, and the high-**level** content that stays. What is lost at stage 1 no diffusion brings back: the decoder is the ceiling, for small print and small faces, say.
#
# ## 10. Where everything else plugs in
#
# The other lessons need no change: a latent is a small picture with more channels. The label modulates blocks, words enter by cross-attention, **ControlNet** copies the encoder of the *latent* U-Net (and shrinks its hint to the size of the latent by a few convolutions of its own), DiT cuts latents into patches. **Guidance** combines $\epsilon_u$ and $\epsilon_c$ of latents. What does not carry over is what knows the meaning of numbers: clipping, thresholds, a classifier of pixels (it would need the decoder in between, and its gradient).
#
# **Three systems, set right.**
#
# | | Stable Diffusion 1 | Stable Diffusion 3 | Imagen |
# |---|---|---|---|
# | diffuses | latents 64x64x4, $c=0.18215$ | latents 128x128x16, a shift and a scale | pixels, 64 then 256 then 1024 |
# | text | 77 x 768: one vector per token, from CLIP | CLIP twice and T5: 154 tokens | T5 |
# | enters by | cross-attention | *joint* attention, one sequence of text and image | cross-attention |
#
# Some slides give the text condition of SD 1 as "one vector of 768"; that is CLIP's pooled vector, which SD 1 does not use. And "SD 3 conditions by cross-attention" names what SD 3 did away with (lesson 06): text tokens (CLIP's, too) and image tokens attend to one another in *one* self-attention, with separate weights for each kind; pooled CLIP vectors (768 + 1280 numbers) join the time embedding. **Predict:** at 1024x1024, where a patch of 2x2 places of the latent makes a token, how many entries has one head's matrix, in millions?

# %%
guess_joint = ...

# %% tags=["nbval-check-output"]
image_tokens, text_tokens = (128 // 2) ** 2, 77 + 77  # 2x2 patches of a 128x128 latent
print("self-attention of the image alone:", f"{image_tokens**2:,}")
print("cross-attention to the text, beside it:", f"{image_tokens * text_tokens:,}")
print("joint attention, in place of both:", f"{(image_tokens + text_tokens) ** 2:,}")
print("text of SD 1:", f"77 x 768 = {77 * 768:,} numbers, not 768")

# %%
reveal(guess_joint, round((image_tokens + text_tokens) ** 2 / 1e6), " million", close=2)

# %% [markdown]
# ## 11. Write the test
#
# A KL that lacks its half or a sign, averages, takes the log-variance for the log of the standard deviation, or is the other way round still runs, and mostly trains: with another $\beta$, or to another optimum. Write the test that tells.

# %% exercise="09.8"

# %% [markdown]
# ## 12. What it costs, what to keep
#
# **Cost.** Stage 1 once, for all models. Then one encoding per picture (which can be stored), network evaluations that are cheaper by the number of places, and one decoding per sample.
#
# **Keep.**
# - The ELBO lies below $\log p(x)$ by the KL from $q$ to the true posterior.
# - Sum both terms, or know by what you divided: a mean over pixels multiplies your KL weight by their number.
# - Posterior collapse is the KL's doing, helped by a decoder that can do without $z$. A prior that does not fit is another fault, and diffusion is the cure for that one.
# - Scale latents to unit variance with one stored number, divide by it before decoding, and clip nothing.
# - What is lost is high-frequency; what stays is high-level. The first few dozen bits carry the meaning.
# - The saving is in the number of places. Folding pixels saves as much; the autoencoder saves *numbers*, and chooses which.
#
# ## Questions
#
# 1. Your VAE reconstructs perfectly and draws nonsense from $\mathcal N(0,I)$. Is its posterior collapsed?
# ### BEGIN SOLUTION
# *On the contrary: a collapsed one reconstructs nothing. The aggregate posterior does not match the prior. Raise $\beta$, or learn the distribution of the latents: latent diffusion.*
# ### END SOLUTION
# 2. Someone loads the autoencoder of SDXL ($c=0.13025$) with the factor of SD 1 (0.18215) at decoding. What do the pictures look like?
# ### BEGIN SOLUTION
# *Latents come out at $0.13025/0.18215=0.72$ of their size: weak features, washed-out pictures. This happened to users of diffusers 0.26 (issue 6923).*
# ### END SOLUTION
# 3. Why one factor for all channels, and not one for each?
# ### BEGIN SOLUTION
# *Either works, if stored. One number keeps the proportions of channels: a weak one stays weak, and drowns in noise earlier. The schedule only needs the overall level.*
# ### END SOLUTION
# 4. Could the KL be left out altogether ($\beta=0$)?
# ### BEGIN SOLUTION
# *Then $q$ may shrink to a point, latents may be of any size, and nothing asks that near latents decode to near pictures, though a diffusion model always errs a little. Some noise in $z$ makes the decoder smooth. Quantising latents (VQ) is the other usual way.*
# ### END SOLUTION
# 5. The loss of your latent model is 0.05, that of a colleague 0.3. Whose is better?
# ### BEGIN SOLUTION
# *Nobody can say: floors depend on the scale of the latents (section 6) and on the autoencoder. Compare decoded samples.*
# ### END SOLUTION
# 6. You want classifier guidance with an existing classifier of *pixels* in a latent model. What has to happen at each step?
# ### BEGIN SOLUTION
# *Estimate $\hat z_0$, divide by $c$, decode, classify, and differentiate through all of it; and the classifier sees blurred estimates that it was not trained on (lesson 03). A classifier of noisy latents is cheaper and right.*
# ### END SOLUTION
#
# **Sources.** Kingma & Welling 2014 (arXiv 1312.6114); Higgins et al. 2017 ($\beta$-VAE); Bowman et al. 2016 (1511.06349, collapse); Lucas et al. 2019 (1911.02469, linear VAEs); Rombach et al. 2022 (2112.10752, scale in appendix G); Saharia et al. 2022 (Imagen, 2205.11487); Singer et al. 2022 (Make-A-Video, 2209.14792); Esser et al. 2024 (Stable Diffusion 3, 2403.03206); Radford et al. 2021 (CLIP); github.com/keras-team/keras issue 3373 and pull request 3383; github.com/huggingface/diffusers issue 6923. All other numbers are measured in the cells above.
