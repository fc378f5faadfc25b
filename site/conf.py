"""Sphinx configuration of the site. book.py gathers the pages in one folder and calls Sphinx on it, with `-c site`."""

import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import reference  # noqa: E402
import rewrite  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
INSTRUCTORS = tags.has("instructors")  # noqa: F821  Sphinx puts `tags` here

project = "condiff"
author = "the condiff authors"
project_copyright = "the condiff authors. Code: MIT. Text and figures: CC BY 4.0"
version = release = PROJECT["version"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx_copybutton"]
exclude_patterns = ["README.md"]
smartquotes = False  # two hyphens are an option of a command, not a dash

# --- pages ------------------------------------------------------------------------------------------------------------
nb_execution_mode = "off"  # outputs are those that the solutions store
nb_merge_streams = True
nb_ipywidgets_js = {}  # no page holds a widget; by default these scripts come from other servers
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp, .go"

# --- formulas: MathJax from a package, not from a server --------------------------------------------------------------
MATHJAX = Path(*find_spec("sphinx-mathjax-offline").submodule_search_locations) / "static" / "mathjax"
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}  # the menu loads files that are not here

# --- reference --------------------------------------------------------------------------------------------------------
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 250  # counted with the full names of types, of which the last part is shown
add_module_names = False
toc_object_entries_show_parents = "hide"

suppress_warnings = []  # nothing: a warning ends the build

# --- looks ------------------------------------------------------------------------------------------------------------
html_theme = "sphinx_book_theme"
html_title = "condiff, with solutions" if INSTRUCTORS else "condiff"
html_static_path = [str(Path(__file__).parent / "_static")]
html_css_files = ["site.css"]
html_favicon = str(Path(__file__).parent / "_static" / "favicon.svg")
html_context = {"default_mode": "auto"}  # light or dark as the reader's system
html_show_sourcelink = False
html_last_updated_fmt = None
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "path_to_docs": "",
    "use_repository_button": True,
    "use_download_button": True,
    "launch_buttons": {} if INSTRUCTORS else {"colab_url": "https://colab.research.google.com"},
    "home_page_in_toc": True,
    # the theme beneath would add a bar with a second search box
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "pygments_light_style": "tango",
    "pygments_dark_style": "github-dark",
    "announcement": "This edition has the solutions." if INSTRUCTORS else "",
}


def setup(app):
    """Connect what belongs to this site."""
    app.add_config_value("repository", REPOSITORY, "env")
    app.add_config_value("root", str(ROOT), "")
    app.connect("source-read", rewrite.links)
    app.connect("doctree-read", rewrite.alt_texts)
    app.connect("doctree-read", rewrite.formulas)
    app.connect("autodoc-process-docstring", reference.paragraphs)
    app.connect("autodoc-process-signature", reference.signature)
    app.connect("build-finished", finish)


def finish(app, error):
    """Add the script that shows formulas, with what it loads when a formula asks for it; drop what is no page."""
    from sphinx.util.fileutil import copy_asset

    if error is None and app.builder.format == "html":
        target = Path(app.outdir) / "_static" / "mathjax"
        copy_asset(str(MATHJAX / "tex-svg.js"), str(target))
        copy_asset(str(MATHJAX / "input" / "tex" / "extensions"), str(target / "input" / "tex" / "extensions"))
        for template in Path(app.outdir, "_static").glob("*webpack-macros.html"):  # the themes leave them behind
            template.unlink()
