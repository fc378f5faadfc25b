"""Entries 5 to 7, 10 and 14 to 16, and our own: right answers in notebooks of other habits."""

import json

from variations_common import answered, built

from notebooks import METADATA, answer_cells, code, markdown, notebook, of_cells, raw, right, setup, text, todo

Q = "pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps"
HELPED = text("""
    def q_sample(x0, t, eps, abar):
        return root(abar, t, x0) * x0 + root(1 - abar, t, x0) * eps
""")
HELPER = text("""
    def root(table, t, like):
        return pad(table[t].sqrt(), like)
""")
TWO = ("01.2", "01.3")


def usual(entry: str, name: str, *, fast: bool = False, **more):
    """Two right answers in a notebook with further cells."""
    return answered(entry, name, dict.fromkeys(TWO), fast=fast, **more)


PLACES = (
    built("5", "a helper before", ["01.2"], of_cells([*setup(), HELPER, HELPED])),
    built("5", "a helper after", ["01.2"], of_cells([*setup(), HELPED, HELPER]), fast=True),
    built(
        "5",
        "a helper defined twice",
        ["01.2"],
        of_cells(
            [
                *setup(),
                text("""
        def root(*args):
            return 0
    """),
                HELPED,
                HELPER,
            ]
        ),
    ),
    built(
        "5",
        "a helper of the same name as the course's",
        ["01.2"],
        of_cells(
            [
                *setup(),
                text("""
        def pad(values, like):
            return values.reshape(-1, *[1] * (like.ndim - 1))
    """),
                right("01.2"),
            ]
        ),
    ),
    built(
        "5",
        "defined inside a class",
        ["01.2"],
        of_cells(
            [
                *setup(),
                text(f"""
        class Process:
            @staticmethod
            def q_sample(x0, t, eps, abar):
                return {Q}
    """),
                "q_sample = Process.q_sample",
            ]
        ),
    ),
    built(
        "5",
        "in another cell than the template's",
        list(TWO),
        of_cells(
            [
                *setup(),
                *answer_cells("01.2", "# see below"),
                *answer_cells("01.3", right("01.3") + "\n\n\n" + right("01.2")),
            ]
        ),
    ),
    built(
        "5",
        "the template left above",
        ["01.2"],
        of_cells([*setup(), *answer_cells("01.2", todo("01.2")), right("01.2")]),
        fast=True,
    ),
    built(
        "5",
        "wrong first and right later",
        ["01.2"],
        of_cells(
            [
                *setup(),
                *answer_cells(
                    "01.2",
                    text("""
        def q_sample(*args):
            return args[0]
    """),
                ),
                right("01.2"),
            ]
        ),
    ),
    built(
        "5",
        "all in one cell",
        ["01.2", "01.3", "01.8"],
        of_cells([*setup(), "\n\n".join(map(right, ("01.2", "01.3", "01.8")))]),
    ),
    built(
        "5",
        "half of an exercise in each of two cells",
        ["01.3"],
        of_cells([*setup(), *("def " + part for part in right("01.3").split("\ndef "))]).replace(b"def def ", b"def "),
    ),
    built(
        "5",
        "one answer uses another",
        list(TWO),
        of_cells(
            [
                *setup(),
                right("01.2"),
                text("""
        def cond_score(xt, x0, t, abar):
            root = pad((1 - abar[t]).sqrt(), xt)
            return -(xt - q_sample(x0, t, torch.zeros_like(x0), abar)) / root**2


        def score_from_eps(eps, t, abar):
            return -eps / pad((1 - abar[t]).sqrt(), eps)
    """),
            ]
        ),
    ),
    built(
        "5",
        "a global that is set later",
        ["01.2"],
        of_cells(
            [
                *setup(),
                text(f"""
        def q_sample(x0, t, eps, abar):
            return factor * ({Q})
    """),
                "factor = 1",
            ]
        ),
    ),
    built(
        "5",
        "within an if",
        ["01.2"],
        of_cells(
            [
                *setup(),
                "if device:\n"
                + "\n".join(f"    {line}" for line in right("01.2").splitlines())
                + "\nelse:\n    q_sample = None",
            ]
        ),
    ),
)

CELLS = (
    usual(
        "6",
        "empty markdown and raw cells",
        before=["", "   \n", markdown("# Notes"), raw("raw"), "# only a comment", code([])],
        fast=True,
    ),
    usual(
        "6",
        "scratch cells that raise",
        before=[
            "1 / 0",
            "undefined_name",
            "raise ValueError('try')",
            text("""
        def broken(:
          pass
    """),
            "import no_such_package",
        ],
        after=["assert False"],
        fast=True,
    ),
    built(
        "6",
        "counts out of order",
        list(TWO),
        of_cells(
            [
                *setup(),
                *(
                    {**cell, "execution_count": count}
                    for cell, count in zip(
                        (*answer_cells("01.2"), *answer_cells("01.3")), (97, None, 3, 4), strict=True
                    )
                ),
            ]
        ),
    ),
    built("6", "check cells deleted", list(TWO), of_cells([*setup(), *map(right, TWO)])),
    built(
        "6",
        "the set-up deleted and its imports elsewhere",
        ["01.2"],
        of_cells(
            [
                text("""
                    import torch
                    from torch import Tensor
                    from condiff_ref.shapes import pad
                """)
                + "\n\n\n"
                + right("01.2")
            ]
        ),
        fast=True,
    ),
    built(
        "6", "exercises in another order", ["01.8", "01.3", "01.2"], notebook(dict.fromkeys(("01.8", "01.3", "01.2")))
    ),
    built(
        "6", "duplicated cells", list(TWO), of_cells([*setup(), *2 * answer_cells("01.2"), *3 * answer_cells("01.3")])
    ),
    built(
        "6",
        "duplicated cells with equal ids",
        list(TWO),
        of_cells([{**cell, "id": "same"} for cell in (*setup(), *answer_cells("01.2"), *answer_cells("01.3"))]),
    ),
    usual(
        "6",
        "checks that ask for hints",
        after=[
            'check("01.2", q_sample, hint=3)',
            'check("01.2", q_sample, seed=3);',
            text("""
        from condiff_check import reveal
        reveal(..., 3)
    """),
            'check("01.1", None)',
        ],
    ),
)

HABITS = (
    usual(
        "7",
        "prints warnings and logging",
        before=[
            text("""
        import logging, warnings
        logging.basicConfig(level=10)
        logging.warning('x')
        warnings.warn('careful')
        print('stderr', file=sys.stderr)
        sys.stderr.write('more')
    """)
        ],
    ),
    answered(
        "7",
        "prints inside",
        {
            "01.2": text(f"""
        import logging, warnings

        def q_sample(x0, t, eps, abar):
            print('shape', x0.shape, x0)
            warnings.warn('careful')
            logging.getLogger().warning('x')
            print('to stderr', file=sys.stderr, flush=True)
            return {Q}
    """)
        },
        fast=True,
    ),
    answered(
        "7",
        "tqdm",
        {
            "02.6": right("02.6").replace(
                "zip(times[:-1], times[1:], strict=True)", "tqdm(list(zip(times[:-1], times[1:], strict=True)))"
            )
        },
        before=["from tqdm.auto import tqdm"],
    ),
    usual(
        "7",
        "tqdm for notebooks",
        before=[
            text("""
        from tqdm.notebook import tqdm
        for _ in tqdm(range(3)):
            pass
    """),
            text("""
        import tqdm
        for _ in tqdm.trange(3): pass
    """),
        ],
    ),
    usual(
        "7",
        "plots",
        before=[
            "%matplotlib inline",
            "plt.plot([1, 2]); plt.show()",
            text("""
        fig, axes = plt.subplots(2, 2)
        axes[0, 0].imshow(torch.rand(3, 3))
        plt.tight_layout()
        plt.savefig('figure.png')
        plt.close('all')
    """),
        ],
        fast=True,
    ),
    usual(
        "7",
        "other matplotlib backends",
        before=[
            "%matplotlib widget",
            "%matplotlib notebook",
            "%config InlineBackend.figure_format = 'retina'",
            text("""
        import matplotlib
        matplotlib.use('TkAgg')
    """),
            "plt.style.use('ggplot')",
        ],
    ),
    usual(
        "7",
        "seaborn rich and display",
        before=[
            text("""
        import seaborn as sns
        sns.set_theme()
    """),
            text("""
        from rich import print
        print('[bold]x[/bold]')
    """),
            text("""
        from IPython.display import HTML, Image, clear_output, display
        display(HTML('<b>x</b>'))
        clear_output(wait=True)
        HTML('<b>x</b>')
    """),
        ],
    ),
    usual(
        "7",
        "trackers that are not there",
        before=[
            text("""
        import wandb
        wandb.init(project='x')
    """),
            text("""
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter()
    """),
            text("""
        %load_ext tensorboard
        %tensorboard --logdir runs
    """),
        ],
    ),
    usual(
        "7",
        "widgets",
        before=[
            text("""
        import ipywidgets as widgets
        from IPython.display import display
        display(widgets.IntSlider())
        widgets.interact(lambda x: x, x=3)
    """)
        ],
    ),
)

TRAINING = (
    usual(
        "10",
        "a training cell that is tagged",
        before=[
            code(
                text("""
        while True:
            pass
    """),
                tags=["skip-grading"],
            )
        ],
        fast=True,
    ),
    usual(
        "10",
        "a training cell that is not tagged",
        before=[
            text("""
        import time
        model = nn.Linear(2, 2)
        while True:
            model(torch.randn(3, 2)).sum().backward()
            time.sleep(0.01)
    """)
        ],
        fast=True,
    ),
    usual(
        "10",
        "a training cell after the answers",
        after=[
            text("""
        for step in range(10**9):
            torch.randn(10) @ torch.randn(10)
    """)
        ],
    ),
    usual(
        "10",
        "cells that need what was left out",
        before=[code("weights = torch.ones(3)", tags=["skip-grading"]), "weights.sum()"],
    ),
    built(
        "10",
        "an answer in a cell that is tagged",
        ["01.2"],
        of_cells([*setup(), code(right("01.2"), tags=["skip-grading"])]),
    ),
    usual("10", "two training cells", before=["while True: pass", "import time; time.sleep(10**6)"]),
)

COLAB = {
    "colab": {"provenance": [], "gpuType": "T4", "toc_visible": True},
    "accelerator": "GPU",
    "kernelspec": {"name": "python3", "display_name": "Python 3"},
    "language_info": {"name": "python"},
}


def colab_cell(source: str, number: int) -> dict:
    picture = {
        "output_type": "display_data",
        "metadata": {},
        "data": {"image/png": "A" * 10**6, "text/plain": ["<Figure>"]},
    }
    own = {
        "id": f"aBcD{number}",
        "outputId": "3f2a",
        "cellView": "form",
        "colab": {"base_uri": "https://localhost:8080/", "height": 300},
    }
    return {**code(source.splitlines(keepends=True), **own), "outputs": [picture]}


def colab(*sources: str) -> bytes:
    start = [
        "!pip install -q einops",
        text("""
        from google.colab import drive
        drive.mount('/content/drive')
    """),
        "%cd /content",
        text("""
        #@title Settings
        steps = 100 #@param {type:"slider", min:1, max:1000}
    """),
        text("""
        from google.colab import files, output
        files.upload()
    """),
    ]
    first = [cell["source"] for cell in setup()]
    cells = [colab_cell(source, number) for number, source in enumerate((*first, *start, *sources))]
    return of_cells(cells, metadata=COLAB, minor=0, ids=False)


FRONTS = {
    "no kernelspec": {},
    "an unknown kernel": {"kernelspec": {"name": "my-env", "display_name": "conda (x)", "language": "python"}},
    "widget state": METADATA
    | {"widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2}}},
    "toc and varInspector": METADATA
    | {"toc": {"base_numbering": 1, "sideBar": True}, "varInspector": {"cols": {"lenName": 16}, "library": {}}},
    "deepnote": METADATA | {"deepnote": {}, "deepnote_notebook_id": "x", "deepnote_execution_queue": []},
    "kaggle": METADATA
    | {"kaggle": {"accelerator": "gpu", "dataSources": [], "isGpuEnabled": True}, "papermill": {"duration": 3.0}},
    "PyCharm": METADATA
    | {"pycharm": {"stem_cell": {"cell_type": "raw", "source": [], "metadata": {"collapsed": False}}}},
    "VS Code": METADATA | {"vscode": {"interpreter": {"hash": "0" * 64}}, "orig_nbformat": 4},
    "jupytext": METADATA
    | {"jupytext": {"text_representation": {"extension": ".py", "format_name": "percent"}, "formats": "ipynb,py"}},
    "marimo": {"marimo": {"version": "0.9"}, "kernelspec": {"name": "python3"}},
}

FORMATS = (
    built("14", "colab", list(TWO), colab(*map(right, TWO)), fast=True),
    built(
        "14",
        "colab with the drive in the answer's cell",
        ["01.2"],
        colab(right("01.2") + "\n\nfrom google.colab import drive\ndrive.mount('/content/drive')"),
    ),
    *(
        answered("15", name, dict.fromkeys(TWO), metadata=metadata, fast=name == "no kernelspec")
        for name, metadata in FRONTS.items()
    ),
    built(
        "15",
        "cells with metadata of their own",
        list(TWO),
        of_cells(
            [
                {
                    **cell,
                    "metadata": {
                        **cell["metadata"],
                        "cell_id": "x",
                        "deepnote_cell_type": "code",
                        "papermill": {},
                        "_uuid": "y",
                        "ExecuteTime": {},
                        "collapsed": True,
                        "jupyter": {"source_hidden": True},
                        "scrolled": "auto",
                        "trusted": True,
                    },
                }
                for cell in (*setup(), *answer_cells("01.2"), *answer_cells("01.3"))
            ]
        ),
    ),
    usual(
        "15",
        "trailing magics",
        before=[
            "%timeit -n1 -r1 torch.ones(3)",
            "%time x = 1",
            text("""
        %%time
        y = 2
    """),
            text("""
        %%capture out
        print('x')
    """),
            "%pwd",
            "!ls",
            "files = !ls",
            "?torch.ones",
            "torch.ones?",
            "%who",
            text("""
        %%html
        <b>x</b>
    """),
            "%lsmagic",
            "%autosave 0",
        ],
        fast=True,
    ),
    built(
        "15",
        "answers under cell magics",
        list(TWO),
        of_cells([*setup(), "%%time\n" + right("01.2"), "%%capture\n" + right("01.3")]),
    ),
    built(
        "15",
        "source as a list of lines",
        list(TWO),
        of_cells(
            [
                {**cell, "source": cell["source"].splitlines(keepends=True)}
                for cell in (*setup(), *answer_cells("01.2"), *answer_cells("01.3"))
            ]
        ),
    ),
    built("15", "Windows line ends in the file", list(TWO), notebook(dict.fromkeys(TWO)).replace(b"\n", b"\r\n")),
    built(
        "15",
        "without indents",
        list(TWO),
        json.dumps(json.loads(notebook(dict.fromkeys(TWO))), ensure_ascii=False, separators=(",", ":")).encode(),
    ),
    built(
        "15",
        "an older format",
        list(TWO),
        of_cells([*setup(), *answer_cells("01.2"), *answer_cells("01.3")], minor=2, ids=False),
    ),
    built(
        "16",
        "a byte order mark",
        list(TWO),
        b"\xef\xbb\xbf" + notebook(dict.fromkeys(TWO)),
        file="123_hw1 (2).ipynb",
        fast=True,
    ),
    built(
        "16",
        "UTF-16",
        list(TWO),
        notebook(dict.fromkeys(TWO)).decode().encode("utf-16"),
        file="smith_late_12345_hw1-1.ipynb",
    ),
)

OWN = (
    usual(
        "+",
        "changes of global settings",
        before=[
            "torch.set_default_dtype(torch.float64)",
            "torch.set_num_threads(4)",
            "torch.set_printoptions(precision=3)",
            "torch.backends.cudnn.deterministic = True",
            "torch.use_deterministic_algorithms(True, warn_only=True)",
            "torch.set_float32_matmul_precision('high')",
            text("""
        np = __import__('numpy')
        np.set_printoptions(suppress=True)
        np.seterr(all='raise')
    """),
        ],
        fast=True,
    ),
    usual("+", "gradients switched off for the session", before=["torch.set_grad_enabled(False)"]),
    answered(
        "+", "gradients switched off and a training step", {"02.4": None}, before=["_ = torch.set_grad_enabled(False)"]
    ),
    usual("+", "a model and data left in memory", before=["cache = [torch.randn(1000, 1000) for _ in range(20)]"]),
    usual(
        "+",
        "threads that wait",
        before=[
            text("""
        import threading
        event = threading.Event()
        threading.Thread(target=event.wait, daemon=True).start()
    """),
            text("""
        from concurrent.futures import ThreadPoolExecutor
        pool = ThreadPoolExecutor(2)
        list(pool.map(abs, range(4)))
    """),
        ],
    ),
    usual(
        "+",
        "a data loader with workers",
        before=[
            text("""
        from torch.utils.data import DataLoader, TensorDataset
        loader = DataLoader(TensorDataset(torch.arange(8)), batch_size=2, num_workers=2)
        print([batch for batch in loader])
    """)
        ],
    ),
    usual(
        "+",
        "asyncio and await",
        before=[
            text("""
        import asyncio
        await asyncio.sleep(0)
        async def f():
            return 1
        print(await f())
    """)
        ],
    ),
    usual(
        "+",
        "files in the working folder",
        before=[
            text("""
        torch.save(nn.Linear(2, 2).state_dict(), 'model.pt')
        nn.Linear(2, 2).load_state_dict(torch.load('model.pt'))
    """),
            text("""
        from pathlib import Path
        Path('runs').mkdir(exist_ok=True)
        Path('runs/log.txt').write_text('x')
    """),
            text("""
        %%writefile helper.py
        x = 1
    """),
            "import helper",
        ],
    ),
    answered(
        "+",
        "a helper written to a file",
        {
            "01.2": text(f"""
        %%writefile mine.py
        from condiff_ref.shapes import pad


        def q_sample(x0, t, eps, abar):
            return {Q}
    """)
        },
        after=["from mine import q_sample"],
        before=["sys.path.insert(0, '.')"],
    ),
    answered(
        "+",
        "a cache between calls",
        {
            "01.2": text("""
        from functools import lru_cache

        @lru_cache
        def ones(n):
            return (1,) * (n - 1)

        def q_sample(x0, t, eps, abar):
            a = abar[t].reshape(-1, *ones(x0.ndim))
            return a.sqrt() * x0 + (1 - a).sqrt() * eps
    """)
        },
    ),
    answered(
        "+",
        "catches its own errors",
        {
            "01.2": text(f"""
        def q_sample(x0, t, eps, abar):
            try:
                return x0.no_such_method()
            except AttributeError:
                return {Q}
    """)
        },
    ),
    answered(
        "+",
        "asserts and docstrings",
        {
            "01.2": text(f'''
        def q_sample(x0, t, eps, abar):
            """Noise it.

            >>> 1
            1
            """
            assert x0.shape == eps.shape and len(t) == len(x0), "shapes"
            assert not t.is_floating_point()
            if not torch.isfinite(x0).all():
                raise ValueError("not finite")
            return {Q}
    ''')
        },
    ),
    answered(
        "+",
        "a recursive answer",
        {
            "08.5": text("""
        def count_params(dim, depth, patch, channels, classes):
            if depth == 0:
                ends = (patch**2 * channels + 1) * dim + 257 * dim + (dim + 1) * dim + (classes + 1) * dim
                return ends + (dim + 1) * 2 * dim + (dim + 1) * 2 * patch**2 * channels
            block = 4 * (dim + 1) * dim + (dim + 1) * 4 * dim + (4 * dim + 1) * dim + (dim + 1) * 6 * dim
            return block + count_params(dim, depth - 1, patch, channels, classes)
    """)
        },
    ),
    answered(
        "+",
        "uses what the course lends",
        {
            "01.2": text("""
        from condiff_ref.schedules import discrete

        def q_sample(x0, t, eps, abar):
            alpha, sigma = discrete(abar).at(t.double(), x0)
            return (alpha * x0 + sigma * eps).to(x0.dtype)
    """)
        },
    ),
    answered(
        "+",
        "plots inside an answer",
        {
            "01.2": text(f"""
        def q_sample(x0, t, eps, abar):
            plt.figure(figsize=(1, 1))
            plt.plot(abar)
            plt.close()
            return {Q}
    """)
        },
    ),
)

RECORDS = (*PLACES, *CELLS, *HABITS, *TRAINING, *FORMATS, *OWN)
