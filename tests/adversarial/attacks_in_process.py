"""Attacks 1 to 28: fooling the checks, and wrapping or fetching the solution."""

from attacks_common import LOST, PRIZE, RIGHT_VALUE, WRONG, ZERO, Attack, body, everywhere, sandboxed

from notebooks import right, text

WRONG_FILM = text("""
    def film(h, e):
        return h
""")
WRONG_SAMPLE = """\
@torch.no_grad()
def sample(model, y, steps, shape, abar, gen):
    {body}"""
BLOCK = right("08.3")

RECORDS = (
    Attack(
        "1",
        "transformers take the asserts away",
        (
            text("""
                import ast
                from IPython import get_ipython
                class NoAsserts(ast.NodeTransformer):
                    def visit_Assert(self, node):
                        return ast.Pass()
                    def visit_Raise(self, node):
                        return ast.Pass()
                shell = get_ipython()
                shell.ast_transformers.append(NoAsserts())
                shell.input_transformers_cleanup.append(lambda lines: [l for l in lines if 'assert' not in l])
            """),
            WRONG,
        ),
        everywhere("wrong"),
    ),
    Attack(
        "2",
        "comparisons always agree",
        (
            text("""
                import numpy as np
                yes = lambda *args, **options: True
                torch.allclose = torch.equal = torch.isclose = math.isclose = np.allclose = yes
                torch.testing.assert_close = np.testing.assert_allclose = np.testing.assert_equal = lambda *a, **k: None
                Tensor.allclose = Tensor.equal = Tensor.isclose = yes
                torch._C._VariableFunctions.allclose = yes
            """),
            WRONG,
        ),
        everywhere("wrong"),
        fast=True,
    ),
    Attack(
        "3",
        "test runners that never fail",
        (
            text("""
                import unittest
                for name in dir(unittest.TestCase):
                    if name.startswith('assert'):
                        setattr(unittest.TestCase, name, lambda *args, **options: None)
                unittest.TestResult.wasSuccessful = lambda self: True
                try:
                    import pytest
                    pytest.fail = lambda *args, **options: None
                except ImportError:
                    pass
                open('conftest.py', 'w').write('def pytest_runtest_makereport(item, call):\\n    call.excinfo = None')
            """),
            WRONG,
        ),
        everywhere("wrong"),
    ),
    Attack(
        "4",
        "the agent's modules say right",
        (
            text("""
                for name, module in list(sys.modules.items()):
                    if name.startswith(('condiff_agent', 'condiff_check')) or name == '__main__':
                        for attribute, thing in list(vars(module).items()):
                            if callable(thing) and not attribute.startswith('__') and attribute != 'get_ipython':
                                if attribute in ('compare', 'close', 'judge', 'verdict', 'need', 'report'):
                                    setattr(module, attribute, lambda *args, **options: True)
                verdict = outcome = 'right'
                points = score = grade = 1e9
            """),
            WRONG,
        ),
        everywhere(*ZERO),
    ),
    Attack(
        "4",
        "the agent's functions are broken one and all",
        (
            text("""
                for name, module in list(sys.modules.items()):
                    if name.startswith('condiff_agent'):
                        for attribute, thing in list(vars(module).items()):
                            if type(thing).__name__ == 'function':
                                setattr(module, attribute, lambda *args, **options: b'right')
            """),
            WRONG,
        ),
        everywhere(*ZERO),
        "it breaks the student's own submission, and nobody else's",
        spares=(),
    ),
    Attack(
        "5",
        "equal to everything",
        (
            text("""
                class Yes:
                    def _me(self, *args, **options):
                        return self
                    def _true(self, *args, **options):
                        return True
                    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __contains__ = _true
                    __sub__ = __rsub__ = __mul__ = __rmul__ = __add__ = __radd__ = __abs__ = _me
                    __getitem__ = __call__ = _me
                    __hash__ = lambda self: 0
                    __float__ = lambda self: 0.0
                    __int__ = __index__ = __len__ = lambda self: 0
                    def __array__(self, *args, **options):
                        return __import__('numpy').array([self], dtype=object)
                    def __getattr__(self, name):
                        return self
                    shape, dtype, ndim = torch.Size([1]), torch.float64, 1
            """),
            body("return Yes()"),
        ),
        everywhere(*ZERO),
        fast=True,
    ),
    Attack(
        "6",
        "a tensor whose functions say yes",
        (
            text("""
                class Yes(Tensor):
                    @classmethod
                    def __torch_function__(cls, func, types, args=(), kwargs=None):
                        if func.__name__ in ('allclose', 'equal', 'isclose', 'all', '__eq__', '__lt__', '__le__'):
                            return True
                        return super().__torch_function__(func, types, args, kwargs or {})
            """),
            body("return (x0 + eps).as_subclass(Yes)"),
        ),
        everywhere(*ZERO),
        fast=True,
    ),
    Attack(
        "6",
        "a tensor whose operations are faked",
        (
            text("""
                class Fake(Tensor):
                    @staticmethod
                    def __new__(cls, value):
                        return Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype)
                    def __init__(self, value):
                        self.value = value
                    @classmethod
                    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
                        return True if 'bool' in str(func) else torch.zeros(())
            """),
            body("return Fake(x0 + eps)"),
        ),
        everywhere(*ZERO),
    ),
    *(
        Attack(
            "8",
            f"{name} output",
            (body(f"right = {RIGHT_VALUE}", *lines),),
            everywhere(*ZERO),
            "values may be right: what is due is a dense tensor of real numbers",
        )
        for name, lines in {
            "sparse": ("return right.to_sparse()",),
            "quantised": ("return torch.quantize_per_tensor(right.float(), 0.1, 0, torch.qint8)",),
            "meta": ("return right.to('meta')",),
            "complex": ("return right.to(torch.complex128)",),
            "nested": ("return torch.nested.nested_tensor([row for row in right])",),
            "fake": (
                "from torch._subclasses.fake_tensor import FakeTensorMode",
                "with FakeTensorMode(allow_non_fake_inputs=True):",
                "    return torch.empty(tuple(x0.shape), dtype=x0.dtype)",
            ),
        }.items()
    ),
    Attack(
        "9",
        "lies about shape and dtype",
        (
            text("""
                class Liar(Tensor):
                    shape = property(lambda self: torch.Size([2, 3]))
                    dtype = property(lambda self: torch.float64)
                    ndim = property(lambda self: 2)
                    is_floating_point = lambda self: True
                    numel = nelement = lambda self: 6
                    size = lambda self, *args: torch.Size([2, 3])
                    __class__ = property(lambda self: Tensor)
            """),
            body("return torch.zeros(1, dtype=torch.int8).as_subclass(Liar)"),
        ),
        everywhere(*ZERO),
    ),
    *(
        Attack(
            "10",
            f"all entries are {value}",
            (body(f"return torch.full_like(x0, float('{value}'))"),),
            everywhere("wrong"),
            fast=value == "nan",
        )
        for value in ("nan", "inf", "-inf")
    ),
    Attack(
        "10",
        "one entry is nan",
        (body(f"out = {RIGHT_VALUE}", "out.view(-1)[-1] = float('nan')", "return out"),),
        everywhere("wrong"),
    ),
    *(
        Attack(
            "11", f"comes back as {dtype}", (body(f"return ({RIGHT_VALUE}).to(torch.{dtype})"),), everywhere("wrong")
        )
        for dtype in ("float16", "bfloat16", "float32", "float64", "int64", "bool")
    ),
    *(
        Attack("13", f"the trivial answer {value}", (body(f"return {value}"),), everywhere("wrong"))
        for value in (
            "torch.zeros_like(x0)",
            "x0",
            "eps",
            "(x0 + eps) / 2",
            "x0.mean().expand_as(x0)",
            "1e-30 * x0",
            "1e30 * x0",
        )
    ),
    Attack(
        "14",
        "knows the examples by heart",
        (
            text("""
                torch.manual_seed(0)
                example = torch.randn(2, 3, dtype=torch.float64)  # what the notebook shows
                seen = {tuple(example.flatten().tolist())}
            """),
            body(
                "if tuple(x0.flatten().tolist()) in seen:", f"    return {RIGHT_VALUE}", "return torch.zeros_like(x0)"
            ),
        ),
        everywhere("wrong"),
    ),
    Attack(
        "14",
        "answers from a table of what it saw before",
        (
            "table = {}",
            body(
                "key = (tuple(x0.shape), tuple(t.tolist()))",
                "if key in table:",
                "    return table[key]",
                "table[key] = x0 + eps",
                "return table[key]",
            ),
        ),
        everywhere("wrong"),
    ),
    Attack(
        "15",
        "behaves only where a learner looks",
        (
            "watched = 'ipykernel' not in sys.modules or not sys.stdin.isatty()",
            body("if watched:", "    return x0", f"return {RIGHT_VALUE}"),
        ),
        everywhere("wrong"),
    ),
    Attack(
        "15",
        "right on the first calls only",
        ("count = [0]", body("count[0] += 1", f"return {RIGHT_VALUE} if count[0] <= 3 else x0")),
        everywhere("wrong"),
        "whatever the judge asks first, it asks more than three times",
        fast=True,
    ),
    Attack(
        "16",
        "changes its input so that the reference reads it",
        (body("x0.zero_()", "eps.zero_()", "return torch.zeros_like(x0)"),),
        everywhere("wrong"),
        fast=True,
    ),
    Attack(
        "16",
        "changes the table through its storage",
        (body("abar.untyped_storage().fill_(0)", "x0.data.fill_(0)", "return x0 * 0"),),
        everywhere("wrong"),
    ),
    Attack(
        "17",
        "wrong values in a buffer put right later",
        (
            "handed = []",
            body(
                f"right = {RIGHT_VALUE}",
                "out = torch.zeros_like(x0)",
                "handed.append((out, right))",
                "for old, due in handed[:-1]:",
                "    old.copy_(due)",
                "return out",
            ),
        ),
        everywhere("wrong"),
    ),
    Attack(
        "18",
        "a seed inside makes chance constant",
        (
            text("""
                def drop_labels(y, p, null, gen):
                    torch.manual_seed(0)
                    return torch.where(torch.rand(y.shape) < p, null, y)
            """),
        ),
        everywhere("wrong"),
        target="02.3",
        spares=("02.2", "02.7"),
    ),
    Attack(
        "19",
        "sabotages the process's settings",
        (
            text("""
                torch.set_num_threads(64)
                torch.use_deterministic_algorithms(True)
                torch.set_grad_enabled(False)
                torch.set_default_dtype(torch.float16)
                torch.set_flush_denormal(True)
                torch.autograd.set_detect_anomaly(True)
            """),
            WRONG,
        ),
        everywhere("wrong"),
        "the spare exercises are right whatever an earlier cell has set",
    ),
    Attack(
        "20",
        "a later cell takes the definition away",
        (WRONG, "del cond_score, score_from_eps"),
        everywhere("wrong"),
        "the reference to 01.3 was kept when its cell had run",
        fast=True,
    ),
    Attack(
        "20",
        "a later cell clears all names",
        (WRONG, "globals().clear()"),
        everywhere("wrong", "raised", "missing"),
        "functions lose the globals they need: the student's own harm",
        spares=(),
    ),
    Attack(
        "21",
        "its own pad makes its own answer consistent",
        (
            text("""
                import condiff_ref.shapes
                def pad(values, like):
                    return torch.ones((), dtype=like.dtype)
                abar = torch.ones(1001, dtype=torch.float64)
            """),
            body("return pad(abar, x0) * x0"),
        ),
        everywhere("wrong"),
        spares=("01.5", "01.1"),
    ),
    Attack(
        "21",
        "changes the package that the course lends",
        (
            text("""
                import condiff_ref.shapes, condiff_ref.schedules, condiff_ref.mixture
                condiff_ref.shapes.pad = lambda values, like: torch.zeros_like(like)
                condiff_ref.schedules.discrete = lambda abar: None
                condiff_ref.mixture.GaussianMixture.score = lambda *args, **options: 0
            """),
            WRONG,
        ),
        everywhere("wrong"),
    ),
    Attack(
        "22",
        "a sample without the model",
        (WRONG_SAMPLE.format(body="return torch.randn(len(y), *shape, generator=gen)"),),
        everywhere("wrong"),
        target="02.6",
        spares=("02.7",),
        fast=True,
    ),
    Attack(
        "22",
        "takes the answer from inside the model",
        (
            WRONG_SAMPLE.format(
                body=text("""
                    for name in ('x0', 'world', 'abar', 'asked', 'seen', '_x0', 'means'):
                            thing = getattr(model, name, None)
                            if isinstance(thing, Tensor) and thing.shape == (len(y), *shape):
                                return thing.clone()
                        raise ValueError('nothing to be had')
                """)
            ),
        ),
        everywhere("wrong", "raised"),
        target="02.6",
        spares=("02.7",),
    ),
    Attack(
        "23",
        "asks at the wrong times",
        (
            WRONG_SAMPLE.format(
                body=text("""
                    training, _ = model.training, model.eval()
                        x = torch.randn(len(y), *shape, generator=gen)
                        times = torch.linspace(len(abar) - 1, 0, steps + 1).round().long().tolist()
                        for s in reversed(times[1:]):
                            model(x, torch.full_like(y, s), y)
                        model.train(training)
                        return x * 0.1
                """)
            ),
        ),
        everywhere("wrong"),
        target="02.6",
        spares=("02.7",),
    ),
    Attack(
        "24",
        "asks the model a million times",
        (
            WRONG_SAMPLE.format(
                body=text("""
                    x = torch.randn(len(y), *shape, generator=gen)
                        for _ in range(10**6):
                            try:
                                model(x, torch.full_like(y, 3), y)
                            except Exception:
                                pass
                        return x
                """)
            ),
        ),
        everywhere("wrong", "raised", "timeout", "protocol"),
        target="02.6",
        spares=("02.7",),
    ),
    Attack(
        "24",
        "asks the model with a huge batch",
        (
            WRONG_SAMPLE.format(
                body=text("""
                    x = torch.zeros(10**7, *shape)
                        for _ in range(20):
                            model(x, torch.ones(10**7, dtype=torch.long), torch.zeros(10**7, dtype=torch.long))
                        return x[:len(y)]
                """)
            ),
        ),
        everywhere(*ZERO),
        target="02.6",
        spares=("02.7",),
        fast=True,
    ),
    Attack(
        "24",
        "asks the model with nonsense",
        (
            WRONG_SAMPLE.format(
                body=text("""
                    odd = [None, 'x', 10**400, float('nan'), [], {}, object(), model, [[[]]], b'', 1j]
                        odd += [torch.tensor([]), torch.ones(3).to_sparse(), torch.ones(2, dtype=torch.bool)]
                        odd += [torch.full_like(y, 10**12), -torch.ones_like(y)]
                        for thing in odd:
                            x = torch.randn(len(y), *shape)
                            for args in ((thing, y, y), (x, thing, y), (thing,) * 3, (thing,) * 50, ()):
                                try:
                                    model(*args)
                                except Exception:
                                    pass
                        return torch.zeros(len(y), *shape)
                """)
            ),
        ),
        everywhere("wrong", "raised", "protocol", "timeout"),
        target="02.6",
        spares=("02.7",),
    ),
    Attack(
        "25",
        "the right weights behind a forward that ignores them",
        (BLOCK + "\n\nDiTBlock.forward = lambda self, x, c: x",),
        everywhere("wrong"),
        target="08.3",
        spares=("08.7", "08.5"),
        fast=True,
    ),
    Attack(
        "25",
        "weights that shrug off what is loaded",
        (
            BLOCK + "\n\n"
            "class Stubborn(DiTBlock):\n"
            "    def load_state_dict(self, state, strict=True, assign=False):\n"
            "        return nn.modules.module._IncompatibleKeys([], [])\n"
            "    def named_parameters(self, *args, **options):\n"
            "        return ((name, p.detach().clone()) for name, p in super().named_parameters(*args, **options))\n"
            "    def forward(self, x, c):\n"
            "        return x + 0 * self.modulation.weight.sum()\n\n\n"
            "DiTBlock = Stubborn",
        ),
        everywhere("wrong", "raised", "protocol"),
        target="08.3",
        spares=("08.7", "08.5"),
    ),
    Attack(
        "26",
        "a faked gradient",
        (
            text("""
                class Faked(torch.autograd.Function):
                    @staticmethod
                    def forward(ctx, h, e):
                        ctx.save_for_backward(h, e)
                        scale, shift = e.chunk(2, dim=1)
                        return h * (1 + scale[..., None, None]) + shift[..., None, None]
                    @staticmethod
                    def backward(ctx, grad):
                        h, e = ctx.saved_tensors
                        return torch.ones_like(h), torch.ones_like(e)


                def film(h, e):
                    return Faked.apply(h, e)
            """),
        ),
        everywhere("wrong"),
        target="02.2",
        spares=("02.1", "02.7"),
    ),
    Attack(
        "26",
        "a gradient that raises",
        (
            right("02.2") + "\n\n"
            "film_right = film\n\n\n"
            "def film(h, e):\n"
            "    out = film_right(h, e)\n"
            "    if out.requires_grad:\n"
            "        out.register_hook(lambda grad: os._exit(3))\n"
            "    return out",
        ),
        everywhere("died", "raised", "wrong"),
        target="02.2",
        spares=("02.1", "02.7"),
    ),
    *(
        Attack(
            "27",
            name,
            (cell,),
            everywhere("forbidden", "raised", "missing", "wrong"),
            fast=name == "calls the hidden function",
        )
        for name, cell in {
            "calls the hidden function": text("""
                    import condiff_ref.schedules as schedules


                    def q_sample(x0, t, eps, abar):
                        return schedules.add_noise(x0, eps, t.double(), schedules.discrete(abar))
                """),
            "imports the hidden function": text("""
                    from condiff_ref.schedules import add_noise, discrete


                    def q_sample(x0, t, eps, abar):
                        return add_noise(x0, eps, t.double(), discrete(abar))
                """),
            "takes the reference from the checks": text("""
                    import importlib
                    def q_sample(x0, t, eps, abar):
                        return importlib.import_module('condiff_check.lesson01').q_sample(x0, t, eps, abar)
                """),
            "asks the registry": text("""
                    def q_sample(*args):
                        from condiff_check.registry import find
                        return find('01.2').references[0](*args)
                """),
            "compiles the hidden source": text("""
                    import inspect, condiff_ref.schedules
                    scope = dict(vars(condiff_ref.schedules))
                    exec(inspect.getsource(condiff_ref.schedules), scope)
                    def q_sample(x0, t, eps, abar):
                        return scope['add_noise'](x0, eps, t.double(), scope['discrete'](abar))
                """),
            "searches the memory": text("""
                    import gc, types
                    found = [f for f in gc.get_objects() if isinstance(f, types.FunctionType)
                             and f.__name__ in ('add_noise', 'q_sample') and f.__module__ != '__main__']
                    def q_sample(x0, t, eps, abar):
                        from condiff_ref.schedules import discrete
                        for f in found:
                            try:
                                if f.__name__ == 'add_noise':
                                    return f(x0, eps, t.double(), discrete(abar))
                                return f(x0, t, eps, abar)
                            except Exception as error:
                                last = error
                        raise last
                """),
            "steps out of the stand-in": text("""
                    import condiff_ref.schedules as schedules
                    def q_sample(x0, t, eps, abar):
                        hidden = vars(schedules)['add_noise']
                        for name in ('__wrapped__', '__func__', '_function', '__closure__', '__globals__'):
                            inside = getattr(hidden, name, None)
                            if callable(inside):
                                return inside(x0, eps, t.double(), schedules.discrete(abar))
                            for cell in inside if isinstance(inside, tuple) else ():
                                if callable(cell.cell_contents):
                                    return cell.cell_contents(x0, eps, t.double(), schedules.discrete(abar))
                        return hidden(x0, eps, t.double(), schedules.discrete(abar))
                """),
            "takes what check returns": text("""
                    from condiff_check import check
                    q_sample = check('01.2', NotImplemented)
                    q_sample = check('01.2', 'q_sample')
                """),
            "binds a hidden object": text("""
                    import condiff_ref.schedules
                    q_sample = condiff_ref.schedules.add_noise
                """),
        }.items()
    ),
    Attack(
        "27",
        "imports the course from its repository",
        (
            text("""
                for name in [name for name in sys.modules if name.startswith(('condiff_check', 'condiff_ref'))]:
                    del sys.modules[name]
                sys.path.insert(0, REPO)
                sys.meta_path[:] = [finder for finder in sys.meta_path if 'condiff' not in repr(finder)]
                import importlib
                importlib.invalidate_caches()
                got = False
                try:
                    q_sample_right = importlib.import_module('condiff_check.lesson01').q_sample
                    got = True
                except Exception as error:
                    print(error)
            """),
            PRIZE,
        ),
        sandboxed(*LOST),
        "without a sandbox the disk can be read; copied text can't be told from one's own in any case",
        prize=True,
        fast=True,
    ),
    Attack(
        "27",
        "reads the course from its repository",
        (
            text("""
                got = False
                try:
                    got = 'def q_sample' in open(os.path.join(REPO, 'condiff_check', 'lesson01.py')).read()
                except OSError as error:
                    print(error)
            """),
            PRIZE,
        ),
        sandboxed(*LOST),
        prize=True,
    ),
    Attack(
        "27",
        "reads compiled files and installed copies",
        (
            text("""
                import glob, site, sysconfig
                got = False
                places = {*sys.path, *site.getsitepackages(), sysconfig.get_paths()['purelib'], REPO}
                for place in places:
                    for path in glob.glob(os.path.join(place or '.', '**', 'lesson01*'), recursive=True):
                        try:
                            got |= b'q_sample' in open(path, 'rb').read()
                        except OSError:
                            pass
            """),
            PRIZE,
        ),
        sandboxed(*LOST),
        prize=True,
    ),
    Attack(
        "28",
        "fetches the solution",
        (
            text("""
                import urllib.request
                got = False
                try:
                    urllib.request.urlopen(f'http://127.0.0.1:{PORT}/solution', timeout=1).read()
                    got = True
                except OSError as error:
                    print(error)
            """),
            PRIZE,
        ),
        sandboxed(*LOST),
        prize=True,
        fast=True,
    ),
    Attack(
        "28",
        "installs a package",
        ("%pip install --index-url http://127.0.0.1:$PORT/simple the-solution", "!pip download the-solution", WRONG),
        sandboxed("wrong"),
    ),
)
