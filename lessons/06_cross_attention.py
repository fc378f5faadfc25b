# %% [markdown]
# # 06 · Cross-attention, text and cost
#
# **Question.** A class label is one vector for the whole picture. A caption is a row of words, and "a large three at the top left" concerns some pixels more than others. How does a pixel find its words, and what does that cost?
#
# **You need** lesson 02 (the null label), lesson 04 (guidance). No GPU, no download.
#
# **You build** captions as tokens, attention with masks and heads, its cost to the byte, attention that never stores its own matrix, and tests of what a picture owes to each word. In the second half a network draws from captions.
#
# **One card for the whole lesson**
#
# | letter | meaning |
# |---|---|
# | $N,\ L$ | positions of the picture (a $64\times64$ grid: 4,096), tokens of the caption |
# | $q_i,\ k_j,\ v_j$ | query of position $i$; key and value of token $j$ |
# | $C,\ h,\ d=C/h$ | channels of a layer, heads, channels per head |
# | $B,\ E$ | pictures in a batch; width of a token's vector |
# | $s$ | guidance scale: 0 unconditional, 1 conditional |

# %% tags=["setup"]

# %%
import time
import weakref
from collections.abc import Sequence
from itertools import product

from condiff_ref.scenes import DIGITS, EMPTY, LENGTH, WORDS, SceneObject, by_quadrant, caption, scenes
from condiff_ref.viz import COLOURS, show_tile
from condiff_ref.widgets import slider
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def rng(seed=0):
    return Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


# %% [markdown]
# ## 1. Words become numbers
#
# A **tokeniser** turns a caption into whole numbers, one per token. Ours knows 19 words, the comma, and two tokens that are no words: `<pad>` fills short captions up, so that a batch is one table, and `<null>` is the empty caption, the null label of lesson 02. Beside the ids goes a **mask**: True where a token counts, False at the pads.
#
# A word that is not on the list, a caption that is too long: whoever skips or cuts silently gets a picture of something else. Refuse aloud.

# %% exercise="06.1"

# %% tags=["nbval-check-output"]
vocab = {word: i for i, word in enumerate(("<pad>", "<null>", *WORDS))}
ids, mask = encode(
    ["a large three at the top left, a small seven at the bottom right", "a small one at the top left", ""],
    vocab,
    LENGTH,
)
print(ids)
print("tokens that count:", mask.sum(1).tolist())
for wrong in ("a red seven at the top left", "a large three at the top left, a small seven at the bottom right, a"):
    try:
        encode([wrong], vocab, LENGTH)
    except ValueError:
        print("refused:", wrong)

# %% [markdown]
# Each id then picks a row of a table, and a **text encoder**, a small transformer (layers of the attention of section 2, here of words to words), lets the rows look at one another, so that the vector of "three" can know that *this* three is large and at the top left. The result is the *context*: one vector per token, $c_1..c_L$. Stable Diffusion 1 has $L=77$ tokens of width 768. (A lecture calls its condition a "768x1 vector". That is the *pooled* vector, a summary; its cross-attention reads the $77\times768$ token vectors.)
#
# ## 2. A pixel asks, words answer
#
# Every position of the picture makes a **query** from its features $x_i$, every token a **key** and a **value** from its vector $c_j$, by three learned matrices: $q_i=W_Qx_i,\ k_j=W_Kc_j,\ v_j=W_Vc_j$ (in code vectors are rows, so that the matrices stand on the right). A position compares its query with all keys, turns the scores into shares that add up to 1, and takes home that mixture of the values:
#
# $$w_{ij}=\frac{e^{q_i\cdot k_j/\sqrt d}}{\sum_{j'}e^{q_i\cdot k_{j'}/\sqrt d}},\qquad \mathrm{out}_i=\sum_jw_{ij}\,v_j,\qquad\text{in one line}\quad \mathrm{softmax}\Big(\frac{QK^\top}{\sqrt d}\Big)V .\tag{1}$$
#
# **Why a softmax?** Suppose that position $i$ speaks of exactly one token, each as likely as the next, and that token $j$ would send the query $q\sim\mathcal N(k_j,\tau I)$. By Bayes, with keys of one length, token $j$ is meant with probability $\propto e^{-\|q-k_j\|^2/2\tau}\propto e^{q\cdot k_j/\tau}$: a softmax with $\tau=\sqrt d$, and $\mathrm{out}_i$ is the *expected* value. It is the weighted average of exercise 01.5, with words in the place of data points. Cross-attention is older than diffusion: in a translation model each position of the new sentence asks the words of the old one (Vaswani et al. 2017; T5 and BART are built so).
#
# **Why $\sqrt d$?** Entries of $q$ and $k$ that are independent with variance 1 give $q\cdot k$ the variance $d$. Without the root, scores grow with the width, one word takes all, and the softmax has no slope left to learn from.
#
# **By hand**, with $d=1$, two pixels, three words. Keys $0,1,2$; values $0,7,14$; queries $\ln2$ and $-\ln2$. The first pixel's scores are $0,\ln2,2\ln2$, so its weights are as $1:2:4$. **Predict before you run:** which values do the two pixels take home?

# %%
guess_first, guess_second = ..., ...

# %% exercise="06.2"

# %% tags=["nbval-check-output"]
q = torch.tensor([[[math.log(2)], [-math.log(2)]]])
k, v = torch.tensor([[[0.0], [1.0], [2.0]]]), torch.tensor([[[0.0], [7.0], [14.0]]])
everybody = torch.ones(1, 3, dtype=torch.bool)
taken = attention(q, k, v, everybody)
weights = attention(q, k, torch.eye(3)[None], everybody)  # the identity as values shows the weights themselves
print("weights, times 7:", (7 * weights[0]).round().tolist())
print("values taken:", [round(x, 4) for x in taken.flatten().tolist()])

# %%
reveal(guess_first, round(float(taken[0, 0])))
reveal(guess_second, round(float(taken[0, 1])))

# %% [markdown]
# Rows add up to 1, columns need not: a word may be wanted by all pixels or by none.
#
# **Predict.** The width of the keys is 512 and someone forgets $\sqrt d$. How large is the largest of 15 random weights, on average: 0.3, 0.6 or 0.95?

# %%
guess_largest = ...

# %%
for d in (8, 64, 512):
    big_q, big_k = normal(1, 2000, d, seed=1), normal(1, 15, d, seed=2)
    with_root = attention(big_q, big_k, torch.eye(15)[None], torch.ones(1, 15, dtype=torch.bool)).amax(-1).mean()
    without = (big_q @ big_k.transpose(1, 2)).softmax(-1).amax(-1).mean()
    print(f"d = {d:3}: largest weight {float(with_root):.2f}, without the root {float(without):.2f}")
reveal(guess_largest, round(float(without), 2), close=0.03)

# %% [markdown]
# ### The mask
#
# A caption of 7 tokens is filled up to 15. Let all scores be 0, the words have the value 1, the pads the value 0: nothing is there, so is nothing added?
#
# **Predict:** what does a pixel take home if nobody masks the pads, or if the scores of pads are *multiplied* by 0?

# %%
guess_unmasked = ...

# %% tags=["nbval-check-output"]
counts = torch.arange(15)[None] < 7
v_words = counts[:, :, None].float()  # 1 for the words, 0 for the pads
flat_q, flat_k = torch.zeros(1, 4, 8), torch.zeros(1, 15, 8)
masked = attention(flat_q, flat_k, v_words, counts)
ignored = attention(flat_q, flat_k, v_words, torch.ones_like(counts))
print(f"masked {float(masked[0, 0, 0]):.4f}, mask ignored {float(ignored[0, 0, 0]):.4f}, 7/15 = {7 / 15:.4f}")

# %%
reveal(guess_unmasked, round(float(ignored[0, 0, 0]), 2))

# %% [markdown]
# $e^0=1$: a score of 0 is not silence, it is a vote like any other. Silence is $-\infty$. A network that is *trained* without a mask can live with its pads (pull request 2634 of the library diffusers says that Stable Diffusion was: its empty caption has 2 tokens, and 75 pads are read along with them). But do not train one way and sample the other.
#
# ## 3. Heads
#
# One softmax has one whole to share out: it cannot give "three" *and* "top" all its weight. So the $C$ channels are cut into $h$ runs of $d=C/h$, each attends by itself, and the results are laid side by side again. The matrix of weights has the shape $(B,h,N,L)$; slides that write $(B,N,L)$ next to "$d_k$ = head dimension" have lost an axis.

# %% exercise="06.3"

# %% [markdown]
# **Predict.** `x.reshape(b, heads, n, c // heads)`, without a transposition, has the right shape, too. With 4 pixels, 4 channels and 2 heads: whose numbers does head 0 get at its pixel 1?

# %%
guess_pixel = ...  # 0, 1, 2 or 3

# %% tags=["nbval-check-output"]
x = torch.arange(4.0)[:, None].expand(4, 4)[None]  # every channel of pixel i holds the number i
print("right, head 0:", split_heads(x, 2)[0, 0].tolist())
print("no transposition:", x.reshape(1, 2, 4, 2)[0, 0].tolist())
print("there and back:", torch.equal(merge_heads(split_heads(x, 2)), x))

# %%
reveal(guess_pixel, int(x.reshape(1, 2, 4, 2)[0, 0, 1, 0]))


# %% [markdown]
# Pixel 0's: pixels and channels are mixed up, no error is raised, and merging the same way undoes it, so that no test of shapes or of round trips can find it.
#
# Now all together, a layer as networks have it: four matrices around your three functions. With `context=None` the picture attends to itself.


# %%
class Layer(nn.Module):
    """Cross-attention to a context of width `context_dim`, or self-attention where no context is given."""

    def __init__(self, dim, heads, context_dim=None):
        super().__init__()
        self.heads, context_dim = heads, context_dim or dim
        self.to_q, self.to_out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_dim, dim, bias=False) for _ in range(2))

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        mask = torch.ones(context.shape[:2], dtype=torch.bool) if mask is None else mask
        q, k, v = (split_heads(z, self.heads) for z in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask.repeat_interleave(self.heads, 0))
        return self.to_out(merge_heads(out.unflatten(0, (len(x), self.heads))))


# %% [markdown]
# ### Who hears whom
#
# Slides say: self-attention is affordable only at low resolution, so at high resolution cross-attention *takes its place*. Can it? Look at (1): $\mathrm{out}_i$ contains $q_i$, and all keys and values, and no other pixel. So with cross-attention $\partial\,\mathrm{out}_i/\partial x_{i'}=0$ for $i\ne i'$: pixels hear the text, never each other.
#
# **Predict:** how much do the outputs of 12 different pixels differ, if the context is a single token?

# %%
guess_spread = ...

# %% tags=["nbval-check-output"]
torch.manual_seed(0)
cross, own = Layer(16, 4, context_dim=24).double(), Layer(16, 4).double()
pixels, words = normal(1, 12, 16, seed=3).double(), normal(1, 5, 24, seed=4).double()
others = ~torch.eye(12, dtype=torch.bool)
for name, call in (("cross", lambda x: cross(x, words)), ("self", own)):
    jacobian = torch.autograd.functional.jacobian(call, pixels)[0, :, :, 0].detach().abs().amax(dim=(1, 3))  # (12, 12)
    print(f"{name}: pixels hear each other at all: {bool((jacobian[others] > 0).any())},", end=" ")
    print("by more than 0.001:", bool(jacobian[others].max() > 1e-3))
one_token = cross(pixels, words[:, :1])
print("spread over pixels with one token:", round(float((one_token - one_token[:, :1]).detach().abs().max()), 12))

# %%
reveal(guess_spread, 0)

# %% [markdown]
# Exactly 0, not nearly: the softmax over a single score is 1, so every pixel takes home the same value. Cross-attention brings text to pixels; that pixels agree with one another is the work of convolutions and self-attention. Real networks do not trade one for the other:
#
# | network | self-attention | text |
# |---|---|---|
# | DDPM (Ho et al. 2020), pixels | at 16x16 | none |
# | ADM (Dhariwal & Nichol 2021), pixels | at 32, 16, 8 | none |
# | Stable Diffusion 1, latents | at 64, 32, 16, 8: in *every* transformer block (5 + 5 + 5 + 1 of them) | cross-attention in the same blocks, at the same resolutions |
# | Stable Diffusion 3, latents | everywhere | no cross-attention: text and picture tokens in *one* self-attention (section 6) |
# | this course's network | none (convolutions) | cross-attention at 8x8 |
#
# "Attention at 16x16 and 8x8 only" describes networks on pixels. High resolution became affordable by diffusing latents (64x64 instead of 512x512 has a matrix $8^4=4096$ times smaller) and by not storing the matrix (section 5).
#
# Cross-attention is one way in of three. What concerns the *whole* picture (a class, a pooled caption) can join the embedding of $t$ and scale every feature; words about *regions* come through cross-attention; *fine* structure, such as a drawing of edges, is added to the input or the skip connections (lesson 07). Each can act at several resolutions, and large systems combine them.
#
# ## 4. What it costs
#
# Count multiply-adds (MACs). $QK^\top$ is a table of $N\times L$ numbers, each a sum of $d$ products: $NLd$. The product with $V$ is $N\times d$ numbers, each a sum over $L$ tokens: $NLd$ again. So **one head's core costs $2NLd$ MACs, which is $4NLd$ FLOPs**, as a MAC is a multiplication and an addition. All $h$ heads cost $4NLC$, however the channels are cut. Self-attention has $L=N$. Around the core stand four matrices: queries and output cost $NC^2$ MACs each, keys and values $LEC$ each, $E$ the width of the text.
#
# The *matrix of weights* is another matter: $h\,N\,L$ numbers, so there heads do count.

# %% exercise="06.4"

# %% [markdown]
# **Numbers from slides**, each for one head at $64\times64$, $L=77$, $d=64$: "cross-attention: 40 million FLOPs, 1.26 MB; self-attention: 2 billion FLOPs, 64 MB; about 50 times more". **Predict:** which of them is a FLOP count?

# %%
guess_flops = ...  # "both", "one" or "none"

# %% tags=["nbval-check-output"]
N, L, d = 64 * 64, 77, 64
to_text, to_itself = attn_cost(N, L, d, 1, d, 4), attn_cost(N, N, d, 1, d, 4)
for name, cost in (("cross", to_text), ("self", to_itself)):
    size = cost["matrix_bytes"]
    print(f"{name:5}: {cost['core']:13,} MACs = {2 * cost['core']:13,} FLOPs;", end=" ")
    print(f"{size:10,} bytes = {size / 10**6:.2f} MB = {size / 2**20:.2f} MiB")
print(f"true ratio N/L = {N / L:.2f}; 64 MiB over 1.26 MB = {64 / 1.26:.1f}")
for what, keys in (("cross", L), ("self", 256 * 256)):
    size = attn_cost(256 * 256, keys, d, 1, d, 4)["matrix_bytes"]
    print(f"at 256x256, {what}: {size / 10**6:,.2f} MB = {size / 2**20:,.2f} MiB")

# %%
reveal(guess_flops, "none")

# %% [markdown]
# Both numbers are MACs, half the FLOPs (the same slides' solution says "multiply-adds", and is right). The 1.26 MB are decimal, the 64 "MB" are MiB, and dividing one by the other gives the "50"; the ratio is 53.19. Such mixtures are common (the 118.6 "Gflops" of DiT-XL/2, lesson 08, are MACs): ask which one is meant.
#
# Does PyTorch agree? `FlopCounterMode` counts what really runs. And a real layer has heads and projections: the first level of Stable Diffusion 1, $C=320$, 8 heads, text of width 768. **Predict:** in that layer, how many times as many FLOPs does self-attention need, 53, 30 or 12?

# %%
guess_layer = ...


# %%
def flops_of(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


# %% tags=["nbval-check-output"]
one_head = [normal(1, n, d, seed=n) for n in (N, L, L)]
print(
    "core as counted:",
    flops_of(lambda: attention(*one_head, torch.ones(1, L, dtype=torch.bool))) == 2 * to_text["core"],
)

level0, text = normal(1, N, 320), normal(1, L, 768)
layers = {"cross": Layer(320, 8, 768), "self": Layer(320, 8)}
level = {"cross": attn_cost(N, L, 320, 8, 768, 2), "self": attn_cost(N, N, 320, 8, 320, 2)}
print("cross layer as counted:", flops_of(lambda: layers["cross"](level0, text)) == level["cross"]["flops"])
small = normal(1, 256, 320)
print(
    "self layer, 16x16, as counted:",
    flops_of(lambda: layers["self"](small)) == attn_cost(256, 256, 320, 8, 320, 2)["flops"],
)
print(f"layer ratio: {level['self']['flops'] / level['cross']['flops']:.2f}")
print(f"the core's share: cross {level['cross']['core'] / level['cross']['flops'] * 2:.0%},", end=" ")
print(f"self {level['self']['core'] / level['self']['flops'] * 2:.0%}")
for name in ("cross", "self"):
    print(f"{name}: matrix for 8 heads, 16 bits, batch of 2 for guidance: {2 * level[name]['matrix_bytes']:,} bytes")

# %%
reveal(guess_layer, 12)

# %% [markdown]
# The ratio of a *layer* is 11.51, because in cross-attention four fifths of the work are the four matrices, which both kinds have.
#
# **Predict:** double the text from 77 to 154 tokens. By which factor do this cross-attention layer's FLOPs grow? And its time?

# %%
guess_double, guess_time = ..., ...


# %% tags=["nbval-ignore-output"]
def seconds(call, repeats=2 if SMOKE else 4):
    """The fastest of some runs: other programs can only add to it."""
    with torch.no_grad():
        call()
        runs = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            runs.append(time.perf_counter() - start)
    return min(runs)


longer = normal(1, 2 * L, 768)
single, double = (seconds(lambda c=c: layers["cross"](level0, c)) for c in (text, longer))
by_flops = attn_cost(N, 2 * L, 320, 8, 768, 2)["flops"] / level["cross"]["flops"]
print(f"{1000 * single:.1f} ms, {1000 * double:.1f} ms: time x {double / single:.2f}, FLOPs x {by_flops:.2f}")
reveal(guess_double, round(by_flops, 1), close=0.1)
reveal(guess_time, round(double / single, 1), close=0.2)

# %% [markdown]
# Not 2: only the core, keys and values know of the text's length. The time tends to grow by more than the FLOPs do: scaling, masking and exponentiating the matrix are not in this count, but read and write all of it. *A ratio of FLOPs is not a ratio of speeds.*
#
# ### Exponents
#
# With $N=R^2$ positions for a picture of side $R$, the core of self-attention costs $R^4$, that of cross-attention $R^2$. Measured on double-logarithmic axes, the slope is the exponent. For memory, we count all tensors that are alive at the same time:


# %%
class Memory(TorchDispatchMode):
    """The most bytes that new tensors, alive at the same time, have taken."""

    now = peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in known:  # not a view
            self.now += out.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(out, self.free, out.untyped_storage().nbytes())
        return out

    def free(self, size):
        self.now -= size


def peak_bytes(call):
    with Memory() as memory, torch.no_grad():
        call()
    return memory.peak


def core(n, tokens, heads=1, dim=64):
    """The core as a call, ready to be measured."""
    q, k, v = (split_heads(normal(1, size, dim, seed=size), heads).flatten(0, 1) for size in (n, tokens, tokens))
    everything = torch.ones(heads, tokens, dtype=torch.bool)
    return lambda: attention(q, k, v, everything)


def slope(xs, ys):
    """The exponent of a power law, by least squares on logarithms."""
    rows = torch.tensor([[math.log(x), 1.0] for x in xs])
    return float(torch.linalg.lstsq(rows, torch.tensor(ys).log()[:, None]).solution[0])


# %% tags=["nbval-ignore-output"]
sides = [16, 24, 32] if SMOKE else [16, 24, 32, 48, 64]
sweeps = {
    "positions N, self": ([r * r for r in sides], lambda n: core(n, n)),
    "positions N, cross": ([16 * r * r for r in sides], lambda n: core(n, 77)),
    "tokens L": ([77, 154, 308, 616], lambda n: core(4096, n)),
    "heads h": ([1, 2, 4, 8], lambda n: core(4096, 77, heads=n)),
}
fitted = {}
fig, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
for (name, (xs, make)), colour in zip(sweeps.items(), ("guided", "conditional", "unconditional", "data")):
    style = "s--" if name == "heads h" else "o-"
    calls = [make(x) for x in xs]
    measured = [[f(call) for call in calls] for f in (flops_of, peak_bytes, seconds)]
    fitted[name] = [slope(xs, ys) for ys in measured]
    for ax, ys, title in zip(axes, measured, ("FLOPs", "peak bytes", "seconds")):
        ax.loglog([x / xs[0] for x in xs], [y / ys[0] for y in ys], style, color=COLOURS[colour], label=name)
        ax.set(title=f"{title}, times the smallest", xlabel="size, times the smallest")
        ax.set_xticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
        ax.minorticks_off()
axes[0].legend(fontsize=7)
plt.show()
for name, values in fitted.items():
    print(f"{name:19} exponents: FLOPs {values[0]:.2f}, memory {values[1]:.2f}, time {values[2]:.2f}")

# %% tags=["nbval-check-output"]
for name, (flops, memory, _) in fitted.items():
    print(f"{name}: FLOPs to the power {abs(flops):.2f}, memory about {round(memory)}")

# %% [markdown]
# *Self-attention: exponent 2 in the number of positions, so 4 in the side; cross-attention: 1. Heads: 0 for FLOPs, about 1 for memory. (Some lines coincide: tokens with positions on the left, tokens with heads in the middle.)* Memory fits a little less than 1 where the output, which does not grow, is a visible part. Time follows less neatly: once the matrix no longer fits the processor's cache, for instance, each FLOP takes longer. ("$O(N)$ with resolution" on slides counts pixels; in the side length it is $R^2$.)
#
# ## 5. Attention without its matrix
#
# The matrix was never asked for, only the mixture. Write $u_j=q\cdot k_j/\sqrt d$ for a query's scores, read the tokens in chunks, and keep three things per query: the largest score so far $m$, the sum $Z=\sum_je^{u_j-m}$ and the unnormalised mixture $A=\sum_je^{u_j-m}v_j$. A new chunk with maximum $m'$ changes the reference from $m$ to $M=\max(m,m')$, and
#
# $$Z\leftarrow e^{m-M}Z+\sum_{j\in\text{chunk}}e^{u_j-M},\qquad A\leftarrow e^{m-M}A+\sum_{j\in\text{chunk}}e^{u_j-M}v_j,\qquad\mathrm{out}=A/Z\ \text{ at the end.}\tag{2}$$
#
# Nothing is approximated: with $M$ subtracted or not, $A/Z$ is the same fraction. The maximum is there so that no exponential overflows. This is the **online softmax** (Milakov & Gimelshein 2018), the heart of memory-efficient attention and of FlashAttention (Dao et al. 2022).

# %% exercise="06.5"

# %% [markdown]
# **Predict:** self-attention, read in 64 chunks instead of at once. What happens to memory and to FLOPs?

# %%
guess_memory, guess_arithmetic = ..., ...  # "falls", "same" or "grows"

# %% tags=["nbval-ignore-output"]
n_long = 1600 if SMOKE else 4096
q, k, v = (normal(1, n_long, d, seed=s) for s in range(3))
whole = core(n_long, n_long)
chunks = [n_long // 64, n_long // 16, n_long // 4, n_long]
lengths = [peak_bytes(lambda c=c: chunked_attention(q, k, v, c)) for c in chunks]
plain = peak_bytes(whole)
for c, size in zip(chunks, lengths):
    call = lambda c=c: chunked_attention(q, k, v, c)  # noqa: E731
    print(f"chunk {c:4}: peak {size / 2**20:6.1f} MiB, {flops_of(call) / 1e9:.2f} GFLOP, {1000 * seconds(call):.0f} ms")
print(f"     plain: peak {plain / 2**20:6.1f} MiB, {flops_of(whole) / 1e9:.2f} GFLOP, {1000 * seconds(whole):.0f} ms")

# %% tags=["nbval-check-output"]
everything = torch.ones(1, n_long, dtype=torch.bool)
error = float((chunked_attention(q, k, v, 100) - attention(q, k, v, everything)).abs().max())
huge = chunked_attention(1e4 * q[:, :8], k, v, 100)
print("the same answer:", error < 1e-5, "and finite with scores in the ten thousands:", bool(huge.isfinite().all()))
print("under a tenth of the memory:", lengths[0] < 0.1 * plain)
print("the same FLOPs:", flops_of(lambda: chunked_attention(q, k, v, 64)) == flops_of(whole))

# %%
reveal(guess_memory, "falls")
reveal(guess_arithmetic, "same")

# %% [markdown]
# Less storage, the same arithmetic. (With everything in one chunk there is nothing to save, and the bookkeeping takes memory of its own.) "FlashAttention reduces the cost" means *memory and moving data*; on a GPU, where moving the matrix can take longer than computing it, that saves time, too. The exponent of the arithmetic stays 2.
#
# ## 6. Two shortcuts that are not there
#
# **Stable Diffusion 3** is often described as "CLIP and T5 through cross-attention". It has none. Text and picture tokens are concatenated into one sequence, each kind with matrices of its own, and one self-attention runs over all of them; so text hears the picture as well. (The paper's 154 text tokens are 77 of CLIP and 77 of T5: CLIP is not only the coarse summary.) Beside that, pooled CLIP vectors ($768+1280=2048$ numbers) join the embedding of $t$. **Predict:** how many entries has one head's matrix, with 4,096 picture tokens and 154 of text?

# %%
guess_entries = ...  # in millions

# %% tags=["nbval-check-output"]
print(f"joint: {(4096 + 154) ** 2:,}   cross-attention would be: {4096 * 154:,}")

# %%
reveal(guess_entries, round((4096 + 154) ** 2 / 1e6, 1), " million", close=0.2)

# %% [markdown]
# **"CLIP puts pictures and texts into one space, so a picture's embedding can stand in for the text, without changing the network."** CLIP is trained so that a picture's embedding is *closer to its own caption than to others*. Two things are in the way.
#
# First, what is aligned is one pooled vector, while cross-attention was trained on 77 token vectors, which a picture does not have. A context of one token gives every pixel the same (section 3): attention cannot say where anything belongs.
#
# Second, closer than others does not mean close. A toy: pictures and captions on two circles of radius 1, at the heights $+\frac12$ and $-\frac12$, then all scaled to length 1. **Predict** which is nearer to a picture's embedding: its own caption, or the next picture, 30 degrees away?

# %%
guess_nearer = ...  # "caption" or "picture"

# %% tags=["nbval-check-output"]
angle = torch.arange(12, dtype=torch.float64) * math.pi / 6
circle = torch.stack([angle.cos(), angle.sin()], dim=1)
images, texts = (F.normalize(torch.cat([circle, torch.full((12, 1), z).double()], 1), dim=1) for z in (0.5, -0.5))
similar = images @ texts.T
print("retrieval: every picture finds its caption:", bool((similar.argmax(1) == torch.arange(12)).all()))
print(
    f"cosine with its own caption {float(similar[0, 0]):.6f}, with the next picture {float(images[0] @ images[1]):.6f}"
)
print(f"distance of the two means: {float((images.mean(0) - texts.mean(0)).norm()):.6f}")
reader = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
read_text, read_picture = (float(x[0] @ reader) for x in (texts, images))
print(f"a linear layer made for texts reads {read_text:.6f} in the caption, {read_picture:.6f} in the picture")

# %%
reveal(guess_nearer, "picture")

# %% [markdown]
# Retrieval is perfect, and yet the two kinds live apart: the *modality gap* (Liang et al. 2022 find it in CLIP). A network trained on texts has never seen a vector from the other circle. Systems that work are trained for it: DALL-E 2 draws from picture embeddings and has a second network that makes them from text; IP-Adapter adds new cross-attention layers and trains them.
#
# ## 7. Text to image
#
# Enough of costs: let captions draw. The data are canvases of $16\times16$ pixels with one or two real handwritten digits, and captions that say which, where and how large.

# %%
from condiff_ref.adherence import adherence, read, reader_accuracy, swap
from condiff_ref.checkpoints import load
from condiff_ref.denoisers import as_denoiser
from condiff_ref.guidance import cfg
from condiff_ref.samplers import euler_step, sample, trajectory
from condiff_ref.schedules import time_grid


def show_scenes(ax, images, columns, title=""):
    """A tile with grey lines between its canvases."""
    show_tile(ax, images, columns)
    ax.set_title(title, fontsize=8, loc="left")
    for k in range(1, columns):
        ax.axvline(17 * k - 1, color=COLOURS["noise"], lw=0.7)


shown = scenes(5, rng(8))
fig, ax = plt.subplots(figsize=(7, 1.6), layout="constrained")
show_scenes(ax, shown.images, 5)
plt.show()
print(*shown.captions, sep="\n")

# %% [markdown]
# *Five scenes of the training data; there are 80 captions with one digit and 4,800 with two.*
#
# A caption with two digits sets a task that no class label has: **binding**. Not only which words, but which belongs to which. How much can a network reach that reads a caption as a *bag of words*, without their order? List which digits can stand where (sizes left aside), and group by bag; whoever sees only the bag can be right on at most one arrangement in each. **Predict** that ceiling: 80 %, 60 % or 46 %?

# %%
guess_bag = ...

# %% tags=["nbval-check-output"]
every = [SceneObject(digit, 1, quadrant) for digit, quadrant in product(range(10), range(4))]
pairs = [(a, b) for a, b in product(every, every) if a.quadrant < b.quadrant]  # as a picture, the order is the same
bags = {tuple(sorted(caption(pair).replace(",", " ,").split())) for pair in pairs}
print(f"{len(pairs)} arrangements, {len(bags)} bags: at most {len(bags) / len(pairs):.1%} right")

# %%
reveal(guess_bag, round(100 * len(bags) / len(pairs)), " %")

# %% [markdown]
# Even if only the digits may be exchanged, and all else is known, a bag's best is 50 % where the two differ. (Some texts promise that a shared embedding "understands" a red cube on a green surface. A representation that keeps red, cube, green and surface, but not who is what, would look just as good on most captions.)
#
# **A text encoder that binds.** The vector of each digit word should know its own size and place. `bind` trains that on text alone: a linear map must tell the words for digit, size and place from this vector. The test: in captions with two digits, write another quadrant for the first, and see how far the vector of its word moves, relative to its length; then change the *other* digit's quadrant instead.
#
# **Predict:** in an untrained text encoder, which of the two moves the vector more?

# %%
guess_moves = ...  # "own", "other" or "about equal"


# %% tags=["nbval-ignore-output", "skip-grading"]
from condiff_ref.text import TextEncoder, Vocabulary, bind


@torch.no_grad()
def moved(text, n=200):
    """How far the first digit's vector moves if its own place changes in the caption, and if the other digit's does."""
    versions = []
    for a, b in [objects for objects in scenes(4 * n, rng(5)).objects if len(objects) == 2][:n]:
        free = next(place for place in range(4) if place not in (a.quadrant, b.quadrant))
        versions.append([(a, b), (a._replace(quadrant=free), b), (a, b._replace(quadrant=free))])
    captions = [[caption(objects) for objects in some] for some in zip(*versions)]
    vectors = [text(encode(some, vocab, LENGTH)[0])[:, 2] for some in captions]  # "a", size, digit
    return [float(((v - vectors[0]).norm(dim=1) / vectors[0].norm(dim=1)).mean()) for v in vectors[1:]]


torch.manual_seed(0)
text_encoder = TextEncoder(Vocabulary(WORDS), 64, 2, 4, length=LENGTH)
untrained, start = moved(text_encoder), time.perf_counter()
ids = encode(scenes(200 if SMOKE else 4000, rng(6)).captions, vocab, LENGTH)[0]
digit_words = torch.tensor([vocab[digit] for digit in DIGITS])
bind(text_encoder, ids, digit_words, (0, -1, 3, 4), 20 if SMOKE else 400)  # itself, its size, the words of its place
print(
    f"pre-trained in {time.perf_counter() - start:.0f} s. The vector of a digit word moves by      own   other's place"
)
pretrained, joint = load("scenes-unet"), load("scenes-joint")
for name, (own_place, others_place) in {
    "untrained": untrained,
    "trained just now, on text alone": moved(text_encoder),
    "shipped, trained on text alone, then frozen": moved(pretrained.network.text),
    "shipped, trained jointly with the pictures": moved(joint.network.text),
}.items():
    print(f"{name:69} {own_place:.3f}   {others_place:.3f}")
reveal(guess_moves, "about equal" if max(untrained) < 1.5 * min(untrained) else "own")

# %% [markdown]
# Untrained, the vector notices a change, but hardly whose. Trained to bind (in the full run), it moves more than twenty times as far with its own place as with the other's. And so it does in the last row: nobody taught that encoder to bind, drawing the right pictures did.
#
# ### Drawing
#
# Both networks are the course's U-Net with cross-attention at 8x8 (its queries know their position, or "top left" would have nothing to bind to), trained for 2,000 steps of 64 canvases, taken from the same 8,000. They differ in their text encoders: the one had 500 steps of `bind` before, on text alone, and was then frozen; the other started from scratch and learned along with the U-Net, *jointly*. Captions are the labels, the empty caption is the null label, and guidance is that of lesson 04.


# %% tags=["skip-grading"]
STEPS = 8 if SMOKE else 16


def draw(model, captions, scale, generator):
    """One picture in [-1, 1] per caption."""
    noise = torch.randn(len(captions), *model.shape, generator=generator)
    denoiser = model.denoiser(encode(captions, vocab, LENGTH)[0])
    if scale != 1:
        denoiser = cfg(denoiser, model.denoiser(), scale)
    return model.decode(sample(euler_step(model.schedule), denoiser, noise, time_grid(STEPS)))


# %% tags=["nbval-ignore-output", "skip-grading"]
wanted = [
    "a large three at the top left, a large seven at the bottom right",
    "a large seven at the top left, a large three at the bottom right",
    "a small zero at the bottom left, a large two at the top right",
    "a large eight at the bottom right",
    "",
]
columns = 3 if SMOKE else 6
fig, axes = plt.subplots(len(wanted), 2, figsize=(9.5, 7), layout="constrained")
for row, asked_for in zip(axes, wanted):
    for ax, model, title in zip(row, (pretrained, joint), (asked_for or "(empty caption)", "")):
        show_scenes(ax, draw(model, [asked_for] * columns, 4.0, rng(11)), columns, title)
for ax, name in zip(axes[0], ("text pre-trained", "text trained jointly")):
    ax.set_title(f"{name}\n{ax.get_title(loc='left')}", fontsize=8, loc="left")
plt.show()

# %% [markdown]
# *Scale 4, the same noises in all rows. Left: the network whose text encoder was taught to bind; right: the one that learned reading and drawing at once. The first two captions are each other's swap: both networks let the digits change places.*
#
# Count, do not look. A judge (a support vector machine that has seen only scenes of *test* digits) reads each quadrant: digit or empty, and size. A picture is *whole* if each of its four quadrants shows the right digit, or nothing where nothing was asked for; a *binding error* is two digits in each other's places. **Predict** for the *jointly* trained network at scale 4, in per cent: the share of two-digit captions drawn whole, and of one-digit captions?

# %%
guess_two, guess_one = ..., ...

# %% tags=["nbval-ignore-output", "skip-grading"]
n_asked = 12 if SMOKE else 200
asked = scenes(n_asked, rng(12))
scales = [1, 4] if SMOKE else [1, 2, 4]
reports = {}
for name, model in (("text pre-trained", pretrained), ("trained jointly", joint)):
    for scale in scales:
        pictures = draw(model, asked.captions, scale, rng(13))
        reports[name, scale] = adherence(pictures, asked.objects)
        if scale == 4:
            print(f"{name}, scale 4:", *(f"  {what:14} {value}" for what, value in reports[name, 4].items()), sep="\n")
number = (read(draw(pretrained, [""] * n_asked, 1, rng(14)))[0] != EMPTY).sum(1)
print("empty caption, pictures with 0, 1, 2, 3, 4 digits:", torch.bincount(number, minlength=5).tolist())
if not SMOKE:
    print("real scenes, as the judge reads them: two digits right", reader_accuracy()["whole 2"])
reveal(guess_two, round(100 * reports["trained jointly", 4]["whole 2"].value), " %", close=5)
reveal(guess_one, round(100 * reports["trained jointly", 4]["whole 1"].value), " %", close=5)

# %% tags=["nbval-ignore-output", "skip-grading"]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
for ax, what in zip(axes, ("whole 1", "whole 2")):
    for (name, colour), shift in zip(
        (("text pre-trained", "guided"), ("trained jointly", "conditional")), (0.98, 1.02)
    ):
        rows = [reports[name, scale][what] for scale in scales]
        ends = torch.tensor([[r.value - r.low, r.high - r.value] for r in rows]).T
        at = [shift * scale for scale in scales]
        ax.errorbar(at, [r.value for r in rows], ends, fmt="o-", capsize=3, color=COLOURS[colour], label=name)
    ax.set(
        xscale="log",
        xlabel="guidance scale",
        ylim=(0, 1),
        title=f"all four quadrants right: {'one digit' if what[-1] == '1' else 'two digits'}",
    )
    ax.set_xticks(scales, scales)
    ax.minorticks_off()
axes[1].axhline(len(bags) / len(pairs), color=COLOURS["data"], ls=":", label="no word order: at most")
axes[1].legend(fontsize=7)
axes[0].set_ylabel("share, with 95 % interval")
plt.show()

# %% [markdown]
# *Left: one digit. Right: two. Dotted: the most that a network without word order can reach. At scales 2 and 4 both networks are above it, intervals and all; at scale 1 they are too close to it to tell.*
#
# One might expect that a text encoder which only ever learned along with pictures stops at recognising words. It does not: both networks bind, and at scale 4 the judge found not a single binding error in either. The pre-trained one is ahead (clearly so at scale 2, with two digits), but binding is not what the other lacks. Run `confusion(pictures, asked.objects)` from `condiff_ref.adherence` (`pictures` are still the joint network's, at scale 4; rows: asked for, columns: read): most misses are fives and eights, drawn in the right place and read as some other digit.
#
# Two tests of the test: the judge misreads real scenes, too (the line on real scenes), and the pre-trained network at scale 4 is as good as that, within the intervals; and half of the data have one digit and half two, so the empty caption's pictures should, too, and nearly do. `benchmarks/text.md` compares the two networks on more captions.
#
# Then why do Stable Diffusion and Imagen *freeze* a text encoder that was trained beforehand (CLIP's on pairs of picture and text, T5 on text alone)? Our captions have 19 words, one grammar, and never lie, so that pictures alone can teach them. Of real language, text alone holds far more than captions do: Imagen's authors found that a larger text encoder helps more than a larger image network (Saharia et al. 2022).
#
# ### A caption as one vector
#
# **Predict:** we average a caption's token vectors into one and hand the pre-trained network that. What share of the digits stands in its place, in per cent?

# %%
guess_one_vector = ...


# %% tags=["nbval-ignore-output", "skip-grading"]
def draw_from_one_vector(model, captions, scale, generator):
    network, (ids, mask) = model.network, encode(captions, vocab, LENGTH)
    pooled = network.text(ids).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
    denoiser = as_denoiser(lambda xt, t: network.unet(xt, t, context=pooled), "flow", model.schedule)
    noise = torch.randn(len(captions), *model.shape, generator=generator)
    return model.decode(
        sample(euler_step(model.schedule), cfg(denoiser, model.denoiser(), scale), noise, time_grid(STEPS))
    )


few, few_objects = asked.captions[:100], asked.objects[:100]
in_place = {
    "all tokens": adherence(draw(pretrained, few, 4.0, rng(13)), few_objects)["place"],
    "one averaged vector": adherence(draw_from_one_vector(pretrained, few, 4.0, rng(13)), few_objects)["place"],
    "the caption of another": adherence(draw(pretrained, few[1:] + few[:1], 4.0, rng(13)), few_objects)["place"],
}
print(*(f"{name:23} {value}" for name, value in in_place.items()), sep="\n")
reveal(guess_one_vector, round(100 * in_place["one averaged vector"].value), " %", close=5)

# %% [markdown]
# The last row is what accident gives, and one vector does no better. There are two reasons: attention to one token says the same to all pixels, and this network has never seen such a vector. (A network *trained* on one could do better: layers that know their position can make something different of the same message at each place.)
#
# ## 8. Where the pixels look
#
# The weights $(B,h,N,L)$ can be watched while a picture is made. Average over heads, take the column of one token, and lay it out as a picture.

# %% exercise="06.6"

# %% tags=["skip-grading"]
spoken = "a large three at the top left, a large seven at the bottom right"
spoken_ids = encode([spoken], vocab, LENGTH)[0]


def watch(model, ids, scale, noise):
    """Times, pictures and attention weights along the way."""
    times = time_grid(STEPS)
    denoiser = cfg(model.denoiser(ids), model.denoiser(), scale)
    points = [noise, *trajectory(euler_step(model.schedule), denoiser, noise, times)][:-1]
    return times[:-1], points, [model.network.weights(x, t.expand(len(x)), ids) for t, x in zip(times, points)]


times, points, seen = watch(pretrained, spoken_ids, 4.0, torch.randn(1, *pretrained.shape, generator=rng(15)))
tokens = spoken.replace(",", " ,").split()
looked_at = [1, 2, 6, 7, 9, 10, 14]


def draw_attention(step):
    figure = Figure(figsize=(10, 1.9), layout="constrained")
    axes = figure.subplots(1, 1 + len(looked_at))
    show_tile(axes[0], pretrained.decode(points[int(step)]), 1, f"t = {float(times[int(step)]):.2f}")
    for ax, i in zip(axes[1:], looked_at):
        ax.imshow(token_map(seen[int(step)], i, 8, 8)[0], cmap="viridis", vmin=0, vmax=1)
        ax.set_title(tokens[i], fontsize=10)
        ax.set_axis_off()
    return figure


def describe(step):
    return f"The noisy picture at t = {float(times[int(step)]):.2f}, and for each word the pixels that look at it."


# %% tags=["nbval-ignore-output", "skip-grading"]
slider(draw_attention, list(range(0, len(times), 3)), "step", describe, start=2)

# %% [markdown]
# *Bright: where the pixels look at this word. Move the slider from noise (step 0) to the picture.* Before you go on: which word do pixels read most?
#
# Is a look inside the right quadrant chance? A map that knows nothing has a quarter of its sum in each quadrant. **Predict:** at which times is the digit word's map best inside its own quadrant, at high noise, when there is nothing to see yet, or at the end?

# %%
guess_when = ...  # "early", "late" or "always"

# %% tags=["nbval-ignore-output", "skip-grading"]
n_watched = 8 if SMOKE else 60
two = [objects for objects in scenes(4 * n_watched, rng(16)).objects if len(objects) == 2][:n_watched]
ids = encode([caption(objects) for objects in two], vocab, LENGTH)[0]
noise = torch.randn(len(two), *pretrained.shape, generator=rng(17))


def in_quadrant(weights):
    """The mean share of both digit words' maps in their own quadrants."""
    shares = []
    for which, token in ((0, 2), (1, 10)):
        heat = token_map(weights, token, 8, 8)
        for objects, one in zip(two, heat):
            top, left = 4 * (objects[which].quadrant // 2), 4 * (objects[which].quadrant % 2)
            shares.append(localisation(one[None], (top, left, top + 4, left + 4)))
    return float(torch.cat(shares).mean())


inside = {}
for name, model in (("text pre-trained", pretrained), ("trained jointly", joint)):
    times, _, all_weights = watch(model, ids, 4.0, noise)
    inside[name] = [in_quadrant(weights) for weights in all_weights]
    each = [in_quadrant(all_weights[-1][:, i : i + 1]) for i in range(all_weights[-1].shape[1])]
    of_token = torch.stack(all_weights).mean(dim=(0, 1, 2, 3))
    print(f"{name}: in the end, head by head", *(f"{x:.2f}" for x in each), end="; ")
    print(f"weight of the first digit word {of_token[2]:.2f}, of the comma {of_token[7]:.2f}")

fig, ax = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
for (name, values), colour in zip(inside.items(), ("guided", "conditional")):
    ax.plot(times, values, "o-", color=COLOURS[colour], label=name)
ax.axhline(0.25, color=COLOURS["data"], ls=":", label="chance")
ax.set(xlabel="t (1 = noise)", ylabel="share inside its quadrant", ylim=(0, 1), title="attention to digit words")
ax.legend(fontsize=8)
plt.show()
early, late = inside["text pre-trained"][1], inside["text pre-trained"][-1]
reveal(guess_when, "always" if abs(early - late) < 0.1 else "early" if early > late else "late")

# %% [markdown]
# *Each dot is the mean over the digit words of many captions, all heads averaged. Both networks look into the right quadrant far more than chance would, at every t.* At $t\approx1$ there is no picture yet: there it comes from the text and from the pixels' positions alone.
#
# Now the printed lines. Heads differ: in the pre-trained network one looks into the digit's quadrant little more than chance would, and the average hides it. And in the pre-trained network the comma, which means nothing, gets more weight than a digit (in the other it does not): weights add up to 1, so pixels of empty quadrants must read something, too; and every vector has been through the text encoder, and may carry what other words said. So a map shows where a *vector* is read, which is some evidence of binding, and no proof of what it says, nor that the network draws it. For that one has to change a word and look at the picture.
#
# ## 9. Change a word
#
# **The token-swap test.** Draw a caption and its swap, with the two digits exchanged, *from the same noise*; count a pair only if both pictures are right. A network that ignores order draws the same picture twice and scores 0. The other half of this exercise belongs to training: guidance needs an empty caption, so captions are dropped as a whole and example by example, as labels were in lesson 02. (Not word by word: a caption that lost "three" is still a condition.)

# %% exercise="06.7"

# %% [markdown]
# **Predict** both networks' scores on two-digit captions, in per cent:

# %%
guess_swap, guess_swap_joint = ..., ...


# %% tags=["nbval-ignore-output", "skip-grading"]
n_pairs = 8 if SMOKE else 60
two = [objects for objects in scenes(4 * n_pairs, rng(18)).objects if len({o.digit for o in objects}) == 2][:n_pairs]
one_way, other_way = ([caption(objects) for objects in some] for some in (two, swap(two)))
objects_of = dict(zip(one_way + other_way, [*two, *swap(two)]))


def all_right(pictures, captions):
    return (read(pictures)[0] == by_quadrant([objects_of[c] for c in captions])[0]).all(dim=1)


scores = {}
for name, model in (("text pre-trained", pretrained), ("trained jointly", joint)):
    scores[name] = token_swap(lambda c, g, m=model: draw(m, c, 4.0, g), all_right, one_way, other_way, 19)
print("both pictures of a pair right:", {name: round(score, 2) for name, score in scores.items()}, f"({n_pairs} pairs)")
reveal(guess_swap, round(100 * scores["text pre-trained"]), " %", close=10)
reveal(guess_swap_joint, round(100 * scores["trained jointly"]), " %", close=10)

fig, axes = plt.subplots(2, 2, figsize=(7.5, 3.2), layout="constrained")
for column, (name, model) in zip(axes.T, (("text pre-trained", pretrained), ("trained jointly", joint))):
    for ax, captions, which in zip(column, (one_way, other_way), ("caption", "digits exchanged")):
        show_scenes(ax, draw(model, captions[:6], 4.0, rng(19)), 6, f"{name}: {which}")
plt.show()
print(*one_way[:6], sep="\n")

# %% [markdown]
# *Above and below: the same noise, the digit words exchanged.* In most pairs the digits change places, in both networks: neither ignores the order. A pair needs two whole pictures, so the score lies below the share of whole ones; and on 60 pairs a score of 0.8 has a standard error of 0.05.
#
# ### From the museum of real bugs: the mask that nobody read
#
# Issue #235 of lucidrains' DALLE2-pytorch (2022), about its diffusion prior. To train for guidance, the code drew a mask of what was to be dropped, and a reader noticed that it did not reach the tokens. The author confirmed that it was not used, and changed to *null tokens*, which replace what is dropped. Nothing had crashed.
#
# **Predict:** what does guidance at $s=8$ do to the pictures of a network whose "dropped" text is still there?

# %%
guess_museum = ...  # "nothing", "too much" or "noise"


# %% tags=["nbval-check-output", "skip-grading"]
def forgetful(model, captions, keep):
    """Meant to be unconditional where `keep` is False."""
    ids, mask = encode(captions, vocab, LENGTH)
    mask = mask & keep[:, None]  # drawn up, and never handed on
    return as_denoiser(lambda xt, t: model.network(xt, t, label=ids), "flow", model.schedule)


noise = torch.randn(2, *pretrained.shape, generator=rng(20))
conditional, dropped = (forgetful(pretrained, wanted[:2], torch.tensor([keep] * 2)) for keep in (True, False))
drawn = []
for scale in (1.0, 8.0):
    drawn.append(sample(euler_step(pretrained.schedule), cfg(conditional, dropped, scale), noise, time_grid(8)))
print("s = 1 and s = 8 give the same pictures, to the bit:", torch.equal(*drawn))

# %% tags=["nbval-check-output"]
nobody = torch.zeros(1, 3, dtype=torch.bool)
print(
    "nothing but NaN if the mask hides every token:",
    bool(attention(normal(1, 2, 4), normal(1, 3, 4), normal(1, 3, 4), nobody).isnan().all()),
)

# %%
reveal(guess_museum, "nothing")

# %% [markdown]
# Both branches of guidance are the same, their difference is 0, and so the scale does nothing. Two tests find it: *drop everything, and the answer must not depend on the caption*; *guided at 1 and at 8 must differ*. The second cell shows why masking all tokens would not have been a repair: a softmax over nothing is $0/0$. The empty caption must be a token, and ours is.
#
# ## 10. Write the test
#
# Softmax over the wrong axis, no root, a mask that is ignored, multiplied or inverted: each has the right shape, and each trains. Write the test that tells them apart.

# %% exercise="06.8"

# %% [markdown]
# ## 11. What it costs, what to keep
#
# **Cost.** One evaluation of this course's text-to-image network, as counted by PyTorch:

# %% tags=["nbval-check-output", "skip-grading"]
network, ids = pretrained.network, spoken_ids
x, t = torch.zeros(1, *pretrained.shape), torch.full((1,), 0.5)
context = network.text(ids)
everything = flops_of(lambda: network(x, t, label=ids))
reading = flops_of(lambda: network.text(ids))
words_only = flops_of(lambda: network.unet.attention(torch.zeros(1, network.unet.widths[-1], 8, 8), context, ids != 0))
print(f"{everything / 1e6:.1f} MFLOP, of these", end=" ")
print(f"cross-attention {words_only / everything:.1%}, text {reading / everything:.1%}")

# %% [markdown]
# The text encoder need only run once per caption, not at every step; the same holds for keys and values. Guidance doubles the rest, as ever.
#
# **Keep.**
# - Attention is a mixture: each pixel averages the words' values with weights that add up to 1. The softmax runs over the *words*.
# - Masked means $-\infty$. The empty caption is a token, not a row of pads.
# - The core costs $4NLC$ FLOPs, whatever the heads; the matrix has $hNL$ entries. Say whether you count MACs or FLOPs, MB or MiB.
# - Cross-attention brings text to pixels and nothing from pixel to pixel: it cannot replace self-attention.
# - The online softmax saves storage, not arithmetic.
# - Only captions with two objects test binding. The token-swap test shows it; an attention map shows where a vector is read, not what it says. Where captions are simple, a jointly trained text encoder learns to bind as well.
#
# ## Questions
#
# 1. Cross-attention at $64\times64$, $L=77$, one head of width 64, 32-bit numbers: bytes of the matrix, FLOPs of the core? How do both grow with resolution, and what would you change for pictures of four times the side?
# ### BEGIN SOLUTION
# *1,261,568 bytes; 80,740,352 FLOPs (40,370,176 multiply-adds). Both are proportional to $N=R^2$: 16 times as much at four times the side, while self-attention grows 256-fold and is the one to treat: work on latents of the old size, or never store the matrix; self-attention in windows is another way.*
# ### END SOLUTION
# 2. A lecture proposes CLIP's *image* embedding in place of the text. What is preserved, what is lost, and does the network remain as it is?
# ### BEGIN SOLUTION
# *Preserved: what captions tend to say about a picture, as far as one vector holds it: kinds of objects, style. Lost: pixels, exact places, textures, and much of what is bound to what. The network does not remain as it is: attention to one token gives every pixel the same, and image vectors are unlike all that it has seen. It has to be trained for them.*
# ### END SOLUTION
# 3. Can a network with cross-attention in every layer, and neither convolutions nor self-attention, draw one large digit?
# ### BEGIN SOLUTION
# *No: given the text, each pixel would be made from its own noise alone, and neighbouring pixels could not agree which seven they draw. (Each could still know its own mean.)*
# ### END SOLUTION
# 4. An attention map of "red" is bright on the cube. Is the cube red?
# ### BEGIN SOLUTION
# *Perhaps. The map says where the value of "red" was read, not what later layers made of it, nor whether the word's vector was bound to the cube. Change the word and look at the picture.*
# ### END SOLUTION
# 5. Why is a bag of words limited to 46 % of our arrangements of two digits, and to 50 % if two different digits may be exchanged and all else is known?
# ### BEGIN SOLUTION
# *It gives the same answer to all arrangements with the same bag, and is right on one of them at most: 275 bags (55 pairs of digits; 5 of places, as the two diagonals have the same words) for 600 arrangements. If the rest is known, two share a bag.*
# ### END SOLUTION
#
# **Sources.** Vaswani et al. 2017 (attention, heads); Rombach et al. 2022 (latents, cross-attention; counts of blocks from the public code of Stable Diffusion 1); Ho et al. 2020; Dhariwal & Nichol 2021; Esser et al. 2024 (Stable Diffusion 3); Radford et al. 2021 (CLIP); Saharia et al. 2022 (Imagen); Ramesh et al. 2022 (DALL-E 2); Ye et al. 2023 (IP-Adapter); Liang et al. 2022 (modality gap); Milakov & Gimelshein 2018, Dao et al. 2022 (online softmax, FlashAttention); github.com/lucidrains/DALLE2-pytorch/issues/235; github.com/huggingface/diffusers/pull/2634. All numbers about costs and captions are computed in the cells above.
