"""Results as ArviZ data, on either ArviZ line."""

import arviz
import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

import smcdiff
from smcdiff import guidance, inverse, schedules

pytestmark = pytest.mark.lenient_promotion


@pytest.fixture(scope="module")
def problem():
    observed = np.array([[True, False, True], [False, True, True]])
    return inverse.InverseProblem(inverse.mask(observed), jnp.asarray([0.5, -1.0, 0.3, 2.0]), 0.4)


@pytest.fixture(scope="module")
def result(problem):
    model = smcdiff.GaussianDiffusion(np.arange(6.0).reshape(2, 3) / 3, 0.8, schedules.cosine())
    return smcdiff.posterior(
        jax.random.key(0),
        model,
        problem,
        num_particles=200,
        num_chains=4,
        num_steps=40,
        twist=guidance.moment_matching(),
        progress=False,
    )


@pytest.fixture(scope="module")
def tree(result, problem):
    return smcdiff.to_arviz(
        result,
        dims={"x": ["row", "col"]},
        coords={"row": [10, 20]},
        problem=problem,
        constant_data={"truth": np.ones((2, 3))},
        prior=np.zeros((7, 2, 3)),
        attrs={"seed": 0},
    )


def test_groups_dims_and_coords(tree, result):
    posterior = tree["posterior"]
    assert dict(posterior.sizes) == {"chain": 4, "draw": 200, "row": 2, "col": 3}
    assert posterior["x"].dims == ("chain", "draw", "row", "col")
    assert list(posterior["row"].values) == [10, 20]
    assert tree["prior"]["x"].shape == (1, 7, 2, 3)
    np.testing.assert_array_equal(tree["constant_data"]["truth"], np.ones((2, 3)))
    np.testing.assert_allclose(tree["constant_data"]["noise_std"], np.full(4, 0.4), rtol=1e-6)
    np.testing.assert_array_equal(tree["observed_data"]["y"], np.array([0.5, -1.0, 0.3, 2.0], np.float32))
    assert tree.attrs["seed"] == 0


def test_the_weighted_history_is_kept_by_step(tree, result):
    group = tree["smc"]
    assert group["log_weights"].dims == ("chain", "step", "particle")
    assert group["log_weights"].shape == (4, 40, 200)
    np.testing.assert_array_equal(group["log_weights"][:, -1], result.log_weights)
    np.testing.assert_allclose(group["log_evidence"][:, -1], result.log_evidence, rtol=1e-5)
    np.testing.assert_array_equal(group["ess"], result.info.ess)
    np.testing.assert_array_equal(group["resampled"], result.info.resampled)


def test_draws_are_equally_weighted_and_name_their_particle(tree, result):
    draws, particle = tree["posterior"]["x"].values, tree["sample_stats"]["particle"].values
    np.testing.assert_array_equal(
        draws, np.take_along_axis(result.particles, particle[:, :, None, None], axis=1)
    )
    weights = np.exp(np.asarray(result.log_weights, float))
    mean = np.einsum("cn,cnij->cij", weights, result.particles)
    # Systematic resampling: counts are within one of N w, so means move by less than sum|x|/N.
    assert np.all(np.abs(draws.mean(1) - mean) < np.abs(result.particles).sum(1) / 200)
    counts = np.stack([np.bincount(row, minlength=200) for row in particle])
    assert np.all(np.abs(counts - 200 * weights) < 1 + 1e-3)


def test_arviz_reads_it(tree):
    summary = arviz.summary(tree, var_names=["x"])
    assert len(summary) == 6
    rhat = [column for column in summary.columns if "hat" in column]
    assert rhat and np.all(summary[rhat[0]].astype(float) < 1.2)


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning")
@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_round_trip_through_a_file(tree, tmp_path, kind):
    path = str(tmp_path / f"result.{kind}")
    # ArviZ 0.x writes no zarr 3 itself, but converts to the DataTree that ArviZ 1 uses throughout.
    written = tree if isinstance(tree, xarray.DataTree) else tree.to_datatree()
    getattr(written, f"to_{kind}")(path)
    with xarray.open_datatree(path, engine="h5netcdf" if kind == "netcdf" else "zarr") as read:
        for group in ("posterior", "sample_stats", "observed_data", "constant_data", "prior", "smc"):
            assert set(read[group].data_vars) == set(tree[group].data_vars)
        np.testing.assert_array_equal(read["posterior"]["x"].values, tree["posterior"]["x"].values)


def _logdensity(x):
    return -0.5 * jnp.sum(x["a"] ** 2) - 0.5 * (x["b"] - 1.0) ** 2


def test_a_markov_chain_with_named_variables():
    algorithm = blackjax.hmc(_logdensity, 0.5, jnp.ones(4), 3)
    start = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}
    trace = smcdiff.run(jax.random.key(0), algorithm, 40, position=start, num_chains=2, progress=False)
    tree = smcdiff.to_arviz(trace, dims={"a": ["k"]})
    assert tree["posterior"]["a"].dims == ("chain", "draw", "k")
    assert tree["posterior"]["b"].shape == (2, 40)
    np.testing.assert_array_equal(tree["posterior"]["b"], trace.samples["b"])
    stats = tree["sample_stats"]
    np.testing.assert_array_equal(stats["acceptance_rate"], trace.info.acceptance_rate)
    np.testing.assert_array_equal(stats["diverging"], trace.info.is_divergent)
    np.testing.assert_array_equal(stats["n_steps"], trace.info.num_integration_steps)


def test_bad_input(result):
    with pytest.raises(TypeError, match="SMCResult or a Trace"):
        smcdiff.to_arviz(np.zeros((4, 10)))
    with pytest.raises(ValueError, match=r"dims\['x'\] must name 2 axes"):
        smcdiff.to_arviz(result, dims={"x": ["pixel"]})
