"""What importing smcdiff does, and what its modules export."""

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import smcdiff

MODULES = ["smcdiff"] + sorted(
    module.name
    for module in pkgutil.walk_packages(smcdiff.__path__, "smcdiff.")
    if not module.name.endswith("__main__") and "._models" not in module.name
)

# Imports modules in a fresh process and reports what this has changed there, and what the first has brought along.
# The dependencies come first: BlackJAX evaluates log(2) when it is imported, which is not ours to answer for.
PROBE = """
import importlib, json, os, sys, warnings
import jax, numpy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz, blackjax, diffrax, equinox, matplotlib, numpyro, optax

compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda event, duration, **_: compiled.append(event))
def state():
    random = numpy.random.get_state()  # noqa: NPY002
    return {
        "arrays": len(jax.live_arrays()),
        "jax.config": {name: repr(value) for name, value in jax.config.values.items()},
        "environment": dict(os.environ),
        "numpy.random": repr((random[1].tolist(), random[2:])),
        "warnings.filters": repr(warnings.filters),
        "matplotlib.rcParams": repr(dict(matplotlib.rcParams)),
        "compiled": [event for event in compiled if "compile" in event],
    }

before = state()
warnings_seen = []
warnings.showwarning = lambda message, *_, **__: warnings_seen.append(repr(message))
importlib.import_module(sys.argv[1])
optional = [name for name in ("torch", "diffusers", "sklearn", "h5netcdf") if name in sys.modules]
for name in sys.argv[2:]:
    importlib.import_module(name)
after = state()
print(json.dumps({
    "changed": {what: [before[what], after[what]] for what in before if before[what] != after[what]},
    "warnings": warnings_seen,
    "optional": optional,
}))
"""


def _probe(*modules):
    command = [sys.executable, "-c", PROBE, *modules]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return _probe(*MODULES)


def test_import_makes_no_array_and_configures_nothing(found):
    assert found["changed"] == {}
    assert found["warnings"] == []


def test_import_needs_no_optional_package(found):
    assert MODULES[0] == "smcdiff"
    # ArviZ 0.x reads h5netcdf itself.
    assert set(found["optional"]) <= {"h5netcdf"}


def test_probe_sees_what_it_must_see(tmp_path, monkeypatch):
    (tmp_path / "rude.py").write_text(
        "import warnings, jax, jax.numpy as jnp\n"
        "ONE = jnp.ones(3)\n"
        "HALF = float(jnp.sqrt(0.25))\n"
        "jax.config.update('jax_enable_x64', True)\n"
        "warnings.warn('hello')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = _probe("rude")
    assert {"arrays", "compiled", "jax.config"} <= set(found["changed"])
    assert len(found["warnings"]) == 1


@pytest.mark.parametrize("name", MODULES)
def test_exported_names_exist_and_say_what_they_are(name):
    module = importlib.import_module(name)
    if not Path(module.__file__).read_text().strip():
        return  # a folder's empty __init__.py
    assert module.__doc__, f"{name} has no docstring"
    if name.rpartition(".")[2].startswith("_"):
        return
    exported = module.__all__
    assert len(set(exported)) == len(exported), f"{name}.__all__ repeats a name"
    missing = [public for public in exported if not hasattr(module, public)]
    assert missing == [], f"{name}.__all__ names what is not there"
    assert [public for public in exported if not _documented(getattr(module, public))] == []


def _documented(thing):
    """Whether a public object has a docstring of its own; constants and type aliases need none."""
    if inspect.isclass(thing):
        own = (thing.__doc__ or "").strip()
        # A NamedTuple or dataclass without a docstring gets its signature as one.
        return bool(own) and not own.startswith(f"{thing.__name__}(")
    return not (inspect.isroutine(thing) or inspect.ismodule(thing)) or bool(inspect.getdoc(thing))
