"""Configuration of the documentation: Sphinx, MyST-NB and the furo theme. Build it by ``make docs``."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "_ext"), str(ROOT)]

# The tutorials and the executed pages run on the CPU, and say nothing of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")

import api_pages  # noqa: E402
import benchmark_page  # noqa: E402
import tutorial_pages  # noqa: E402

import smcdiff  # noqa: E402

project = "smcdiff"
author = "The smcdiff authors"
copyright = author  # the licence, in the repository, says the rest
release = version = smcdiff.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "docstrings",
    "references",
]
exclude_patterns = ["_build", "generated", "_ext", "jupyter_execute", "**/.ipynb_checkpoints"]
default_role = "py:obj"

html_theme = "furo"
html_title = "smcdiff"
html_static_path = ["_static"]
html_theme_options = {"sidebar_hide_name": False}
html_show_copyright = False
pygments_style = "friendly"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and units are in the text; jaxtyping's annotations drown a signature
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
# CHANGELOG.md and the README are read by people on other sites too, where headings start where they like.
suppress_warnings = ["myst.header"]

# A page is executed whenever Sphinx reads it anew; an error in a cell is an error of the build.
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Pages that are made of the package, the results and the tutorials. They are written before Sphinx looks for sources.
api_pages.write_pages(HERE / "api" / "generated", HERE / "generated" / "api_names.md")
benchmark_page.write_page(HERE / "generated" / "benchmark_tables.md", ROOT)
tutorial_pages.write_pages(HERE / "tutorials" / "generated", ROOT / "tutorials")
