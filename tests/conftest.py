"""Strict numerics for every test, and a machine of two devices.

Ranks and dtypes that only fit after silent promotion raise here: that is how shape bugs and float64 leaks are found.
The configuration is the tests', never the library's: `smcdiff` must run under a user's lenient JAX and under this one.
"""

import gc
import os
from pathlib import Path

# Read when JAX starts its backend, hence before anything here imports it. `setdefault`: a run on a GPU names its own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# Two host devices, so that sharding over particles and chains is tested on any machine.
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _FLAGS:
    os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=2".strip()

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# Tracing makes millions of objects that die at once or stay: the collector looks at them less often, and at those of
# the imports never.
gc.set_threshold(200_000, 20, 20)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


_MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def _free_programs():
    """Drop compiled programs before they are too many: each holds memory maps, of which Linux gives a process 65 530.

    Not after every module: the small ones serve the next module too, and dropping takes seconds.
    """
    yield
    if not _MAPS.exists() or _MAPS.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _promotion(request):
    """Turn strict promotion off where a test says that code which is not ours needs it."""
    if request.node.get_closest_marker("lenient_promotion") is None:
        yield
        return
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
