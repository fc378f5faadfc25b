"""Entries 1 to 4, 8, 9 and 11 to 13: right answers, written another way."""

from textwrap import indent

from variations_common import answered

from notebooks import right, text

HEADS = text("""
    class Heads(nn.Module):
        def __init__(self, dim, heads):
            super().__init__()
            self.heads = heads
            self.to_q = nn.Linear(dim, dim, bias=False)
            self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
            self.to_out = nn.Linear(dim, dim)

        def forward(self, x):
            q, (k, v) = self.to_q(x), self.to_kv(x).chunk(2, dim=-1)
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
            return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
""")
NORMS = text("""
    self.before = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
    self.register_buffer('one', torch.ones(()), persistent=False)
""")
BUILD = text("""
    def build(self, dim):
        self.table = nn.Embedding(num_embeddings=self.null + 1, embedding_dim=dim)
""")
FINALLY = text("""
    try:
        return x
    finally:
        model.train(training)
""")
SHARE = text("""
    from typing import NamedTuple

    class Share(NamedTuple):
        acc: float
        lo: float
        hi: float
""")
Q = "pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps"

NAMES = (
    answered(
        "1",
        "other argument names",
        {
            "01.2": text("""
        def q_sample(image, time, noise, table):
            root = pad(table[time].sqrt(), image)
            return root * image + pad((1 - table[time]).sqrt(), image) * noise
    """)
        },
        fast=True,
    ),
    answered(
        "1",
        "further arguments with defaults",
        {
            "01.2": text(f"""
        def q_sample(x0, t, eps, abar, device=None, *, verbose=False, **options):
            return {Q}
    """)
        },
    ),
    answered(
        "1",
        "arguments as a list",
        {
            "01.2": text(f"""
        def q_sample(*args):
            x0, t, eps, abar = args
            return {Q}
    """)
        },
    ),
    answered(
        "1",
        "positional only",
        {
            "01.2": text(f"""
        def q_sample(x0, t, eps, abar, /):
            return {Q}
    """)
        },
    ),
    answered("1", "lambda", {"01.2": f"q_sample = lambda x0, t, eps, abar: {Q}", "01.3": None}, fast=True),
    answered(
        "1",
        "partial",
        {
            "01.2": text(f"""
        from functools import partial

        def noise(kind, x0, t, eps, abar):
            return {Q}

        q_sample = partial(noise, 'ddpm')
    """)
        },
    ),
    answered(
        "1",
        "an object that is called",
        {
            "01.2": text(f"""
        class QSample:
            def __call__(self, x0, t, eps, abar):
                return {Q}

        q_sample = QSample()
    """)
        },
    ),
    answered(
        "1",
        "a bound method",
        {
            "01.2": text(f"""
        class Process:
            def sample(self, x0, t, eps, abar):
                return {Q}

        q_sample = Process().sample
    """)
        },
    ),
    answered(
        "1",
        "a static method",
        {
            "01.2": text(f"""
        class Process:
            @staticmethod
            def sample(x0, t, eps, abar):
                return {Q}

        q_sample = Process.sample
    """)
        },
    ),
    answered(
        "1",
        "a module that is called",
        {
            "01.2": text(f"""
        class QSample(nn.Module):
            def forward(self, x0, t, eps, abar):
                return {Q}

        q_sample = QSample()
    """)
        },
    ),
    answered(
        "1",
        "without gradients",
        {
            "01.2": text(f"""
        @torch.no_grad()
        def q_sample(x0, t, eps, abar):
            return {Q}
    """)
        },
        fast=True,
    ),
    answered(
        "1",
        "in inference mode",
        {
            "01.2": text(f"""
        @torch.inference_mode()
        def q_sample(x0, t, eps, abar):
            return {Q}
    """)
        },
    ),
    answered(
        "1",
        "other decorators",
        {
            "01.2": text(f"""
        import functools, typing

        def timed(f):
            @functools.wraps(f)
            def inner(*args, **options):
                return f(*args, **options)
            return inner

        @timed
        @typing.no_type_check
        @functools.singledispatch
        def q_sample(x0, t, eps, abar):
            return {Q}
    """)
        },
    ),
    answered(
        "1",
        "jaxtyping",
        {
            "01.2": text(f"""
        from jaxtyping import Float, Int, jaxtyped

        @jaxtyped(typechecker=None)
        def q_sample(
            x0: Float[Tensor, "b *d"], t: Int[Tensor, "b"], eps: Float[Tensor, "b *d"], abar: Float[Tensor, "T"]
        ) -> Float[Tensor, "b *d"]:
            return {Q}
    """)
        },
    ),
    answered(
        "1",
        "a function made by another",
        {
            "01.2": text(f"""
        def make(root):
            def inner(x0, t, eps, abar):
                return {Q}
            return inner

        q_sample = make('sqrt')
    """)
        },
    ),
    answered(
        "1",
        "a class made by a function",
        {
            "08.6": "def make():\n"
            + "\n".join(f"    {line}" for line in right("08.6").splitlines())
            + "\n    return LabelEmbedder\n\nLabelEmbedder = make()"
        },
    ),
)

OPERATIONS = (
    answered(
        "2",
        "einsum",
        {
            "01.2": text("""
        def q_sample(x0, t, eps, abar):
            a = abar[t]
            return torch.einsum('b,b...->b...', a.sqrt(), x0) + torch.einsum('b,b...->b...', (1 - a).sqrt(), eps)
    """)
        },
    ),
    answered(
        "2",
        "einops",
        {
            "08.1": text("""
        from einops import rearrange

        def patchify(x, patch):
            if x.shape[2] % patch or x.shape[3] % patch:
                raise ValueError('patches do not tile')
            return rearrange(x, 'b c (h p) (w q) -> b (h w) (p q c)', p=patch, q=patch)

        def unpatchify(tokens, patch, height, width):
            return rearrange(tokens, 'b (h w) (p q c) -> b c (h p) (w q)', p=patch, q=patch, h=height // patch)
    """)
        },
        needs="einops",
    ),
    answered(
        "2",
        "matmul",
        {
            "01.5": text("""
        def posterior_mean_eps(x, x0s, t, abar):
            a, sigma = abar[t].sqrt(), (1 - abar[t]).sqrt()
            eps = (x - a * x0s) / sigma
            logits = -0.5 * (eps @ eps.T).diagonal()
            weights = (logits - logits.logsumexp(0)).exp()
            return torch.matmul(weights[None], eps).squeeze(0)
    """)
        },
    ),
    answered(
        "2",
        "axes by None",
        {
            "01.2": text("""
        def q_sample(x0, t, eps, abar):
            a = abar[t][(...,) + (None,) * (x0.ndim - 1)]
            return a.sqrt() * x0 + (1 - a).sqrt() * eps
    """)
        },
    ),
    answered(
        "2",
        "axes by view and unsqueeze",
        {
            "01.2": text("""
        def q_sample(x0, t, eps, abar):
            a = abar[t].view(-1, *[1] * (x0.dim() - 1))
            b = 1 - abar.index_select(0, t)
            while b.dim() < x0.dim():
                b = b.unsqueeze(-1)
            return torch.addcmul(torch.sqrt(a) * x0, torch.sqrt(b), eps)
    """)
        },
    ),
    answered(
        "2",
        "movedim",
        {
            "01.2": text("""
        def q_sample(x0, t, eps, abar):
            a = abar[t]
            return (a.sqrt() * x0.movedim(0, -1) + (1 - a).sqrt() * eps.movedim(0, -1)).movedim(-1, 0)
    """)
        },
    ),
    answered(
        "2",
        "unfold and fold",
        {
            "08.1": text("""
        def patchify(x, patch):
            b, c, h, w = x.shape
            if h % patch or w % patch:
                raise ValueError(f'{h} x {w} is no multiple of {patch}')
            cut = F.unfold(x, patch, stride=patch).view(b, c, patch * patch, -1)
            return cut.permute(0, 3, 2, 1).flatten(2)

        def unpatchify(tokens, patch, height, width):
            b, n, _ = tokens.shape
            cut = tokens.view(b, n, patch * patch, -1).permute(0, 3, 2, 1).flatten(1, 2)
            return F.fold(cut, (height, width), patch, stride=patch)
    """)
        },
    ),
    answered(
        "2",
        "attention of its own",
        {"08.3": HEADS + "\n\n\n" + right("08.3").replace("Attention(dim, heads)\n", "Heads(dim, heads)\n")},
    ),
)

PRECISION = (
    answered(
        "3",
        "float64 inside",
        {
            "01.2": text("""
        def q_sample(x0, t, eps, abar):
            a = pad(abar[t].double(), x0)
            return (a.sqrt() * x0.double() + (1 - a).sqrt() * eps.double()).to(x0.dtype)
    """)
        },
    ),
    answered(
        "3",
        "in logarithms",
        {
            "01.1": text("""
        def make_abar(T, kind):
            if kind == 'linear':
                b = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
                return F.pad(torch.log1p(-b).cumsum(0), (1, 0)).exp()
            t = torch.arange(T + 1, dtype=torch.float64)
            f = (2 * torch.log(torch.cos((t / T + 0.008) / 1.008 * math.pi / 2)))
            return (f - f[0]).exp()
    """)
        },
    ),
    answered(
        "3",
        "an equal form",
        {
            "01.3": text("""
        def cond_score(xt, x0, t, abar):
            a = pad(abar[t], xt)
            return (a.sqrt() * x0 - xt) / (1 - a)

        def score_from_eps(eps, t, abar):
            return eps * pad(-(1 - abar[t]).rsqrt(), eps)
    """)
        },
    ),
    answered(
        "3",
        "by numpy",
        {
            "01.1": text("""
        import numpy as np

        def make_abar(T, kind):
            if kind == 'linear':
                return torch.from_numpy(np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, T))]))
            f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
            return torch.as_tensor(f / f[0])
    """)
        },
    ),
    answered(
        "3",
        "by autograd",
        {
            "01.3": text("""
        def cond_score(xt, x0, t, abar):
            with torch.enable_grad():
                x = xt.detach().clone().requires_grad_()
                a = pad(abar[t], x)
                (-(x - a.sqrt() * x0) ** 2 / (2 * (1 - a))).sum().backward()
            return x.grad

        def score_from_eps(eps, t, abar):
            return -eps / pad((1 - abar[t]).sqrt(), eps)
    """)
        },
    ),
)

RESULTS = (
    answered(
        "4",
        "a transposed view",
        {
            "01.2": text(f"""
        def q_sample(x0, t, eps, abar):
            out = {Q}
            return out.movedim(0, -1).contiguous().movedim(-1, 0)
    """)
        },
        fast=True,
    ),
    answered(
        "4",
        "every second entry",
        {
            "01.2": text(f"""
        def q_sample(x0, t, eps, abar):
            out = {Q}
            return torch.stack([out, out], dim=-1)[..., 0]
    """)
        },
    ),
    answered(
        "4",
        "a negative view",
        {
            "01.2": text(f"""
        def q_sample(x0, t, eps, abar):
            out = {Q}
            return torch.complex(torch.zeros_like(out), out).conj().imag.neg() if out.dtype == torch.float64 else out
    """)
        },
    ),
    answered(
        "4",
        "moved to the processor",
        {
            "01.2": text(f"""
        def q_sample(x0, t, eps, abar):
            return ({Q}).to('cpu').to(x0.device)
    """)
        },
    ),
    answered(
        "4",
        "a list of values",
        {
            "02.7": right("02.7").replace(
                "return acc, centre - half, centre + half", "return [acc, centre - half, centre + half]"
            )
        },
    ),
    answered(
        "4",
        "numbers as tensors",
        {
            "02.7": right("02.7").replace(
                "return acc, centre - half, centre + half",
                "return tuple(torch.tensor([acc, centre - half, centre + half], dtype=torch.float64))",
            )
        },
    ),
    answered(
        "4",
        "a named tuple",
        {
            "02.7": SHARE
            + "\n\n\n"
            + right("02.7").replace(
                "return acc, centre - half, centre + half", "return Share(acc, centre - half, centre + half)"
            )
        },
    ),
    answered(
        "4",
        "a number of numpy",
        {
            "02.8": right("02.8").replace(
                "return nats.item() / math.log(2)",
                text("""
        import numpy as np
            return np.float64(nats.item() / math.log(2))
    """),
            )
        },
    ),
    answered(
        "4",
        "a buffer that is used again",
        {
            "01.2": text(f"""
        buffers = {{}}

        def q_sample(x0, t, eps, abar):
            out = buffers.setdefault((x0.shape, x0.dtype), torch.empty_like(x0))
            out.copy_({Q})
            return out.clone()
    """)
        },
    ),
)

SYNTAX = (
    answered(
        "8",
        "type hints and a data class",
        {
            "01.2": text("""
        from dataclasses import dataclass
        from typing import Annotated, Optional

        @dataclass(frozen=True, slots=True)
        class Scales:
            a: Tensor
            sigma: Tensor

            @classmethod
            def at(cls, t: Tensor, abar: Tensor, like: Tensor) -> 'Scales':
                return cls(pad(abar[t].sqrt(), like), pad((1 - abar[t]).sqrt(), like))

        def q_sample(
            x0: Tensor, t: Tensor, eps: Tensor, abar: Annotated[Tensor, 'table'], note: Optional[str] = None
        ) -> Tensor:
            scales = Scales.at(t, abar, x0)
            return scales.a * x0 + scales.sigma * eps
    """)
        },
    ),
    answered(
        "8",
        "walrus match and f-strings",
        {
            "01.1": text("""
        def make_abar(T, kind):
            match kind:
                case 'linear':
                    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
                    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
                case 'cosine':
                    t = torch.arange(T + 1, dtype=torch.float64)
                    if (f := torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2) is not None:
                        return f / f[0]
                case other:
                    raise ValueError(f'{other=} is no {kind!r}')
    """)
        },
        fast=True,
    ),
    answered(
        "8",
        "annotations from the future",
        {
            "01.2": text(f"""
        from __future__ import annotations

        def q_sample(x0: Nowhere, t: Tensor, eps: list[Undefined], abar) -> Tensor | None:
            return {Q}
    """),
            "01.3": None,
        },
    ),
    answered(
        "8",
        "Greek names",
        {
            "01.2": text("""
        def q_sample(x0, t, ε, ᾱ):
            α̂, σ = pad(ᾱ[t].sqrt(), x0), pad((1 - ᾱ[t]).sqrt(), x0)
            return α̂ * x0 + σ * ε
    """).replace("α̂", "α")
        },
        fast=True,
    ),
    answered(
        "8",
        "a generator inside",
        {
            "08.5": text("""
        def count_params(dim, depth, patch, channels, classes):
            def parts():
                yield (patch**2 * channels + 1) * dim
                yield (256 + 1) * dim + (dim + 1) * dim
                yield (classes + 1) * dim
                for _ in range(depth):
                    yield 4 * (dim + 1) * dim + (dim + 1) * 4 * dim + (4 * dim + 1) * dim + (dim + 1) * 6 * dim
                yield (dim + 1) * 2 * dim + (dim + 1) * 2 * patch**2 * channels
            return sum(parts())
    """)
        },
    ),
    answered("8", "tabs", {"01.2": right("01.2").replace("    ", "\t")}),
    answered(
        "8",
        "Windows line ends",
        {"01.2": right("01.2").replace("\n", "\r\n"), "01.3": right("01.3").replace("\n", "\r\n")},
    ),
)

COMPILED = (
    answered(
        "9",
        "torch.compile",
        {
            "01.2": text(f"""
        @torch.compile
        def q_sample(x0, t, eps, abar):
            return {Q}
    """)
        },
        fast=True,
    ),
    answered(
        "9",
        "a scripted function",
        {
            "01.2": text("""
        @torch.jit.script
        def mix(x0: Tensor, eps: Tensor, a: Tensor) -> Tensor:
            return a.sqrt() * x0 + (1 - a).sqrt() * eps

        def q_sample(x0, t, eps, abar):
            return mix(x0, eps, pad(abar[t], x0))
    """)
        },
    ),
    answered(
        "9",
        "vmap",
        {
            "01.2": text("""
        def one(x, a, e):
            return a.sqrt() * x + (1 - a).sqrt() * e

        def q_sample(x0, t, eps, abar):
            return torch.func.vmap(one)(x0, abar[t], eps)
    """)
        },
    ),
    answered(
        "9",
        "torch.func.grad",
        {
            "01.3": text("""
        def log_q(x, x0, a):
            return -((x - a.sqrt() * x0) ** 2).sum() / (2 * (1 - a))

        def cond_score(xt, x0, t, abar):
            return torch.func.vmap(torch.func.grad(log_q))(xt, x0, abar[t])

        def score_from_eps(eps, t, abar):
            return -eps / pad((1 - abar[t]).sqrt(), eps)
    """)
        },
    ),
    answered(
        "9",
        "autocast switched off",
        {
            "01.2": text(f"""
        def q_sample(x0, t, eps, abar):
            with torch.autocast('cpu', enabled=False):
                return {Q}
    """)
        },
    ),
)

CHANCE = (
    answered(
        "11",
        "seeds everywhere",
        {
            "01.2": text(f"""
        torch.manual_seed(42)
        import random
        import numpy as np
        random.seed(0)
        np.random.seed(0)

        def q_sample(x0, t, eps, abar):
            torch.manual_seed(7)
            np.random.seed(1)
            return {Q}
    """)
        },
    ),
    answered(
        "11",
        "labels one by one",
        {
            "02.3": text("""
        def drop_labels(y, p, null, gen):
            return torch.stack([torch.where(torch.rand((), generator=gen) < p, null, label) for label in y])
    """)
        },
    ),
    answered(
        "11",
        "bernoulli",
        {
            "02.3": text("""
        def drop_labels(y, p, null, gen):
            mask = torch.empty(y.shape).bernoulli_(p, generator=gen).bool()
            return y.masked_fill(mask.to(y.device), null)
    """)
        },
    ),
    answered(
        "11",
        "numbers of its own in a test",
        {
            "01.9": right("01.9").replace(
                "torch.randn(2, 4, 3, dtype=torch.float64)",
                "torch.randn(2, 4, 3, dtype=torch.float64, generator=Generator().manual_seed(3))",
            ),
            "01.8": None,
        },
    ),
)

MODULES = (
    answered(
        "12",
        "parts in another order",
        {
            "08.3": right("08.3")
            .replace("        self.attention = Attention(dim, heads)\n", "")
            .replace(
                "        nn.init.zeros_(self.modulation.weight)\n",
                "        self.attention = Attention(dim, heads)\n        nn.init.zeros_(self.modulation.weight)\n",
            )
        },
    ),
    answered(
        "12",
        "a norm without weights and a buffer",
        {
            "08.3": right("08.3")
            .replace(
                "        super().__init__()\n",
                "        super().__init__()\n" + indent(NORMS, "        ") + "\n",
                1,
            )
            .replace("norm = F.layer_norm(x, x.shape[-1:], eps=1e-6)", "norm = self.one * self.before(x)")
        },
        fast=True,
    ),
    answered(
        "12",
        "zeros by data",
        {
            "08.3": right("08.3")
            .replace("nn.init.zeros_(self.modulation.weight)", "self.modulation.weight.data.zero_()")
            .replace("nn.init.zeros_(self.modulation.bias)", "self.modulation.bias.data.fill_(0.0)")
        },
    ),
    answered(
        "12",
        "parts made by a method",
        {
            "08.6": right("08.6").replace(
                "        self.table = nn.Embedding(classes + 1, dim)",
                "        self.build(dim)\n\n" + indent(BUILD, "    "),
            )
        },
    ),
    answered(
        "12",
        "from a class of its own",
        {
            "08.6": "class Base(nn.Module):\n    def extra_repr(self):\n        return 'mine'\n\n\n"
            + right("08.6").replace("(nn.Module)", "(Base)")
        },
    ),
    answered(
        "12",
        "an average by state dicts",
        {
            "02.5": text("""
        class EMA:
            def __init__(self, model, decay):
                self.decay, self.model = decay, deepcopy(model)
                self.model.eval()
                for parameter in self.model.parameters():
                    parameter.requires_grad = False

            def update(self, model):
                learnt = dict(model.named_parameters())
                state, new = self.model.state_dict(), model.state_dict()
                for n in learnt:
                    new[n] = torch.lerp(new[n], state[n], self.decay)
                self.model.load_state_dict(new)
    """)
        },
    ),
)

MODELS = (
    answered(
        "13",
        "the model by keyword",
        {
            "02.6": right("02.6").replace(
                "model(x, torch.full_like(y, t), y)", "model.forward(x, torch.full_like(y, t), y)"
            )
        },
    ),
    answered(
        "13",
        "t expanded",
        {"02.6": right("02.6").replace("torch.full_like(y, t)", "torch.tensor([t]).expand(len(y))")},
        fast=True,
    ),
    answered(
        "13",
        "t repeated from a tensor",
        {"02.6": right("02.6").replace("torch.full_like(y, t)", "torch.ones(len(y), dtype=torch.int64) * t")},
    ),
    answered(
        "13",
        "the mode put back by finally",
        {
            "02.6": right("02.6").replace("    model.train(training)\n    return x", indent(FINALLY, "    ")),
        },
    ),
    answered(
        "13",
        "a loss by hand",
        {
            "01.6": text("""
        def dsm_loss(model, x0, t, eps, abar):
            xt = pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps
            return (model(xt, t) - eps).square().mean()
    """)
        },
    ),
    answered(
        "13",
        "a step with set_to_none",
        {
            "02.4": right("02.4")
            .replace("opt.zero_grad()", "model.zero_grad(set_to_none=True)")
            .replace("loss.item()", "float(loss.detach())")
        },
    ),
)

RECORDS = (*NAMES, *OPERATIONS, *PRECISION, *RESULTS, *SYNTAX, *COMPILED, *CHANCE, *MODULES, *MODELS)
