"""Particles and chains spread over devices: the numbers of one device. Eight devices are forced in a process apart."""

import os
import re
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import smcdiff
import fk_cases
from test_run import START, walk

assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("devices",))
key = jax.random.key(0)

def smc(**options):
    fk = fk_cases.gaussian().fk
    return smcdiff.run_smc(key, fk, 64, num_chains=2, progress=False, ess_threshold=0.5, **options)

one, many = smc(), smc(sharding=NamedSharding(mesh, P(None, "devices")))
assert one.info.resampled.any() and not one.info.resampled.all()
np.testing.assert_array_equal(one.info.ancestors, many.info.ancestors)
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)

position = jax.numpy.concatenate([START, START + 1, START[:2]])
def chains(**options):
    return smcdiff.run(key, walk(), 6, position=position, num_chains=8, progress=False, **options)

one, many = chains(), chains(sharding=NamedSharding(mesh, P("devices")))
assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(many.state)} == {8}
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    np.testing.assert_array_equal(a, b)
print("equal")
"""


def test_eight_devices_give_the_numbers_of_one():
    """Sums over particles are split over devices, so floats may differ in the last digit; decisions may not."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "equal"
