"""Attacks that GRADING.md does not list."""

from attacks_common import LOST, PRIZE, RIGHT_VALUE, WRONG, ZERO, Attack, body, everywhere, sandboxed

from notebooks import right, text

HARMLESS = {  # in a cell before a wrong answer: it stays wrong, and the others right
    "traces every call": text("""
            def trace(frame, event, arg):
                for name in ('got', 'due', 'right', 'expected'):
                    if name in frame.f_locals:
                        frame.f_locals[name] = None
                return trace
            sys.settrace(trace)
            sys.setprofile(lambda frame, event, arg: None)
        """),
    "threads that go on changing everything": text("""
            import threading, time
            def meddle():
                while True:
                    for name, module in list(sys.modules.items()):
                        if name.startswith('condiff_agent'):
                            vars(module)['verdict'] = 'right'
                    time.sleep(0.01)
            threading.Thread(target=meddle, daemon=True).start()
        """),
    "a thread that is not a daemon": text("""
            import threading, time
            threading.Thread(target=time.sleep, args=(10**6,)).start()
        """),
    "exit handlers": text("""
            import atexit
            atexit.register(lambda: os._exit(0))
            atexit.register(lambda: [None for _ in iter(int, 1)])
        """),
    "callbacks of the garbage collector": text("""
        import gc
        gc.callbacks.append(lambda phase, info: os.write(2, b'x'))
        gc.set_threshold(1, 1, 1)
    """),
    "finalisers": text("""
            class Bad:
                def __del__(self):
                    raise SystemExit(1)
            bads = [Bad() for _ in range(100)]
            del bads
        """),
    "signal handlers": text("""
            import signal
            for number in range(1, 65):
                try:
                    signal.signal(number, lambda *args: None)
                except (OSError, ValueError):
                    pass
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        """),
    "clocks that stand still": text("""
        import time
        time.time = time.monotonic = time.perf_counter = time.process_time = lambda: 0.0
    """),
    "the random state of the machine": text("""
        os.urandom = lambda n: bytes(n)
        import random
        random.SystemRandom.random = lambda self: 0.0
    """),
    "warnings are errors": text("""
        import warnings
        warnings.simplefilter('error')
        warnings.showwarning = lambda *args: os._exit(1)
    """),
    "no recursion": "sys.setrecursionlimit(60)",
    "endless recursion allowed": "sys.setrecursionlimit(10**9)",
    "the meta device": "torch.set_default_device('meta')",
    "a loop of asyncio": text("""
            import asyncio
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            async def forever():
                while True:
                    await asyncio.sleep(0.01)
            task = loop.create_task(forever())
        """),
    "hooks on errors": text("""
        sys.excepthook = lambda *args: os._exit(0)
        sys.unraisablehook = lambda *args: os._exit(0)
        import threading
        threading.excepthook = lambda *args: os._exit(0)
    """),
    "closed streams": text("""
        os.close(0)
        os.close(1)
        os.close(2)
    """),
    "an import hook": text("""
            class Finder:
                def find_spec(self, name, path=None, target=None):
                    raise ImportError('nothing today')
            sys.meta_path.insert(0, Finder())
        """),
    "hooks on every tensor": text("""
            from torch.utils._python_dispatch import TorchDispatchMode
            class Mode(TorchDispatchMode):
                def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                    out = func(*args, **(kwargs or {}))
                    return out
            mode = Mode()
            mode.__enter__()
        """),
    "the environment": text("""
        os.environ.clear()
        os.environ['LD_PRELOAD'] = '/tmp/evil.so'
        os.environ['PYTHONPATH'] = '/tmp'
        os.environ['OMP_NUM_THREADS'] = '64'
    """),
    "a folder that went away": text("""
        os.makedirs('gone', exist_ok=True)
        os.chdir('gone')
        os.rmdir('../gone')
    """),
    "files that block": text("""
        os.mkfifo('pipe')
        os.makedirs('d' * 200)
        open('\\n\\x1b[31m', 'w').close()
        os.chmod('.', 0)
    """),
    "a memory that is full of locks": text("""
        import fcntl
        lock = open('lock', 'w')
        fcntl.flock(lock, fcntl.LOCK_EX)
    """),
    "a core dump": text("""
        import resource, signal
        resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
        if os.fork() == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        os.wait()
    """),
    "faults are handled": text("""
        import faulthandler
        faulthandler.enable()
        faulthandler.dump_traceback_later(1, repeat=True, file=open('trace', 'w'))
    """),
    "a debugger at every error": text("""
        from IPython import get_ipython
        shell = get_ipython()
        shell.call_pdb = True
        shell.ast_node_interactivity = 'all'
    """),
}
NO_MORE_CELLS = {  # no cell after it runs, not even that of its answer; 01.3 stands before it
    "streams that raise": text("""
            class Stream:
                def __getattr__(self, name):
                    raise SystemExit('no stream')
            sys.stdout = sys.stderr = sys.stdin = Stream()
        """),
    "the shell swallows cells": text("""
            from IPython import get_ipython
            shell = get_ipython()
            type(shell).run_cell = lambda *args, **options: None
            type(shell).run_code = lambda *args, **options: None
            type(shell).user_ns = property(lambda self: {})
        """),
}
OWN_HARM = {  # these may take the student's other answers with them
    "modules thrown out": text("""
        for name in [name for name in sys.modules if name not in ('sys', 'builtins', '__main__')]:
            sys.modules.pop(name)
    """),
    "builtins": text("""
            import builtins
            builtins.len = lambda x: 3
            builtins.isinstance = lambda x, y: True
            builtins.print = lambda *args: None
            builtins.float = builtins.int = lambda x=0: 0
            builtins.callable = lambda x: True
        """),
    "no import at all": text("""
        import builtins
        builtins.__import__ = lambda *args, **options: torch
    """),
    "NotImplementedError is another": text("""
        import builtins
        builtins.NotImplementedError = type('Done', (Exception,), {})
        builtins.Exception = builtins.BaseException = NotImplementedError
    """),
    "true is false": text("""
            import ctypes
            size = object.__sizeof__(True)
            ctypes.memmove(id(False), id(True), size)
        """),
    "memory of its own process": text("""
            with open('/proc/self/mem', 'r+b') as memory:
                memory.seek(id(None))
                memory.write(b'x' * 16)
        """),
    "operators of tensors": text("""
        Tensor.__add__ = Tensor.__mul__ = Tensor.__sub__ = lambda a, b: a
        Tensor.__array__ = Tensor.numpy = Tensor.tolist = Tensor.contiguous = None
    """),
    "storages of tensors": text("""
        Tensor.untyped_storage = Tensor.data_ptr = lambda self, *args: self
        Tensor.detach = Tensor.cpu = Tensor.clone = lambda self, *args: self
    """),
}

FACES = {  # what a function may be or return to confuse whoever looks at it
    "a class with a changing face": text("""
        class Answer:
            count = 0
            def __call__(self, x0, t, eps, abar):
                type(self).count += 1
                return [x0, eps, None, 'right', True][self.count % 5]
        q_sample = Answer()
    """),
    "a class that lies about itself": text("""
        class Answer:
            @property
            def __class__(self):
                raise SystemExit('who asks?')
            def __call__(self, *args):
                return self
        q_sample = Answer()
    """),
    "a result whose class lies": text("""
        class Odd:
            @property
            def __class__(self):
                raise KeyboardInterrupt
            def __repr__(self):
                raise MemoryError
        def q_sample(*args):
            return Odd()
    """),
    "a metaclass that knows all": text("""
        class Meta(type):
            def __instancecheck__(cls, thing):
                return True
            def __eq__(cls, other):
                return True
            __hash__ = type.__hash__
        class Answer(metaclass=Meta):
            pass
        def q_sample(*args):
            return Answer
    """),
    "a coroutine": text("""
        async def q_sample(x0, t, eps, abar):
            return x0
    """),
    "a generator function": text("""
        def q_sample(x0, t, eps, abar):
            yield x0
    """),
    "no function": "q_sample = 'right'",
    "None": "q_sample = None",
    "a class": text("""
        class q_sample:
            def __new__(cls, *args):
                return cls
    """),
    "an instance of Mock": text("""
        from unittest.mock import MagicMock
        q_sample = MagicMock(return_value=torch.zeros(3))
    """),
    "a module": "q_sample = torch",
    "a partial that never ends": text("""
        from functools import partial
        q_sample = partial(lambda *args, **options: q_sample(*args, **options))
    """),
    "a name that only looks the same": text("""
        def q_sаmple(x0, t, eps, abar):
            return x0
    """),
    "a result of check": "q_sample = check('01.2', lambda *args: args[0])",
    "an unwrapped liar": text("""
        def q_sample(*args):
            return args[0]
        q_sample.__wrapped__ = torch.add
        q_sample.__signature__ = 'x'
        q_sample.__name__ = q_sample.__qualname__ = 'x' * 10**6
        q_sample.__module__ = 'condiff_check.lesson01'
    """),
}

ERRORS = {
    "with an endless text": text("""
        class Odd(Exception):
            def __str__(self):
                while True:
                    pass
            __repr__ = __str__
    """),
    "whose text raises": text("""
        class Odd(Exception):
            def __str__(self):
                raise self
            __repr__ = __str__
    """),
    "whose text is no text": text("""
        class Odd(Exception):
            __str__ = __repr__ = lambda self: 5
    """),
    "with 100 MB of text": text("""
        class Odd(Exception):
            def __str__(self):
                return 'x\\n' * (50 * 10**6)
    """),
    "with a huge name": "Odd = type('O' * 10**7, (Exception,), {})",
    "with a chain without end": text("""
        class Odd(Exception):
            @property
            def __cause__(self):
                return Odd()
            __context__ = __cause__
    """),
    "that says it is not done": "Odd = NotImplementedError",
    "with a class that raises": text("""
        class Meta(type):
            @property
            def __name__(cls):
                raise SystemExit
            __qualname__ = __module__ = __name__
            def __repr__(cls):
                raise SystemExit
        class Odd(Exception, metaclass=Meta):
            pass
    """),
    "of exceptions in a group": "Odd = lambda: ExceptionGroup('many', [ValueError(n) for n in range(10**5)])",
    "whose traceback lies": text("""
        class Odd(Exception):
            __traceback__ = property(lambda self: None)
            def with_traceback(self, tb):
                raise SystemExit
    """),
}

RETURNS = {
    "with a hook that ends the process": (
        f"out = ({RIGHT_VALUE}).requires_grad_()",
        "out.register_hook(lambda g: os._exit(0))",
        "return 0 * out",
    ),
    "whose graph is endless": (
        "out = x0.clone().requires_grad_()",
        "for _ in range(20000): out = out + eps",
        "return out",
    ),
    "with a mode left on": (
        "torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: os._exit(0)).__enter__()",
        "return x0",
    ),
    "in inference mode": ("torch.inference_mode().__enter__()", "return x0 + 0"),
    "with a storage set free": ("out = x0.clone()", "out.untyped_storage().resize_(0)", "return out"),
    "over the memory's end": ("return torch.as_strided(x0, x0.shape, x0.stride(), 0).set_()",),
    "that a thread goes on writing": (
        "import threading",
        f"out, right = x0.clone(), {RIGHT_VALUE}",
        "def write():",
        "    while True: out.copy_(right); out.copy_(x0)",
        "threading.Thread(target=write, daemon=True).start()",
        "return out",
    ),
    "kept from being read": (
        "out = x0.clone()",
        "out.requires_grad_()",
        "out.detach = out.numpy = out.cpu = None",
        "return out",
    ),
    "as a lazy tensor": ("return torch.empty((), device='meta').expand(x0.shape)",),
    "of another device": ("return x0.to('cuda' if torch.cuda.is_available() else 'mkldnn')",),
    "from a vmap that leaked": (
        "kept = []",
        "torch.func.vmap(lambda row: kept.append(row) or row)(x0)",
        "return kept[0]",
    ),
}

TOOLS = {
    "torch.hub": "torch.hub.load('somebody/something', 'model', trust_repo=True)",
    "a compiled extension": text("""
        from torch.utils.cpp_extension import load_inline
        load_inline('evil', 'int f() { return 1; }', functions=['f'])
    """),
    "jit": "scripted = torch.jit.script(lambda x: x)",
    "workers that are spawned": text("""
        import multiprocessing as workers
        workers.get_context('spawn').Pool(4).map(abs, [1])
    """),
    "writes to the installed packages": text("""
            import site
            for place in (*site.getsitepackages(), os.path.dirname(torch.__file__), *sys.path):
                for name in (f'{MARK}.pth', 'sitecustomize.py'):
                    try:
                        if name.startswith(MARK) or not os.access(place, os.W_OK):
                            open(os.path.join(place, name), 'w').write('import os')
                    except OSError as error:
                        print(error)
        """),
    "writes to a library in memory": text("""
            import ctypes, mmap
            path = torch._C.__file__
            fd = os.open(path, os.O_RDWR)
            map = mmap.mmap(fd, 0)
            map[0:4] = map[0:4]
        """),
    "a library for its children": text("""
            open('evil.c', 'w').write('int f;')
            os.system('cc -shared -o evil.so evil.c')
            os.environ['LD_PRELOAD'] = os.path.abspath('evil.so')
            os.system('id')
        """),
    "a file named torch": text("""
        open('torch.py', 'w').write('raise SystemExit')
        open('numpy.py', 'w').write('raise SystemExit')
        open('condiff_agent.py', 'w').write('raise SystemExit')
        sys.path.insert(0, os.getcwd())
    """),
    "a pickle for torch.load": text("""
            import pickle
            class Boom:
                def __reduce__(self):
                    return os.system, (f'touch {CANARY_TREE}/loaded',)
            for name in ('model.pt', 'answers.pkl', 'x.joblib'):
                pickle.dump(Boom(), open(name, 'wb'))
        """),
}

FORGED = {  # a field of the agent's own messages, set to something else
    "another operation": ("op", "'call'"),
    "an operation that a judge does not offer": ("op", "'get'"),
    "no operation": ("op", "[]"),
    "a copy of a judge's module": ("op", "'copy'"),
    "its own function for a value": ("value", "['h', 'C0', '']"),
    "a judge's object for a value": ("value", "['h', 'J1', '']"),
    "a claim of 2^40 numbers": ("value", "['t', 'float64', [2**40], 0, False]"),
    "a negative place": ("value", "['t', 'float64', [1], -8, False]"),
    "a tensor that is not there": ("value", "['a', 99]"),
    "an integer of 500 digits": ("value", "['i', '9' * 500]"),
    "a number that is none": ("value", "['f', 'right']"),
    "a dtype of objects": ("value", "['t', 'object', [1], 0, False]"),
    "a generator of nothing": ("value", "['g', ['n'], 0]"),
    "a dict whose keys are lists": ("value", "['d', [[['l', []], ['n']]]]"),
    "lists within lists": ("value", "__import__('functools').reduce(lambda v, _: ['l', [v]], range(30), ['n'])"),
    "a million items": ("value", "['l', [['n']] * 150000]"),
    "a module of nothing": ("new", "[['C5', {'kind': 'module', 'tree': {}}]]"),
    "a judge's handle": ("new", "[['J1', {'kind': 'function', 'name': 'x'}]]"),
    "20 000 handles": ("new", "[[f'C{n}', {'kind': 'function', 'name': 'x'}] for n in range(20000)]"),
    "a judge's weights": ("sync", "[['J1', {'leaves': [['levels', ['n'], None, False, True]], 'training': [True]}]]"),
    "a judge's handles dropped": ("drop", "[f'J{n}' for n in range(100)]"),
    "what is no list of handles": ("drop", "{'x': None}"),
    "other arguments afterwards": ("after", "{'tensors': [[0, ['f', '0x1p0'], None, True]], 'generators': []}"),
    "arguments that were none": ("after", "{'tensors': [[99, ['n'], None, False]], 'generators': [[0, 0]]}"),
    "a slope for what is not known": ("leaves", "[['argument', 10**9], ['parameter', 'J1', 'x'], ['leaf', -1]]"),
    "an error that is a group": ("error", "{'type': 'ExceptionGroup', 'module': 'builtins', 'text': '', 'told': ''}"),
    "an error that ends programs": ("error", "{'type': 'SystemExit', 'module': 'builtins', 'text': '0', 'told': ''}"),
    "an error that is an assertion": (
        "error",
        "{'type': 'AssertionError', 'module': 'builtins', 'text': '', 'told': ''}",
    ),
    "an error of no name": ("error", "{'type': '', 'module': '', 'text': '\\x1b[2J', 'told': '\\x00\\r\\n' * 500}"),
    "an error of the judge's own": (
        "error",
        "{'type': 'Wrong', 'module': 'condiff_check.exercise', 'text': '', 'told': ''}",
    ),
    "an error without its parts": ("error", "{'type': 5}"),
}
FORGE = """
import gc
peer = next(thing for thing in gc.get_objects() if type(thing).__name__ == 'ChildPeer')
send = peer.wire.send
peer.wire.send = lambda header, chunks=(): send({**header, FIELD: VALUE}, chunks)
return x0""".strip()
FIRST = text("""
    import re
    seen = []


    def my_ddim_test(step):
        known = KNOWN
        if known not in seen:
            seen.append(known)
        assert seen.index(known) < 3
""")


def numbered(number: int, name: str, *cells: str, expect=None, **more) -> Attack:
    return Attack(f"+{number}", name, cells, expect or everywhere("wrong"), **more)


FAST = {
    "traces every call",
    "signal handlers",
    "a thread that is not a daemon",
    "streams that raise",
    "modules thrown out",
    "true is false",
    "the shell swallows cells",
    "a class that lies about itself",
    "with a hook that ends the process",
    "exit handlers",
    "closed streams",
}

RECORDS = (
    *(numbered(1, name, cell, WRONG, fast=name in FAST) for name, cell in HARMLESS.items()),
    *(
        numbered(1, name, cell, WRONG, expect=everywhere(*ZERO), spares=("01.3",), fast=name in FAST)
        for name, cell in NO_MORE_CELLS.items()
    ),
    *(
        numbered(
            2,
            name,
            WRONG,
            cell,
            expect=everywhere(*ZERO),
            spares=("01.3",) if name == "NotImplementedError is another" else (),
            fast=name in FAST,
        )
        for name, cell in OWN_HARM.items()
    ),
    *(
        numbered(3, name, cell, expect=everywhere(*ZERO), fast=name in FAST, checked=name != "a result of check")
        for name, cell in FACES.items()
    ),
    *(
        numbered(4, f"an error {name}", cell, body("raise Odd()"), expect=everywhere(*ZERO), fast=name in FAST)
        for name, cell in ERRORS.items()
    ),
    *(
        numbered(
            4,
            f"an error {name} in a cell",
            WRONG,
            cell + "\nraise Odd()",
        )
        for name, cell in ERRORS.items()
    ),
    *(
        numbered(5, f"a tensor {name}", body(*lines), expect=everywhere(*ZERO), fast=name in FAST)
        for name, lines in RETURNS.items()
    ),
    *(numbered(6, f"uses {name}", cell, WRONG, expect=sandboxed("wrong")) for name, cell in TOOLS.items()),
    numbered(
        7,
        "copies of the agent that answer in its place",
        WRONG,
        text("""
            import time
            if os.fork() == 0:
                pass  # this copy goes on as if it were the runner
            else:
                time.sleep(0.2)
        """),
        expect=sandboxed(*ZERO),
        spares=(),
    ),
    numbered(
        8,
        "a writer left behind by an earlier exercise",
        WRONG,
        right("01.1") + "\n\nmake_abar_right = make_abar\n\n\n"
        "def make_abar(T, kind):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        import time\n"
        "        while True:\n"
        "            for fd in range(3, 64):\n"
        "                try:\n"
        "                    os.set_blocking(fd, False)\n"
        "                    os.write(fd, b'right' * 10)\n"
        "                except OSError:\n"
        "                    pass\n"
        "            time.sleep(0.05)\n"
        "    return make_abar_right(T, kind)",
        expect=sandboxed(*ZERO),
        extra={"01.1": ("right", *ZERO)},
        about="what 01.1's process leaves running must not reach the sockets of 01.2 and 01.8",
        fast=True,
    ),
    numbered(
        9,
        "a callback from within a callback",
        text("""
            def my_ddim_test(step):
                class Evil:
                    def __getattr__(self, name):
                        return step
                    def __call__(self, *args):
                        return step(self, self, self, self, self)
                    __mul__ = __rmul__ = __add__ = __sub__ = __getitem__ = __call__
                evil = Evil()
                for args in ((step,) * 5, (evil,) * 5, (my_ddim_test,) * 5, ([[step]],) * 5):
                    try:
                        step(*args)
                    except Exception:
                        pass
        """),
        expect=everywhere("wrong", "raised", "protocol", "timeout"),
        target="01.9",
    ),
    numbered(
        9,
        "a model that calls itself without end",
        text("""
            def dsm_loss(model, x0, t, eps, abar):
                try:
                    forward = model.forward
                    model.forward = lambda *args: model(*args) + forward(*args)
                except Exception:
                    pass
                return model(x0, t).mean()
        """),
        expect=everywhere(*ZERO),
        target="01.6",
    ),
    numbered(
        10,
        "learns by the verdicts of a test",
        text("""
            def my_ddim_test(step):
                import inspect
                text = repr(step)
                for name in ('__name__', '__dict__', '__qualname__', '__doc__'):
                    text += str(getattr(step, name, ''))
                try:
                    text += inspect.getsource(step)
                except Exception:
                    pass
                if 'wrong' in text or 'mistake' in text or '_by' in text:
                    raise AssertionError
                hidden = ('__closure__', '__code__', '__defaults__', '__wrapped__', '__self__')
                for name in (*hidden, 'handle', '_handle', 'id', '_id', 'number'):
                    thing = getattr(step, name, None)
                    if isinstance(thing, int) and thing % 3:
                        raise AssertionError
        """),
        expect=everywhere("wrong", "raised"),
        target="01.9",
        about="the functions that a test is tried on must not be told apart by anything but what they do",
    ),
    numbered(
        10,
        "a test that objects at the second call",
        text("""
            calls = [0]


            def my_ddim_test(step):
                calls[0] += 1
                assert calls[0] <= 2
        """),
        expect=everywhere("wrong", "raised"),
        target="01.9",
        about="the order of right and wrong functions must not be a pattern",
    ),
    *(
        numbered(
            10,
            f"a test that lets its first {count} calls pass",
            f"calls = [0]\n\n\ndef my_ddim_test(step):\n    calls[0] += 1\n    assert calls[0] <= {count}",
            expect=everywhere("wrong", "raised"),
            target="01.9",
            fast=count == 9,
        )
        for count in (1, 3, 6, 9, 12)
    ),
    *(
        numbered(
            10,
            f"a test that knows functions by their {name}",
            FIRST.replace("KNOWN", known),
            expect=everywhere("wrong", "raised"),
            target="01.9",
            about="three functions are right, and they must not be the first three to come",
            fast=name == "handle",
        )
        for name, known in {
            "identity": "id(step)",
            "handle": "getattr(step, '_handle', 0)",
            "name": "step.__name__",
            "text": "re.sub('0x[0-9a-f]+', '', repr(step))",
        }.items()
    ),
    numbered(
        10,
        "a test that has read the names in the course",
        "def my_ddim_test(step):\n    assert step.__name__ in ('ddim_step', '_ddim_sigma_form', '_ddim_loop')",
        expect=everywhere("wrong", "raised"),
        target="01.9",
    ),
    numbered(
        10,
        "a test that objects by chance",
        text("""
            import random


            def my_ddim_test(step):
                assert random.random() < 0.5
        """),
        expect=everywhere("wrong", "raised"),
        target="01.9",
    ),
    numbered(
        11,
        "an average that counts what it was asked",
        text("""
            class EMA:
                def __init__(self, model, decay):
                    self.source, self.count = model, 0
                @property
                def model(self):
                    self.count += 1
                    return deepcopy(self.source).eval().requires_grad_(False) if self.count % 2 else self.source
                def update(self, model):
                    self.source = model
        """),
        expect=everywhere("wrong", "raised", "protocol"),
        target="02.5",
        spares=("02.7",),
    ),
    numbered(
        11,
        "a module of strange parameters",
        text("""
            class LabelEmbedder(nn.Module):
                def __init__(self, classes, dim, p):
                    super().__init__()
                    self.table = nn.Embedding(classes + 1, dim, device='meta')
                def parameters(self, recurse=True):
                    return iter(int, 1)
                def named_parameters(self, *args, **options):
                    return ((f'p{n}', nn.Parameter(torch.zeros(1))) for n in iter(int, 1))
                def state_dict(self, *args, **options):
                    return {'x' * 10**7: torch.zeros(1)}
                def modules(self):
                    while True:
                        yield self
                def forward(self, y, gen=None, force=None):
                    return self.table.weight[y]
        """),
        expect=everywhere(*ZERO),
        target="08.6",
        spares=("08.7", "08.5"),
    ),
    numbered(
        12,
        "optimiser and model are not what they were",
        text("""
            def train_step(model, opt, x0, y, p, abar, gen):
                model.__class__ = nn.Identity
                opt.step = lambda: None
                opt.param_groups.clear()
                gen.set_state(torch.zeros(16, dtype=torch.uint8)) if False else None
                return 0.0
        """),
        expect=everywhere("wrong", "raised", "protocol"),
        target="02.4",
        spares=("02.7",),
    ),
    numbered(
        13,
        "sets the agent's arguments on fire",
        "import gc\n",
        body(
            "for thing in gc.get_objects():",
            "    try:",
            "        if type(thing) is Tensor and thing is not x0:",
            "            thing.data.fill_(0)",
            "        elif type(thing).__name__ in ('socket', 'SocketIO', 'BufferedReader', 'BufferedWriter'):",
            "            thing.close()",
            "    except BaseException:",
            "        pass",
            "return x0",
        ),
        expect=everywhere(*ZERO),
    ),
    numbered(
        14,
        "reads what is due from the frames above",
        "got = False",
        body(
            "frame = sys._getframe()",
            "while frame:",
            "    for name, value in list(frame.f_locals.items()) + list(frame.f_globals.items()):",
            "        if isinstance(value, Tensor) and name in ('right', 'due', 'expected', 'want', 'reference'):",
            "            return value",
            "    frame = frame.f_back",
            "return x0",
        ),
        expect=everywhere("wrong"),
    ),
    Attack(
        "+15",
        "the secret that draws the inputs",
        (
            text("""
                import re
                got, secret = False, rb'secret of the [f]ixture is this'  # does not match itself
                try:
                    for line in open('/proc/self/maps'):
                        start, end = (int(part, 16) for part in line.split()[0].split('-'))
                        if 'rw' in line and end - start < 2**26:
                            with open('/proc/self/mem', 'rb') as memory:
                                memory.seek(start)
                                got |= re.search(secret, memory.read(end - start)) is not None
                except (OSError, ValueError, OverflowError) as error:
                    print(error)
            """),
            PRIZE,
        ),
        everywhere(*LOST),
        "not even a copy of it that a fork has left in memory",
    ),
    *(
        numbered(
            16,
            f"forges {name}",
            body(FORGE.replace("FIELD", repr(field)).replace("VALUE", value)),
            expect=everywhere(*ZERO),
            fast=name in ("20 000 handles", "an error of no name"),
        )
        for name, (field, value) in FORGED.items()
    ),
    numbered(
        17,
        "sends calls faster than they are answered",
        text("""
            def sample(model, y, steps, shape, abar, gen):
                import threading, time
                wire, sent = model._peer.wire, []
                send, connection = wire.send, wire._socket
                wire.send = lambda header, chunks=(): (sent.append((header, list(chunks))), send(header, chunks))
                many = 20000
                try:
                    model(torch.zeros(many, *shape), torch.ones(many).long(), torch.zeros(many).long())
                except RuntimeError:
                    pass

                def drain():
                    while True:
                        try:
                            connection.recv(2**20)
                        except BlockingIOError:
                            time.sleep(0.001)

                threading.Thread(target=drain, daemon=True).start()
                while True:
                    send(*sent[0])
        """),
        expect=everywhere("timeout", "protocol", "raised", "wrong"),
        target="02.6",
        spares=("02.7",),
        about="the judge must look at the clock even where it never waits",
        fast=True,
    ),
    *(
        numbered(
            18,
            f"changes its arguments in the first {count} calls of {target}",
            f"calls = [0]\n\n\ndef {name}({args}):\n    calls[0] += 1\n    if calls[0] <= {count}:\n"
            f"        for thing in ({args}):\n            if isinstance(thing, Tensor) and thing.is_floating_point():\n"
            f"                thing.data.zero_()\n    return {value}",
            expect=everywhere("wrong"),
            target=target,
            spares=(),
            about="what is due must not be computed from arguments that came back changed",
        )
        for target, name, args, value, counts in (
            ("01.2", "q_sample", "x0, t, eps, abar", "torch.zeros_like(x0)", (1, 2, 5, 20)),
            ("01.5", "posterior_mean_eps", "x, x0s, t, abar", "torch.zeros_like(x)", (1, 3, 5, 20)),
            ("02.2", "film", "h, e", "0 * h + 0 * e.sum()", (1, 3, 5, 20)),
        )
        for count in counts
    ),
)
