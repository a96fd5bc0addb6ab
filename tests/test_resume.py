"""Runs that are interrupted and go on: the same numbers to the last bit, whenever the process was killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import fk_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smcdiff
from smcdiff.checkpoints.progress import RunFolder, fingerprint

HERE = Path(__file__).parent


def run(checkpoint=None, seed=0, **options):
    options = {"num_chains": 2, "chunk_size": 1, "progress": False, **options}
    return smcdiff.run_smc(jax.random.key(seed), fk_cases.gaussian().fk, 16, checkpoint=checkpoint, **options)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch, after):
    """Killed before the chunk is written, then between the chunk and the state, then in the middle of a file."""
    whole = run()
    written = []
    replace = os.replace

    def dying(source, target):
        written.append(target)
        if len(written) == 2 * after:  # a chunk and a state each
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        run(tmp_path / "run")
    monkeypatch.undo()
    (tmp_path / "run" / f"chunk-{after:05d}.safetensors").write_bytes(b"half a chunk")
    (tmp_path / "run" / "state.safetensors.partial").write_bytes(b"half a state")
    equal(run(tmp_path / "run"), whole)
    equal(run(tmp_path / "run"), whole)  # a finished run is read, not run again


def test_only_what_is_left_is_run(tmp_path, monkeypatch):
    run(tmp_path / "run")
    runner = sys.modules["smcdiff.run"]  # the function of this name hides the module
    monkeypatch.setattr(runner, "_chunk", _Forbidden(runner._chunk))
    run(tmp_path / "run")


class _Forbidden:
    """A compiled program that may be asked for its shapes, and may not run."""

    def __init__(self, program):
        self.eval_shape = program.eval_shape

    def __call__(self, *args):
        raise AssertionError("a finished run ran again")


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"chunk_size": 2}, {"num_chains": 3}, {"resampling_fn": smcdiff.smc.multinomial}]
)
def test_another_runs_folder_is_refused(tmp_path, options):
    run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"belongs to another run|holds other arrays|the tree needs"):
        run(tmp_path / "run", **options)


def test_random_keys_in_the_state_survive(tmp_path):
    """A state may hold keys: they are saved as their data and come back as keys."""
    state = {"key": jax.random.key(3), "x": jnp.arange(3.0)}
    folder = RunFolder(tmp_path, fingerprint(state))
    folder.save(0, state, {"y": np.ones(2)})
    found, [outputs] = folder.load(
        {**state, "x": jnp.zeros(3)}, [{"y": jax.ShapeDtypeStruct((2,), np.float64)}]
    )
    assert jnp.array_equal(jax.random.key_data(found["key"]), jax.random.key_data(state["key"]))
    assert jnp.array_equal(found["x"], state["x"]) and outputs["y"].shape == (2,)
    assert fingerprint(state) != fingerprint({**state, "key": jax.random.key(4)})


_SCRIPT = """
import sys, time
import test_resume
from smcdiff.checkpoints.progress import RunFolder
save = RunFolder.save
def slow(self, chunk, state, outputs):
    save(self, chunk, state, outputs)
    print(chunk, flush=True)
    time.sleep(0.2 if chunk < 2 else 60.0)
RunFolder.save = slow
test_resume.run(sys.argv[1])
"""


def test_a_killed_process_leaves_a_run_that_goes_on(tmp_path):
    """SIGKILL, which no handler sees, after the third chunk of five."""
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE) as process:
        while process.stdout.readline().strip() != "2":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "run").glob("chunk-*"))) == 3
    equal(run(tmp_path / "run"), run())
