"""The documentation: its code runs, its links lead somewhere, its reference leaves no public name out."""

import ast
import importlib
import importlib.util
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rows import quick

import smcdiff

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r"\{py:(?:obj|mod)\}`(?:[^`<]*<)?([\w.]+)>?`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
WITH_CODE = [path for path in [ROOT / "README.md", *PAGES] if FENCE.search(path.read_text())]

# Smaller numbers in the same calls, so that the test takes seconds. Each must be found where it is said to be.
FEWER = {
    "num_particles=32": "num_particles=8",
    "num_chains=4": "num_chains=2",
    "num_steps=100": "num_steps=8",
}
SIZES = {
    "README.md": FEWER,
    "getting_started.md": {**FEWER, "model.schedule, 100": "model.schedule, 8", "fk, 32": "fk, 8"},
    # The default twist of an exact model takes long to compile.
    "particle_gibbs.md": {
        "times=times, order=1)": "times=times, order=1, twist=smcdiff.guidance.pigdm)",
        "problem, times=times)": "problem, times=times, twist=smcdiff.guidance.pigdm)",
    },
    "numpyro.md": {
        "num_warmup=100,": "num_warmup=10,",
        "num_samples=200,": "num_samples=20,",
        "num_chains=4,\n    progress": "num_chains=2,\n    progress",
        "num_particles=8, num_steps=40)": "num_particles=4, num_steps=8, twist=smcdiff.guidance.pigdm)",
        "num_steps=20)": "num_steps=8, twist=smcdiff.guidance.pigdm)",
        "num_samples=100,": "num_samples=20,",
    },
    "scale.md": {"model.schedule, 20))": "model.schedule, 20), twist=smcdiff.guidance.pigdm)"},
}

# The calls on the other pages have tests of their own: they run once in CI.
QUICK = ("getting_started.md",)


def extension(name):
    """A module of docs/_ext."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parts(name):
    """What a user gets by a dotted name; a module where a function hides it, as `smcdiff.run`, is not reached."""
    thing = smcdiff
    for part in name.split(".")[1:]:
        thing = getattr(thing, part)
    return thing


@pytest.mark.lenient_promotion  # ArviZ and the pages' own lines are written for JAX as it comes
@pytest.mark.filterwarnings("ignore:.*:UserWarning:arviz", "ignore:.*:RuntimeWarning:arviz")
@pytest.mark.parametrize(
    "path",
    quick(WITH_CODE, *(path for path in WITH_CODE if path.name in QUICK)),
    ids=lambda path: path.name,
)
def test_code_of_a_page_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(FENCE.findall(path.read_text()))
    for large, small in SIZES.get(path.name, {}).items():
        assert large in code, f"{path.name} no longer says {large!r}: adapt SIZES"
        code = code.replace(large, small)
    names = {}
    exec(compile(code, str(path), "exec"), names)
    if path.name in ("README.md", "getting_started.md"):
        printed = capsys.readouterr().out
        assert "r_hat" in printed and "x[5, 2]" in printed.replace("'", "")
        assert names["result"].is_valid
    if path.name == "getting_started.md":
        # The long form is the same computation.
        assert (names["long_form"].particles.x == names["result"].particles).all()
        assert (names["low"] <= names["high"]).all()
    if path.name == "extending.md":
        estimates = names["result"].log_evidence
        # The spread of four runs of 4096 is about .02: five standard errors of their mean, estimated generously.
        assert (
            abs(estimates.mean() - _kalman_log_likelihood(names["y"]))
            < 5 * max(estimates.std(ddof=1), 0.02) / 2
        )


def _kalman_log_likelihood(measurements):
    """Log likelihood of x' = 0.9 x + N(0, 1), y = x' + N(0, 0.25), from x = N(0, 1)."""
    mean, variance, total = 0.0, 1.0, 0.0
    for y in measurements.tolist():
        mean, variance = 0.9 * mean, 0.81 * variance + 1.0
        spread = variance + 0.25
        total -= 0.5 * ((y - mean) ** 2 / spread + math.log(2 * math.pi * spread))
        mean, variance = mean + variance / spread * (y - mean), 0.25 * variance / spread
    return total


def test_readme_and_getting_started_show_the_same_problem():
    calls = [
        {
            ast.dump(node)
            for node in ast.walk(ast.parse(FENCE.search((path).read_text())[1]))
            if isinstance(node, ast.Assign)
        }
        for path in (ROOT / "README.md", DOCS / "getting_started.md")
    ]
    assert calls[0] == calls[1]


def test_reference_documents_every_public_name():
    api = extension("api_pages")
    documented = {name for names in api.documented_names().values() for name in names}
    for name in smcdiff.__all__:
        thing = getattr(smcdiff, name)
        if inspect.ismodule(thing):
            assert name in api.documented_names(), f"the module smcdiff.{name} has no page"
        else:
            assert f"smcdiff.{name}" in documented, f"smcdiff.{name} is not in the reference"
    text = "".join(api.page_text(page, names) for page, names in api.documented_names().items())
    for full in documented:
        found = re.findall(
            rf"^\.\. (?:autoclass|autofunction|py:data):: {re.escape(full)}$", text, re.MULTILINE
        )
        assert len(found) == 1, f"{full} is documented {len(found)} times"


def test_reference_has_a_page_for_every_public_module():
    api = extension("api_pages")
    for page, names in api.documented_names().items():
        assert names, f"the page of smcdiff.{page} is empty"
        assert f"smcdiff.{page}" in api.page_text(page, names)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_names_on_a_page_exist(path):
    pages = set(extension("api_pages").documented_names())
    for name in ROLE.findall(path.read_text()):
        full = name if name.startswith("smcdiff") else None
        assert full, f"{path.name}: write the full name of {name!r}"
        if full.removeprefix("smcdiff.") not in pages:
            parts(full)


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("*.md")), *PAGES], ids=lambda path: path.name)
def test_links_of_a_page_lead_somewhere(path):
    scripts = {f"tutorials/generated/{script.stem}.ipynb" for script in TUTORIALS}
    for target in LINK.findall(re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or file in scripts:
            continue
        found = path.parent / file if file else path
        assert found.exists(), f"{path.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in _anchors(found), f"{path.name} links to {target}, but there is no such heading"


def _anchors(path):
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_are_all_in_the_table_of_contents():
    listed = set(re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(), re.MULTILINE))
    assert {path.stem for path in PAGES} - {"index"} <= listed
    assert {f"tutorials/generated/{script.stem}" for script in TUTORIALS} <= listed


@pytest.mark.parametrize("script", [*TUTORIALS, *WITH_CODE], ids=lambda script: script.stem)
def test_tutorials_and_pages_use_public_names_only(script):
    code = script.read_text()
    tree = ast.parse(code if script in TUTORIALS else "\n".join(FENCE.findall(code)))
    modules = {"smcdiff": smcdiff}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "smcdiff":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert alias.name in module.__all__, f"{node.module}.{alias.name} is not public"
                if inspect.ismodule(getattr(module, alias.name)):
                    modules[alias.asname or alias.name] = getattr(module, alias.name)
    used = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert node.attr in modules[node.value.id].__all__, f"{node.value.id}.{node.attr} is not public"
            used += 1
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), f"{script.name} uses the private {node.attr}"
    assert used or script not in TUTORIALS


def test_no_tutorial_and_no_code_is_missed():
    assert TUTORIALS and {"README.md", "getting_started.md"} <= {path.name for path in WITH_CODE}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Shape (K, *event_shape).", r"Shape (K, \*event_shape)."),
        ("weights |w|", r"weights \|w\|"),
        ("`jax.tree_util.Partial`s of ``*args``", r"`jax.tree_util.Partial`\ s of ``*args``"),
        ("a trailing_ underscore", r"a trailing\_ underscore"),
    ],
)
def test_docstrings_are_escaped_outside_of_code(text, expected):
    assert extension("docstrings").escape(text) == expected


def test_docstring_sections_end_before_free_text():
    lines = [
        "One.",
        "",
        "Parameters",
        "----------",
        "x",
        "    What.",
        "",
        "Afterwards.",
        "",
        "Source: A paper.",
    ]
    assert extension("docstrings").convert(lines, is_module=False)[7:] == [
        *("Notes", "-----", "Afterwards.", ""),
        *("", "References", "----------", "A paper."),
    ]


@pytest.mark.slow
def test_documentation_builds_without_warnings(tmp_path):
    for package in ("sphinx", "myst_nb", "furo", "jupytext"):
        pytest.importorskip(package, reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    built = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees"), str(DOCS), str(tmp_path / "html")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-5000:]
    assert (tmp_path / "html" / "tutorials" / "generated" / "01_inpainting.html").is_file()
