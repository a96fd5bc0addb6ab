"""Genealogies: by hand, against walking back one line at a time, and against marks that particles carry."""

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import smcdiff
from smcdiff.smc import FeynmanKac, run_smc
from smcdiff.smc.genealogy import ancestor_lines, common_ancestor_step, families, unique_ancestors

# Four particles, three steps, of which the second does not resample:
#
#   cloud 0    0   1   2   3
#   step 0     1 -> 0, 1    2 -> 2    3 -> 3
#   step 2     0 -> 0, 1    1 -> 2    2 -> 3
ANCESTORS = np.array([[1, 1, 2, 3], [0, 1, 2, 3], [0, 0, 1, 2]])


def test_by_hand():
    lines = [[1, 1, 1, 2], [0, 0, 1, 2], [0, 0, 1, 2], [0, 1, 2, 3]]
    assert np.array_equal(ancestor_lines(ANCESTORS), lines)
    assert np.array_equal(unique_ancestors(ANCESTORS), [2, 3, 3, 4])
    assert common_ancestor_step(ANCESTORS) == -1
    assert np.array_equal(families(ANCESTORS), [[1, 1, 2, 3], [1, 1, 2, 3], [1, 1, 1, 2]])
    assert np.array_equal(families(ANCESTORS, 1), ANCESTORS)
    assert np.array_equal(families(ANCESTORS, 2), [[1, 1, 2, 3], [1, 1, 2, 3], [0, 0, 1, 2]])
    met = np.concatenate([ANCESTORS, [[1, 1, 0, 0], [2, 2, 3, 3]]])
    assert common_ancestor_step(met) == 3  # particles 2 and 3 of cloud 4, whose parent is 0
    assert np.array_equal(unique_ancestors(met), [1, 1, 1, 1, 2, 4])


def test_against_walking_back():
    rng = np.random.default_rng(0)
    ancestors = rng.integers(0, 9, size=(7, 9))
    lines = ancestor_lines(ancestors)
    for i in range(9):
        walker = i
        for k in range(7, 0, -1):
            assert lines[k, i] == walker
            walker = ancestors[k - 1, walker]
        assert lines[0, i] == walker
    for lag in (1, 3, 100, None):
        for step in range(7):
            back = ancestor_lines(ancestors[: step + 1])
            first = 0 if lag is None else max(0, step + 1 - lag)
            assert np.array_equal(families(ancestors, lag)[step], back[first])


@pytest.mark.parametrize("lag", [0, -1, 2.5, True, "all"])
def test_bad_lag(lag):
    with pytest.raises(ValueError, match="lag is a number of steps, at least 1"):
        families(ANCESTORS, lag)


_STEPS = 12


def _marked_init(spread, rng_key):
    """Position and marks: what each ancestor drew at its own step, kept by all its descendants."""
    marks = jnp.zeros(_STEPS + 1).at[0].set(jax.random.uniform(rng_key))
    return (jnp.zeros(()), marks), jnp.zeros(())


def _marked_step(spread, rng_key, particle, k):
    x, marks = particle
    x = jax.random.normal(rng_key, ())
    return (x, marks.at[k + 1].set(x)), spread * x


@pytest.fixture(scope="module")
def result():
    fk = FeynmanKac(Partial(_marked_init, jnp.asarray(0.8)), Partial(_marked_step, jnp.asarray(0.8)), _STEPS)
    return run_smc(jax.random.key(0), fk, 30, num_chains=3, progress=False)


def test_lines_are_those_of_the_particles(result):
    """Two final particles have the same mark of cloud k exactly if they have the same ancestor in it."""
    resampled = np.asarray(result.info.resampled)
    assert resampled.any() and not resampled.all()
    marks = np.asarray(result.particles[1])
    lines, unique = result.ancestor_lines(), result.unique_ancestors()
    assert lines.shape == (3, _STEPS + 1, 30)
    for chain in range(3):
        for k in range(_STEPS + 1):
            same_mark = marks[chain, :, None, k] == marks[chain, None, :, k]
            assert np.array_equal(same_mark, lines[chain, k][:, None] == lines[chain, k][None, :])
            assert unique[chain, k] == len(np.unique(marks[chain, :, k]))
        met = [k for k in range(_STEPS + 1) if len(np.unique(marks[chain, :, k])) == 1]
        assert result.common_ancestor_step()[chain] == max(met, default=-1)


@pytest.mark.lenient_promotion
def test_arviz_group(result):
    tree = smcdiff.to_arviz(result)
    group = tree["smc"]
    assert group["unique_ancestors"].dims == ("chain", "step")
    # `ancestors` of a step points into the cloud that `unique_ancestors` of that step counts.
    for chain in range(3):
        last = np.unique(group["ancestors"].values[chain, -1])
        assert group["unique_ancestors"].values[chain, -1] == len(last)
        before = np.unique(group["ancestors"].values[chain, -2][last])
        assert group["unique_ancestors"].values[chain, -2] == len(before)
    assert group["log_evidence_std_error"].dims == ("chain",)
    np.testing.assert_array_equal(group["log_evidence_std_error"], result.log_evidence_std_error())
    assert len(arviz.summary(tree, var_names=["x"] if "x" in tree["posterior"] else None)) > 0
