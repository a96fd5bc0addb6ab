"""Particles spread over the devices of several processes, as of several hosts: the numbers of one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

_SCRIPT = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

address, num_processes, index, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if num_processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes, index)
import smcdiff
import fk_cases

assert jax.process_count() == num_processes and len(jax.devices()) == 2 * num_processes
mesh = jax.make_mesh((len(jax.devices()),), ("devices",))
result = smcdiff.run_smc(
    jax.random.key(0), fk_cases.gaussian().fk, 64, num_chains=2, progress=False,
    sharding=NamedSharding(mesh, P(None, "devices")),
)
leaves = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(result))}
np.savez(path, ancestors=result.info.ancestors, **leaves)
"""


def run_processes(num_processes, folder):
    """Results of a run over all devices of some processes with two devices each, one a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    paths = [folder / f"{num_processes}-{index}.npz" for index in range(num_processes)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, address, str(num_processes), str(index), str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parent,
        )
        for index, path in enumerate(paths)
    ]
    try:
        for process in processes:
            _, message = process.communicate(timeout=300)
            assert process.returncode == 0, message[-2000:]
    finally:
        for process in processes:
            process.kill()
    return [dict(np.load(path)) for path in paths]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Sums over particles are split over processes, so floats may differ in the last digit; decisions may not."""
    (one,) = run_processes(1, tmp_path)
    for several in run_processes(2, tmp_path):  # every process has the whole result
        np.testing.assert_array_equal(several["ancestors"], one["ancestors"])
        assert several.keys() == one.keys() and len(one) > 5
        for name, leaf in one.items():
            np.testing.assert_allclose(several[name], leaf, rtol=2e-6, atol=2e-6)
