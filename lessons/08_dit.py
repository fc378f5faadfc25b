# %% [markdown]
# # 08 · Diffusion transformers
#
# **Question.** Stable Diffusion 3, FLUX and most recent video models have no U-Net: they cut the picture into patches and hand these to a transformer. How does such a network know where a patch lies, what time it is and what it was asked for? And why does a fresh one do *nothing at all*, on purpose?
#
# **You need** lessons 02 (time, labels, label dropout), 04 (guidance), 05 (flow matching) and 06 (attention). No GPU: the digits here are 8x8; larger networks are shipped.
#
# **You build** a diffusion transformer, DiT (Peebles & Xie 2023), part by part: tokens, positions, the block with its gates, the zeros it starts from, its bill, its label table, its guidance. You say which weights learn first, and measure it.
#
# | letter | meaning |
# |---|---|
# | $p$, $m$, $d$ | side of a patch in pixels, number of tokens, width of a token |
# | $h$ | the tokens on their way, $(B,m,d)$ |
# | $c$ | embedding of time plus embedding of the label, $(B,d)$ |
# | $\gamma,\ \delta,\ g$ | what $c$ decides in each block: scale, shift, **gate**. The code's `scale` is $\gamma-1$ |

# %% tags=["setup"]

# %%
from collections import defaultdict
from copy import deepcopy
from functools import partial

from condiff_ref import data
from condiff_ref.layers import Attention, time_embedding
from condiff_ref.metrics import energy_distance
from condiff_ref.mixture import archipelago
from condiff_ref.schedules import flow, time_grid
from condiff_ref.viz import COLOURS, show_tile
from condiff_ref.widgets import slider
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode


def rng(seed=0):
    return Generator().manual_seed(seed)


# %% [markdown]
# ## 1. A picture as a sequence
#
# A transformer takes a set of vectors. So cut the picture into squares of $p\times p$ pixels and write each as one long vector, a **token** (Dosovitskiy et al. 2021, for classification). One linear map, the *stem*, brings all tokens to the width $d$; after the last block another, the *head*, brings them back to $p^2C$ numbers each, which are put together as a picture. Patchify loses nothing: it only sorts.

# %% exercise="08.1"

# %%
images, labels = data.digits("train")
held_out, held_out_labels = data.digits("test")
centre, spread = images.mean(), images.std()
x0, x0_held_out = (images - centre) / spread, (held_out - centre) / spread


def draw_patches(p):
    p = int(p)
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 2.4])
    show_tile(left, images[:1], 1, f"p = {p}: {(8 // p) ** 2} tokens")
    for edge in range(0, 9, p):
        left.axhline(edge - 0.5, color=COLOURS["guided"])
        left.axvline(edge - 0.5, color=COLOURS["guided"])
    right.imshow(-patchify(images[:1], p)[0], cmap="gray", vmin=-1, vmax=1, aspect="auto")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="number within the token", ylabel="token", title="what the transformer gets")
    return figure


slider(
    draw_patches,
    [1, 2, 4, 8],
    "p",
    lambda p: f"A digit cut into patches of side {int(p)}, and the matrix of its tokens, row by row.",
    start=1,
)

# %% [markdown]
# *The same 64 numbers in another order; with $p=8$ the whole digit is one token.* That two tokens touch in the picture cannot be seen from the matrix.
#
# **What patches cost.** Count the multiply-adds (MACs) of one block with $m$ tokens, without the condition (section 5): queries, keys, values and output $4md^2$, the MLP ($d\to4d\to d$) $8md^2$, the two products of attention, $QK^\top$ and weights times $V$, $2m^2d$, together
#
# $$12\,m\,d^2+2\,m^2d,\qquad m=\frac{HW}{p^2}.\tag{1}$$
#
# **Predict before you run.** DiT-XL (28 blocks, $d=1152$, 675 million parameters) works on latents of $32\times32$ with $C=4$ channels (lesson 09). With patches of side 2 instead of 4, by which factor does its bill grow, and by which its number of parameters?

# %%
guess_bill, guess_parameters = ..., ...  # factors

# %%
d, depth, C = 1152, 28, 4
print(" p   tokens   G MACs of 28 blocks   share of attention's products   weights of stem and head")
bill, ends = {}, {}
for p in (2, 4, 8):
    m = (32 // p) ** 2
    bill[p], ends[p] = depth * (12 * m * d**2 + 2 * m**2 * d), 3 * p**2 * C * d
    print(f"{p:2} {m:8} {bill[p] / 1e9:15.1f} {2 * m * m * d * depth / bill[p]:24.1%} {ends[p]:32,}")
reveal(guess_bill, round(bill[2] / bill[4], 2), close=0.2)
reveal(guess_parameters, round((675e6 + ends[2] - ends[4]) / 675e6, 3), close=0.02)

# %% [markdown]
# Four times the tokens, four times the bill: at this size attention's square hardly counts (its share is $m/(6d+m)$). And the *same* parameters, up to stem and head. So the patch is a knob that parameter counts do not show; Peebles & Xie find that quality follows the *computation*, not the number of parameters.
#
# ## 2. Where is a token?
#
# **Predict:** shuffle the 16 tokens of a digit, let an attention layer look at them, and undo the shuffle. How far (largest difference) is the result from that without shuffling?

# %%
guess_shuffled = ...

# %% tags=["shown"]
torch.manual_seed(0)
stem, attention = nn.Linear(4, 32).double(), Attention(32, 4).double()
order = torch.randperm(16, generator=rng(3))
tokens = stem(patchify(images[:1].double(), 2)).detach()


def shuffled_and_back(layer, h):
    return layer(h[:, order])[:, order.argsort()]


with torch.no_grad():
    gap = float((shuffled_and_back(attention, tokens) - attention(tokens)).abs().max())
reveal(guess_shuffled, round(gap, 6), close=1e-6)

# %% [markdown]
# Not at all, up to rounding. Nowhere does attention use the *order* of its inputs. Let $P$ be a matrix that permutes tokens. Queries, keys and values become $PQ,PK,PV$. Softmax works on each row by itself, and exchanging entries of a row exchanges them in its result, so (with the scale of the products taken into $Q$)
#
# $$\mathrm{softmax}\big(PQK^\top P^\top\big)\,PV=P\,\mathrm{softmax}(QK^\top)\,P^\top P\,V=P\,\mathrm{Attention}(h).$$
#
# Norms and MLPs act on each token alone. So the whole transformer is **permutation equivariant**: shuffle the tokens, and the same output comes out, shuffled.
#
# So a vector for the *place* is added to each token. DiT's are fixed: sines and cosines of the column, then of the row, as lesson 02 did with time.

# %% exercise="08.2"

# %%
place = pos_embed_2d(8, 8, 64)
fig, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
show_tile(axes[0], images[:1], 1, "a digit")
show_tile(axes[1], unpatchify(patchify(images[:1], 2)[:, order], 2, 8, 8), 1, "its tokens, shuffled")
for ax, (row, column) in zip(axes[2:], ((2, 5), (7, 0)), strict=True):
    similarity = F.cosine_similarity(place, place[8 * row + column, None], dim=1).reshape(8, 8)
    picture = ax.imshow(similarity, vmin=0.6, vmax=1)
    ax.set_title(f"similar to row {row}, column {column}", fontsize=10)
fig.colorbar(picture, ax=axes[3], label="cosine")
plt.show()

# %% [markdown]
# *Left: to a transformer without positions, these two are one and the same set. Right: the vector of a place is most like itself, then like its neighbours'; along its row and column the likeness falls most slowly.*

# %% tags=["nbval-check-output"]
here = pos_embed_2d(4, 4, 32).double()
with torch.no_grad():
    with_places = attention(tokens + here)
    moved = (attention(tokens[:, order] + here)[:, order.argsort()] - with_places).abs().max()
print("without positions the output only shuffles along:", gap < 1e-12)
print("with positions a shuffled picture is another picture:", float(moved) > 0.01)

# %% [markdown]
# ## 3. The condition sets the norm
#
# **Layer norm** takes each token by itself, subtracts the mean of its $d$ numbers and divides by their standard deviation; then a learned scale and shift, the same for all inputs. **Adaptive** layer norm lets the condition decide these two (lesson 02's FiLM, Perez et al. 2018, in a transformer):
#
# $$\mathrm{AdaLN}(h,c)=\gamma(c)\odot\frac{h-\mu(h)}{\sigma(h)}+\delta(c),\qquad(\gamma-1,\ \delta)=W\,\mathrm{SiLU}(c)+b .\tag{2}$$
#
# (In code, $\sqrt{\sigma^2+10^{-6}}$ stands below. Some slides call the map from $c$ linear: it is, but for the SiLU before it.)
#
# **adaLN-Zero** starts with $W=0,\ b=0$. Some slides say that this makes the norm an "identity normalisation", $\gamma=1,\ \delta=0$, as if a block with such norms were the identity.
#
# **Predict:** what is AdaLN of $h=(1,2,3,4)$ with $\gamma=1$ and $\delta=0$: is it $h$?

# %%
guess_identity = ...  # "yes" or "no"

# %% tags=["nbval-check-output"]
h = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
normed = F.layer_norm(h, (4,), eps=0.0)
print("AdaLN(h) with gamma = 1, delta = 0:", [round(v, 6) for v in normed.tolist()])
print("by hand, (h - 2.5) / sqrt(1.25):   ", [round((v - 2.5) / 1.25**0.5, 6) for v in h.tolist()])
print("largest change:", round(float((normed - h).abs().max()), 6))

# %%
reveal(guess_identity, "no")

# %% [markdown]
# A norm is not the identity, whatever its scale. What makes the block silent is a third vector, the **gate** $g(c)$, which multiplies what a branch says before it is added:
#
# $$h\leftarrow h+g_1\odot\mathrm{Attention}(\mathrm{AdaLN}_1(h,c)),\qquad h\leftarrow h+g_2\odot\mathrm{MLP}(\mathrm{AdaLN}_2(h,c)).\tag{3}$$
#
# Six vectors from one linear map of $\mathrm{SiLU}(c)$, of which all start at 0.
#
# **The block is the identity exactly when the gates are 0** (for all weights of the branches). *If:* with $g_1=g_2=0$ both lines of (3) read $h\leftarrow h$, whatever scales and shifts are. *Only if:* suppose it is the identity for all weights. Choose weight and bias of the MLP's last layer as 0, and those of attention's as 0 and 1: attention says 1 everywhere, the block returns $h+g_1$, so $g_1=0$. Exchange the roles of the two: $g_2=0$. $\square$

# %% exercise="08.3"

# %% tags=["nbval-check-output"]
torch.manual_seed(0)
block = DiTBlock(32, 4).double()
h, c = torch.randn(2, 16, 32, generator=rng(1)).double(), torch.randn(2, 32, generator=rng(2)).double()
print("a fresh block returns h, to the last bit:", torch.equal(block(h, c), h))


def with_rows(block, shift=0.0, scale=0.0, gate=0.0):
    """The block with these shifts, scales and gates, whatever the condition."""
    block = deepcopy(block)
    values = torch.tensor([shift, scale, gate] * 2, dtype=torch.float64)
    block.modulation.bias.data = values.repeat_interleave(32)
    return block


print("scale and shift not 0, gates 0: still h:", torch.equal(with_rows(block, 0.7, -0.4)(h, c), h))
change = (with_rows(block, gate=1)(h, c) - h).abs().max()
print("scale and shift 0, gates 1: changed by over 0.1:", bool(change > 0.1))

# %% [markdown]
# (The last line is a plain pre-norm transformer block, as in GPT-2 but for the norms' own weights: no gates, no identity.) A block that starts silent is an old trick: Goyal et al. 2017 start the last batch-norm scale of each residual branch at 0, U-Nets of diffusion the last convolution, ControlNet its zero convolutions (lesson 07). However deep the stack, at the start it passes signals and gradients on unchanged.
#
# ## 4. Who learns first?
#
# Put the parts together. This is all of DiT but label dropout (section 6) and two things: the published one has biases on queries, keys and values, and it predicts a variance beside the noise, so its head is twice as wide.


# %% tags=["shown"]
class LabelTable(nn.Module):
    """A row per class, and one for no label. Section 6 builds a better one."""

    def __init__(self, classes, dim):
        super().__init__()
        self.null, self.table = classes, nn.Embedding(1 + classes, dim)

    def forward(self, label):
        return self.table(label)


class SmallDiT(nn.Module):
    """(x_t (B, C, size, size), t (B,) in [0, 1], label (B,)) -> a picture like x_t."""

    def __init__(self, channels, size, patch, dim, depth, heads, classes):
        super().__init__()
        self.size, self.patch, self.null = size, patch, classes
        self.stem = nn.Linear(patch**2 * channels, dim)
        self.register_buffer("positions", pos_embed_2d(size // patch, size // patch, dim))  # fixed: not trained
        self.time_mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label_embedding = LabelTable(classes, dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads) for _ in range(depth))
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch**2 * channels)

    def forward(self, xt, t, label):
        c = self.time_mlp(time_embedding(t, 256)) + self.label_embedding(label)
        h = self.stem(patchify(xt, self.patch)) + self.positions
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        h = F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return unpatchify(self.head(h), self.patch, self.size, self.size)


# %% [markdown]
# **What starts at zero.** The modulation of each block, the final modulation, *and* the head. So the fresh network answers 0 to everything.
#
# A zero stops gradients: with $y=Wh$ and $r=\partial\mathcal L/\partial y$ (what comes back), the gradient of $W$ is $r\,h^\top$, that of $h$ is $W^\top r$: a zero $W$ learns as long as $r$ and $h$ are not 0, and lets nothing through to what lies before it. And for a gate, with $y=g\odot a$, where $a$ is what the branch says: the gate gets $r\odot a\ne0$, the branch gets $r\odot g=0$. So the network wakes up in an order, which can be derived.
#
# **This exercise is the prediction.** Write the start, and say for each part in which backward pass (0, 1, 2, ...) it first gets a gradient. Pencil first: what does $r$ have to pass through?

# %% exercise="08.4"

# %%
torch.manual_seed(0)
fresh = SmallDiT(1, 8, 2, 32, 2, 4, 10)
init_dit(fresh)
fresh = fresh.double()
n = 64
batch, asked = x0[:n].double(), labels[:n]
batch_t, noise = torch.rand(n, generator=rng(5)).double(), torch.randn(n, 1, 8, 8, generator=rng(6)).double()
noisy = (1 - batch_t[:, None, None, None]) * batch + batch_t[:, None, None, None] * noise


def gradients(net):
    """The largest absolute gradient in each part."""
    rows = [[p.grad.chunk(6) for p in block.modulation.parameters()] for block in net.blocks]
    parts = {
        "head": [p.grad for p in net.head.parameters()],
        "final modulation": [p.grad for p in net.modulation.parameters()],
        "stem": [p.grad for p in net.stem.parameters()],
        "gates": [six[i] for both in rows for six in both for i in (2, 5)],
        "shifts and scales": [six[i] for both in rows for six in both for i in (0, 1, 3, 4)],
        "attention and MLP": [p.grad for b in net.blocks for part in (b.attention, b.mlp) for p in part.parameters()],
        "time and label embeddings": [
            p.grad for part in (net.time_mlp, net.label_embedding) for p in part.parameters()
        ],
    }
    return {name: max(float(g.abs().max()) for g in found) for name, found in parts.items()}


# %%
@torch.no_grad()
def depends_on(net):
    """By how much the output changes: own patch, another patch, time, label."""
    out = net(noisy, batch_t, asked)
    other = noisy.clone()
    other[:, :, :2, :2] += 1  # the first patch
    change = (net(other, batch_t, asked) - out).abs()
    elsewhere = change.clone()
    elsewhere[:, :, :2, :2] = 0
    return {
        "its own patch": float(change[:, :, :2, :2].max()),
        "other patches": float(elsewhere.max()),
        "the time": float((net(noisy, 1 - batch_t, asked) - out).abs().max()),
        "the label": float((net(noisy, batch_t, (asked + 1) % 10) - out).abs().max()),
    }


def wake(net, optimizer, steps=5):
    """Train on one batch; for each step, what the output depends on and who gets a gradient."""
    seen, got = [], []
    for _ in range(steps):
        seen.append(depends_on(net))
        optimizer.zero_grad()
        F.mse_loss(net(noisy, batch_t, asked), noise - batch).backward()
        got.append(gradients(net))
        optimizer.step()
    return seen, got


net = deepcopy(fresh)
seen, got = wake(net, torch.optim.SGD(net.parameters(), 0.1))

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", width_ratios=[1.15, 1])
for ax, table, title in (
    (axes[0], got, "largest gradient at backward 0, 1, 2, ..."),
    (axes[1], seen, "the output of forward 0, 1, 2, ... changes with"),
):
    values = torch.tensor([list(row.values()) for row in table]).T
    picture = ax.imshow(values.log10().clamp(min=-9), cmap="viridis", vmin=-9, vmax=0, aspect="auto")
    for i, j in (values == 0).nonzero().tolist():
        ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, color="white"))
        ax.text(j, i, "0", ha="center", va="center")
    for i, j in (values != 0).nonzero().tolist():
        ax.text(j, i, f"{values[i, j]:.0e}", ha="center", va="center", fontsize=8, color="wk"[int(values[i, j] > 1e-3)])
    ax.set_yticks(range(len(table[0])), list(table[0]))
    ax.set_xticks(range(len(table)))
    ax.set_title(title, fontsize=10)
fig.colorbar(picture, ax=axes, label="log10")
plt.show()

# %% tags=["nbval-check-output"]
predicted = wakeup_order()
for name in got[0]:
    first = next(i for i, row in enumerate(got) if row[name] > 0)
    print(f"{name:26} first gradient at backward {first}, predicted {predicted[name]}")
for name in seen[0]:
    print(f"the output first depends on {name:13} at forward", next(i for i, row in enumerate(seen) if row[name] > 0))

# %% [markdown]
# *A staircase. White cells are exact zeros; $10^{-6}$ is small, but learns.* Forward 0 gives 0 everywhere. After backward 0 the head is awake, so forward 1 answers something: but the blocks are still the identity and the final norm is still a plain one, so each patch is answered from itself and its place alone. Nobody has read the clock, the label or a neighbour. In backward 1 $r$ passes the head and reaches the final modulation, the stem and the gates; not the rest, which acts through gates or modulations that are still 0. **The label is heard for the first time in the third forward pass**, as ControlNet's hint was in lesson 07.
#
# Three steps are nothing in a long run (with Adam it is the same three). But they matter for *checks*. Four wrong ways to ask a network: ignore the label, reverse the time, transpose the picture, mix up the batch. **Predict:** how many of the four change the output of the fresh network?

# %%
guess_changes = ...

# %%
wrong = {
    "label ignored": lambda net, x, t, y: net(x, t, 0 * y),
    "time reversed": lambda net, x, t, y: net(x, 1 - t, y),
    "picture transposed": lambda net, x, t, y: net(x.mT, t, y),
    "batch mixed up": lambda net, x, t, y: net(x.flip(0), t, y),
}


def awake(net):
    """A copy in which every zero has become a random number."""
    net = deepcopy(net)
    torch.manual_seed(1)
    for parameter in net.parameters():
        if (parameter == 0).all():
            nn.init.normal_(parameter, std=0.2)
    return net


@torch.no_grad()
def noticed(net):
    right = net(noisy, batch_t, asked)
    return [name for name, ask in wrong.items() if not torch.allclose(ask(net, noisy, batch_t, asked), right)]


reveal(guess_changes, len(noticed(fresh)))

# %% tags=["nbval-check-output"]
print("noticed with a fresh network:", noticed(fresh))
print("noticed once its zeros are random:", noticed(awake(fresh)))

# %% [markdown]
# **A fresh network hides mistakes.** Inside a block it is the same: shift and scale exchanged, the SiLU forgotten, the MLP fed with the wrong tokens, all that is multiplied by a gate of 0. So a check of a zero-initialised network first **randomises the zeros**. The checks of this lesson do, and yours in section 9 should.
#
# ### The gates open
#
# Now train it with the package's loop: flow matching, label dropout 0.1. A hook notes how large each block's two gates are, over the batch.

# %% tags=["nbval-ignore-output", "skip-grading"]
from condiff_ref.train import diffusion_loss, drop, fit

path = flow()
torch.manual_seed(0)
net = SmallDiT(1, 8, 2, 48, 3, 4, 10)
init_dit(net)
gates = defaultdict(list)


def note(name, module, inputs, out):
    if module.training:
        for branch, g in (("attention", out.chunk(6, dim=-1)[2]), ("MLP", out.chunk(6, dim=-1)[5])):
            gates[f"block {name}, {branch}"].append(float(g.detach().square().mean().sqrt()))


hooks = [block.modulation.register_forward_hook(partial(note, i)) for i, block in enumerate(net.blocks)]


def flow_loss(network, x, y, gen):
    return diffusion_loss(network, x, "flow", path, gen, label=drop(y, network.null, 0.1, gen))


trained = fit(net, flow_loss, x0, labels, steps=60 if SMOKE else 600, lr=5e-3, ema=0.99, progress=False)
for hook in hooks:
    hook.remove()
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for i, (name, values) in enumerate(gates.items()):
    ax.plot(values, label=name, color=f"C{i // 2}", ls=("-", "--")[i % 2])
ax.set(xlabel="training step", ylabel="root mean square of the gate", title="all gates start at 0")
ax.legend(fontsize=7)
plt.show()
print(f"loss of the last steps {sum(trained.losses[-20:]) / 20:.2f}; an answer of 0 has {1 + float(x0.var()):.2f}")

# %% [markdown]
# *All six leave zero together in the first twenty steps or so, then each goes its own way: at first those of the MLPs are the larger ones, later attention gains.* Nobody told a gate how far to open.
#
# ## 5. The bill
#
# **Predict:** the six vectors of each block come from one map $d\to6d$, applied *once per picture*. What share of DiT-XL's parameters is in these maps, and what share of its MACs (in percent)?

# %%
guess_share, guess_mac_share = ..., ...

# %% exercise="08.5"

# %%
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # width, depth, heads
m, counted, macs = 256, {}, {}
print("DiT-./2     parameters, by formula   by torch      G MACs   as printed (Gflops)")
for (name, (d, depth, heads)), printed in zip(SIZES.items(), (6.06, 23.01, 80.71, 118.64), strict=True):
    with torch.device("meta"):  # shapes without memory
        big = SmallDiT(4, 32, 2, d, depth, heads, 1000)
        with FlopCounterMode(display=False) as counter:
            big(torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    weights = sum(p.numel() for p in big.parameters())
    counted[name] = weights + depth * 3 * d + (d + 1) * 2**2 * 4  # biases of q, k, v; a head of 8 channels, not 4
    macs[name] = counter.get_total_flops() / 2 + m * d * 2**2 * 4
    formula = count_params(d, depth, 2, 4, 1000)
    print(f"{name:>7} {formula:20,} {counted[name]:16,} {macs[name] / 1e9:11.3f} {printed:12.2f}")
maps = depth * 6 * (d + 1) * d
reveal(guess_share, round(100 * maps / counted["XL"]), " %", close=5)
reveal(guess_mac_share, round(100 * depth * 6 * d**2 / macs["XL"], 1), " %", close=1)

# %% tags=["nbval-check-output"]
print("formula = torch, for all sizes:", all(count_params(*SIZES[k][:2], 2, 4, 1000) == counted[k] for k in SIZES))
print("millions of parameters:", [round(count / 1e6) for count in counted.values()])
print("G MACs:", [round(count / 1e9, 2) for count in macs.values()])
rest = {k: m * d * (2 * depth + 1) for k, (d, depth, _) in SIZES.items()}
print("and one more per normalised number:", [round((macs[k] + rest[k]) / 1e9, 2) for k in SIZES])

# %% [markdown]
# What the paper's tables call *Gflops* are billions of multiply-**adds**; in FLOPs, as torch or a GPU's data sheet counts, DiT-XL/2 needs 237 G for one evaluation of one picture (twice that with guidance). The last 0.02 G: count one more for each number that a norm treats, and all four printed values come out (our inference; the paper does not say).
#
# A block has $4d^2+8d^2+6d^2=18d^2$ weights: **a third of DiT's parameters serve the condition**, at 0.2 % of the computation. (Later networks save there: PixArt-$\alpha$ computes one set of six vectors for all blocks, from the time, and adds a learned offset per block.)
#
# ## 6. Label dropout inside
#
# DiT's label table drops labels by itself, in training mode. That hides a switch in `model.train()`: who samples without `model.eval()` loses each label with probability 0.1, at each step anew.

# %% exercise="08.6"

# %% [markdown]
# **A trap.** In the published code the table has $n+1$ rows if $p>0$ and $n$ rows if $p=0$. Guidance of a network trained without dropout then asks for a row that does not exist.

# %% tags=["nbval-check-output"]
as_published = nn.Embedding(10 + (0.0 > 0), 8)  # ten classes, p = 0
try:
    as_published(torch.tensor([10]))
except IndexError as problem:
    print("the published table, p = 0:", problem)
yours = LabelEmbedder(10, 8, p=0.0)
print("yours answers:", tuple(yours(torch.tensor([10])).shape), "and drops none:", end=" ")
some = torch.arange(10)
print(torch.equal(yours.train()(some, rng()), yours.table(some)))

# %% [markdown]
# On a GPU it is a "device-side assert", reported at some later line. But with $p=0$ your row is *untrained*: it never got a gradient, and guidance by it runs and means nothing (lesson 04's `digits-never`). An error would have been kinder. So look at the recipe before you guide.
#
# ## 7. Four ways to tell a transformer
#
# Peebles & Xie compared four designs. With $c_t,c_y$ the two embeddings:
#
# | design | how the condition enters | cost beside a plain block |
# |---|---|---|
# | in-context | $c_t,c_y$ are two more tokens | $2/m$ more tokens: almost nothing |
# | cross-attention | a further layer attends to the sequence $(c_t,c_y)$ | $2md^2$ and more; the paper says about 15 % |
# | adaLN | scale and shift from $c_t+c_y$, no gates | $4d^2$ weights, once per picture |
# | adaLN-Zero | the same with gates, starting at zero | $6d^2$ weights, once per picture |
#
# In the paper (XL/2 on ImageNet's latents, figure 5) adaLN-Zero has a lower FID than in-context and cross-attention at all stages of training, and in the end nearly half of in-context's. Does a tiny transformer on our digits agree after 300 steps? As published, the label table starts at $\mathcal N(0,0.02^2)$. A second run changes this one number, to $0.5$.
#
# **Predict:** which design has the lowest loss on held-out digits with the published start, and which with the louder one?

# %%
guess_best, guess_best_loud = ..., ...  # two of "in-context", "cross-attention", "adaLN", "adaLN-Zero"

# %% tags=["nbval-ignore-output", "skip-grading"]
from condiff_ref.denoisers import as_denoiser
from condiff_ref.dit import DiT
from condiff_ref.judge import Judge
from condiff_ref.metrics import class_accuracy
from condiff_ref.samplers import euler_step, sample

DESIGNS = ("in-context", "cross-attention", "adaLN", "adaLN-Zero")
judge, seeds = Judge.digits(), range(1 if SMOKE else 2)
wanted = torch.arange(10).repeat_interleave(2 if SMOKE else 20)


def train_design(design, start, seed):
    torch.manual_seed(seed)
    net = DiT(1, 8, 2, 48, 2, 4, classes=10, conditioning=design)
    nn.init.normal_(net.label_embedding.table.weight, std=start)
    steps = 8 if SMOKE else 300
    return fit(net, flow_loss, x0, labels, steps=steps, lr=5e-3, ema=0.99, seed=seed, progress=False).network


@torch.no_grad()
def loss_held_out(net, label):
    """With the same noise and times for every network."""
    draws = range(1 if SMOKE else 5)
    total = sum(diffusion_loss(net, x0_held_out, "flow", path, rng(seed), label=label) for seed in draws)
    return float(total) / len(draws)


def drawn_by(net, seed):
    """Pictures of the wanted classes, not guided."""
    start = torch.randn(len(wanted), 1, 8, 8, generator=rng(seed))
    denoiser = as_denoiser(partial(net, label=wanted), "flow", path)
    return (spread * sample(euler_step(path), denoiser, start, time_grid(12)) + centre).clamp(-1, 1)


# %% tags=["nbval-ignore-output", "skip-grading"]
told, results = {}, {}
hidden = torch.full_like(held_out_labels, 10)
for start in (0.02, 0.5):
    for design in DESIGNS:
        nets = [train_design(design, start, seed) for seed in seeds]
        losses = [loss_held_out(net, held_out_labels) for net in nets]
        gain = sum(loss_held_out(net, hidden) for net in nets) / len(nets) - sum(losses) / len(nets)
        pictures = torch.cat([drawn_by(net, seed) for seed, net in enumerate(nets)])
        accuracy = class_accuracy(judge, pictures, wanted.repeat(len(nets)))
        told[start, design] = losses
        results[start, design] = (gain, accuracy, sum(p.numel() for p in nets[0].parameters()))

# %% tags=["nbval-ignore-output", "skip-grading"]
fig, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharex=True, sharey=True, layout="constrained")
print("label table   design            held-out loss   the label lowers it by   as asked              parameters")
for ax, start in zip(axes, (0.02, 0.5), strict=True):
    for i, design in enumerate(DESIGNS):
        losses, (gain, accuracy, weights) = told[start, design], results[start, design]
        ax.scatter(losses, [i] * len(losses), color=COLOURS["conditional"], zorder=3)
        mean = sum(losses) / len(losses)
        print(f"{start:11}   {design:16} {mean:10.3f} {gain:18.3f}               {accuracy} {weights:10,}")
    ax.set(title=f"label table starts at {start}", xlabel="held-out loss, a dot per seed", ylim=(3.5, -0.5))
axes[0].set_yticks(range(4), DESIGNS)
plt.show()
for guess, start in ((guess_best, 0.02), (guess_best_loud, 0.5)):
    reveal(guess, min(DESIGNS, key=lambda design: sum(told[start, design])))

# %% [markdown]
# *After 300 steps from the published start, in-context has the lowest loss; from the louder one, adaLN-Zero has.* (A third seed of these two agrees. The quick run of the tests trains for eight steps and shows nothing.) A likely reason: in context, the label's token passes a layer norm first. However short its vector, it arrives at full length; only its direction counts, and a long vector turns more slowly. The other designs take the vector as it is, and 0.02 is quiet. (The table shows the effect, not its cause.)
#
# Does this contradict the paper? No: with 1,200 steps instead of 300, and the *published* start, the same code puts adaLN-Zero in front, at 0.547 and 0.551 (seeds 0 and 1) against 0.567 and 0.565 in context (seed 0 of adaLN: 0.558, of cross-attention: 0.565). So read a comparison of designs as one of designs *with their start, rate and length of training*; a network with 100,000 weights on 8x8 digits neither confirms nor refutes one on ImageNet. A larger comparison of the four, with longer training, more seeds and guidance, is in `benchmarks/architectures.md`.
#
# ## 8. Sampling and guidance
#
# One forward pass gives $\epsilon_c$ and $\epsilon_u$ when the batch holds every noisy picture twice, once with its label and once with the null label. The published network has twice as many channels in its answer as in its input, the noise and then the variance of a DDPM step (Nichol & Dhariwal 2021). Guidance is for the noise, in *all* its channels; each half of the batch keeps its variance.

# %% exercise="08.7"

# %% [markdown]
# With your guidance, two of the course's networks for MNIST, begun from the same noise. (They predict velocities and no variance, so zeros take its place. Guidance is the same for both kinds, lesson 05.)

# %% tags=["nbval-ignore-output", "skip-grading"]
from condiff_ref.checkpoints import load


def guided(model, label, scale):
    """A shipped network, guided by your function, as a denoiser."""

    def velocity(xt, t):
        null = torch.full_like(label, model.network.null)
        out = model.raw(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([label, null]))
        channels = out.shape[1]
        return dit_cfg(torch.cat([out, 0 * out], dim=1), channels, scale)[: len(xt), :channels]

    return as_denoiser(velocity, model.recipe.kind, model.schedule)


mnist_judge, digit = Judge.mnist(), torch.arange(10).repeat(1 if SMOKE else 10)
start = torch.randn(len(digit), 1, 28, 28, generator=rng(11))
fig, axes = plt.subplots(2, 1, figsize=(6, 3), layout="constrained")
for ax, name in zip(axes, ("mnist-dit", "mnist-unet"), strict=True):
    model = load(name)
    pictures = {}
    for scale in (1.0, 2.0):
        step = euler_step(model.schedule)
        pictures[scale] = model.decode(sample(step, guided(model, digit, scale), start, time_grid(8)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.raw(start[:1], torch.ones(1) / 2, digit[:1])
    asked_for = [class_accuracy(mnist_judge, made, digit) for made in pictures.values()]
    weights = sum(p.numel() for p in model.network.parameters())
    print(f"{name:10} {weights:,} parameters, {counter.get_total_flops() / 2e6:.1f} M MACs for one evaluation;")
    print(f"{'':10} as asked at scale 1: {asked_for[0]}, at scale 2: {asked_for[1]}")
    show_tile(ax, torch.cat([pictures[1.0][:10], pictures[2.0][:10]]), 10, f"{name}: scale 1 above, 2 below")
plt.show()

# %% [markdown]
# *Two architectures, one task: a convolution sees neighbours by construction, a transformer has to learn where to look.* Their cards (`data/checkpoints/*.md`) say for how long each was trained, and how far each is from real digits. Sizes and training differ: this is no contest of designs. (`benchmarks/architectures.md` has one at equal seconds of training.)

# %% [markdown]
# ### From the museum of real bugs: three channels of four
#
# DiT's released `forward_with_cfg` guides `model_out[:, :3]`: three channels of a latent with *four*. (An issue traces the line to code for GLIDE, whose pictures have three.) In January 2023 the first author, told so in a pull request, thanked for the catch and called it unintended. By his measurement scale $1+x$ on three channels acts much like $1+\frac34x$ on four (1.5: FID 2.27; 1.375: 2.23). As results had been made with it, the line stayed, with a comment that says so: a fair decision. But it was copied: by a later count in an issue it stands in SiT, MDT and PixArt.
#
# Your function takes the number of channels. The two settings:

# %% tags=["nbval-check-output"]
out = torch.randn(2 * 5, 8, 6, 6, generator=rng(12))  # five pictures with label, five without; noise and variance
for channels in (4, 3):
    result = dit_cfg(out, channels, 4.0)
    changed = ((result - out)[:5].abs().amax(dim=(0, 2, 3)) > 0).tolist()
    agree = torch.equal(result[:5, :4], result[5:, :4])
    print(f"{channels} channels: guided are {[i for i in range(8) if changed[i]]}, both halves have one noise: {agree}")

# %% [markdown]
# With three, the halves disagree in channel 3: the copy with label and the copy without would drift apart. (The published function overwrites the second half of its input with the first in each step, so they cannot. That also hides the matter.)
#
# How wrong are the *samples*? Guide one of the exact world's two coordinates, as three channels of four. **Predict**, for class 1 at scale 3: is the other coordinate, which is not guided, distributed as in unguided samples?

# %%
guess_other = ...  # "yes" or "no"

# %%
world, straight = archipelago(), flow()
n_points, n_steps = (500, 40) if SMOKE else (2000, 60)


def exact(x, t, label=None):
    """The exact velocity on the straight path."""
    return -t[:, None] * world.score(x, t, straight, label) - world.posterior_mean(x, t, straight, label)


def cloud(channels, scale, turn=0):
    """Class 1, the first of its coordinates guided by your function, or both; with turn = 1 the second comes first."""
    x = torch.randn(n_points, 2, generator=rng(13), dtype=torch.float64)
    grid = torch.linspace(1, 0, n_steps + 1, dtype=torch.float64)
    for i in range(n_steps):
        t = grid[i].expand(n_points)
        both = torch.cat([exact(x, t, 1), exact(x, t)]).roll(turn, dims=1)
        answer = dit_cfg(torch.cat([both, 0 * both], dim=1)[:, :, None, None], channels, scale)
        x = x + (grid[i + 1] - grid[i]) * answer[:n_points, :2, 0, 0].roll(turn, dims=1)
    return x


# %%
clouds = {
    "not guided": cloud(2, 1.0),
    "both": cloud(2, 3.0),
    "first only": cloud(1, 3.0),
    "second only": cloud(1, 3.0, 1),
}
islands = world.given(1).means
upper = {
    name: float((torch.cdist(x, islands).argmin(1) == islands[:, 1].argmax()).double().mean())
    for name, x in clouds.items()
}
fig, axes = plt.subplots(1, 4, figsize=(11, 2.9), sharex=True, sharey=True, layout="constrained")
for ax, (name, x) in zip(axes, clouds.items(), strict=True):
    ax.scatter(*x.T, s=2, color=COLOURS["conditional" if name == "not guided" else "guided"], alpha=0.5)
    ax.set_title(f"{name}: {upper[name]:.0%} above", fontsize=10)
plt.show()
moved = [
    energy_distance(clouds["first only"][:, 1:], clouds["not guided"][:, 1:]),
    energy_distance(clouds["second only"][:, :1], clouds["not guided"][:, :1]),
]
print(f"energy distance of the coordinate not guided to the unguided one: {moved[0]:.3f}, {moved[1]:.3f}")
reveal(guess_other, "no" if min(moved) > 0.02 else "yes")

# %% tags=["nbval-check-output"]
print("the coordinate that nobody guides has changed:", min(moved) > 0.02)
print("guided both, a little more on the upper island:", 0 < upper["both"] - upper["not guided"] < 0.15)
print("guided the first only, much less than unguided:", upper["first only"] < upper["not guided"] - 0.1)
print("guided the second only, much more than both:", upper["second only"] > upper["both"] + 0.15)

# %% [markdown]
# *The velocity of each coordinate depends on both, so the guided one drags the other along. And half a guidance is not a milder one: it favours an island, and which one depends on the half.* Each cloud by itself looks like class 1. In DiT's case FID says that little was lost; nothing guarantees that elsewhere. (Two clouds of 2,000 unguided samples are about 0.002 apart in each coordinate: what the cell prints is no noise.) A property finds it at once: *both halves of the guided noise are equal*.
#
# ## 9. Write the test
#
# Blocks without gates or with the wrong one, with shift and scale exchanged, with norms that have weights of their own: section 4 told you why the obvious test ("a fresh block returns its input") lets most of them through.

# %% exercise="08.8"

# %% [markdown]
# ## 10. What it costs, what to keep
#
# **Cost.** $12md^2+2m^2d$ multiply-adds per block, and a sampler pays that for every evaluation, twice with guidance. Half the patch side: four times the bill, the same weights. The modulations: a third of the weights, 0.2 % of the bill.
#
# **Keep.**
# - A token has no place of its own. Positions are an input like any other.
# - Gate 0 makes the block the identity. $\gamma=1,\delta=0$ is a plain norm, which is not.
# - Zeros wake in order: head; final modulation, stem and gates; everything else. The label is heard in the third forward pass.
# - Before you test a zero-initialised network, make its zeros random.
# - A comparison of designs is one of designs with their start and their length of training.
# - Guide all channels of the noise, and none of the variance; know whether your null row was trained.
#
# ## Questions
#
# 1. A colleague keeps the gates and drops "Zero": modulations start at random. What is lost?
# ### BEGIN SOLUTION
# *Not the functions that can be learned, only the start: each block changes its input by random branches at once, and 28 of them pile up. How much that costs is for an experiment to say; the paper finds adaLN, which has no gates and no zeros, clearly worse than adaLN-Zero.*
# ### END SOLUTION
# 2. Another one zeroes the modulations, the head *and* the stem, "to be safe". What can the network no longer learn, at first?
# ### BEGIN SOLUTION
# *At forward 0 the tokens are the positions alone, so the head learns at backward 0 from places, not from pixels. The stem gets a gradient at backward 1 through the head, as usual: it wakes. Zero the positions too (or leave them out), and $h=0$: its norm is 0, only the head's bias learns, which gives the same answer in every patch, and $W^\top r$ stays 0 for everything else: the network never wakes.*
# ### END SOLUTION
# 3. Why does the label table not get a gradient at backward 1, though the final modulation does?
# ### BEGIN SOLUTION
# *The gradient of $c$ passes $W^\top$ of the modulations, and in that pass they are still 0. The final modulation's own gradient, $r\,\mathrm{SiLU}(c)^\top$, is not.*
# ### END SOLUTION
# 4. Your latents are $64\times64$ instead of $32\times32$ (same patches). What happens to DiT-XL/2's parameters, to its bill, and to the share of attention's products?
# ### BEGIN SOLUTION
# *Parameters: unchanged, as the positions are computed. Tokens: 1,024, four times; the linear part of the bill grows fourfold, attention's products sixteenfold. Their share is $m/(6d+m)=1024/7936=13\,\%$ instead of 3.6 %.*
# ### END SOLUTION
# 5. A network was trained with $p=0$. Your `LabelEmbedder` has a null row. May you guide?
# ### BEGIN SOLUTION
# *The code runs, but the row is as random as on the first day: what it answers is not the unconditional noise. Train with dropout, or use an unconditional network beside it, or guide by another means, such as a weaker network with the same label (lesson 04).*
# ### END SOLUTION
# 6. You read "118.6 Gflops". Your GPU is sold with 400 TFLOPS. Is one guided picture in 250 steps half an hour of FLOPs, or a fraction of a second?
# ### BEGIN SOLUTION
# *$118.6\cdot10^9$ multiply-adds are $237\cdot10^9$ FLOPs; times 2 for guidance, times 250: $1.2\cdot10^{14}$, or 0.3 s at the printed rate, which no real program reaches.*
# ### END SOLUTION
#
# **Sources.** Peebles & Xie 2023 (DiT, arXiv 2212.09748; github.com/facebookresearch/DiT, read at commit ed81ce2, its pull request 12 and issue 41); Perez et al. 2018 (FiLM); Dosovitskiy et al. 2021 (patches as tokens); Goyal et al. 2017 (zero start of residual branches, 1706.02677); Vaswani et al. 2017; Nichol & Dhariwal 2021 (learned variance); Chen et al. 2023 (PixArt-$\alpha$, 2310.00426). Numbers are computed in the cells above, except those of the longer runs and the third seed in section 7.
