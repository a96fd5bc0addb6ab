"""Mixtures and cycles of kernels, and Gibbs sampling: they leave exact laws alone, and each part does its share.

Statistical checks allow 5 standard errors over independent chains, which start in the exact law: a false failure has a
probability of about 6e-7 a check, and keys are fixed.
"""

from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from rows import quick
from scipy.special import digamma

import smcdiff
from smcdiff import mcmc
from smcdiff.arviz_io.statistics import chain_statistics
from smcdiff.mcmc.blocks import exact_draw, gibbs
from smcdiff.mcmc.combinators import PositionState, cycle, mixture
from smcdiff.mcmc.hamiltonian import ghmc, hmc
from smcdiff.mcmc.langevin import mala

Z = 5.0
CHAINS = 6000
_traces = []


def law():
    return smcdiff.GaussianMixture.create(
        [0.5, 0.2, 0.3], [[2.0, 0.5], [-1.5, 1.0], [0.0, -2.0]], np.array([[0.3, 0.1], [0.1, 0.2]])
    )


def _walk(step, rng_key, position):
    return step * jax.random.normal(rng_key, jnp.shape(position))


def parts(target):
    """Kernels whose states, infos and evaluations differ."""
    return [
        mala(target, 0.05),
        ghmc(target, 0.25, 2),
        blackjax.additive_step_random_walk(target.logdensity, Partial(_walk, jnp.asarray(1.0))),
        SamplingAlgorithm(_stay_init, _stay),
    ]


class _NoRate(NamedTuple):
    """An info as of BlackJAX's slice samplers."""

    is_accepted: jax.Array


def _stay_init(position, rng_key=None):
    return PositionState(position)


def _stay(rng_key, state):
    return state, _NoRate(jnp.zeros((), bool))


def run(algorithm, num_steps, position, num_chains=CHAINS):
    return smcdiff.run(
        jax.random.key(0),
        algorithm,
        num_steps,
        position=position,
        num_chains=num_chains,
        chunk_size=1,
        thin=num_steps,
        progress=False,
    )


def assert_moments(values, exact, name=""):
    values = np.asarray(values, float)
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    assert np.all(np.abs(values.mean(0) - exact) < Z * error), (name, (values.mean(0) - exact) / error)


def second_moments(x):
    return np.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], axis=1)


@pytest.mark.parametrize("how", quick(["mixture", "cycle"], "mixture"))
def test_kernels_of_kernels_keep_the_law(how):
    target = law()
    kernels = parts(target)
    algorithm = mixture(kernels, [3.0, 0.0, 5.0, 2.0]) if how == "mixture" else cycle(kernels)
    start = target.sample(jax.random.key(1), CHAINS)
    trace = run(algorithm, 5, start)
    x = np.asarray(trace.state.position)
    mean = np.asarray(target.mean(), float)
    second = np.asarray(target.covariance(), float) + np.outer(mean, mean)
    assert_moments(second_moments(x), [*mean, second[0, 0], second[0, 1], second[1, 1]])
    assert np.mean(np.sum((x - start) ** 2, axis=1)) > 0.3 and x.dtype == np.float32
    info = trace.info
    if how == "mixture":
        shares = np.bincount(info.chosen[:, 0], minlength=4) / CHAINS
        assert np.all(np.abs(shares - [0.3, 0.0, 0.5, 0.2]) <= Z * np.sqrt(0.25 / CHAINS)) and shares[1] == 0
        assert np.all(info.acceptance_rate[info.chosen == 3] == 1.0)  # which reports none
    else:
        rates = [part.acceptance_rate for part in info.parts[:3]]
        assert all(rate.mean() > 0.25 for rate in rates)
        np.testing.assert_allclose(info.acceptance_rate, (sum(rates) + 1.0) / 4, rtol=1e-5)


def _two_steps(target, step_size):
    return mcmc.hmc(target, step_size, 2)


DIVERGING = {
    "mixture": lambda build: mixture([build(1e4), build(2e4)], [0.5, 0.5]),
    "cycle": lambda build: cycle([build(0.1), build(1e4)]),
    "parallel tempering": lambda build: mcmc.parallel_tempering(
        mcmc.tempered(law()), jnp.asarray([1.0, 0.5]), _two_steps, jnp.asarray([0.1, 1e4])
    ),
}


@pytest.mark.parametrize("name", quick(DIVERGING, "mixture", "parallel tempering"))
def test_what_a_part_says_of_divergence_is_not_lost(name):
    target, build = law(), Partial(_two_steps, law())
    info = run(DIVERGING[name](build), 1, target.sample(jax.random.key(2), 5), 5).info
    assert chain_statistics(info)["diverging"].all()
    calm = mixture([build(0.1), build(0.2)], [0.5, 0.5])
    assert not run(calm, 1, target.sample(jax.random.key(2), 5), 5).info.is_divergent.any()


# Gibbs ---------------------------------------------------------------------------------------------------------------
# x, z Gaussian with correlation 0.8 and means (1, -2); given them w ~ Gamma(3 + x^2, rate 2), of which log w is kept.

CORRELATION = 0.8
_MEAN = np.array([1.0, -2.0])


def _joint(scale, position):
    _traces.append(None)
    x, z, log_w = (position["x"][0] - _MEAN[0]) / scale, position["z"] - _MEAN[1], position["log_w"]
    quadratic = (x**2 - 2 * CORRELATION * x * z + z**2) / (1 - CORRELATION**2)
    shape = 3.0 + position["x"][0] ** 2
    gamma = shape * log_w - 2.0 * jnp.exp(log_w) + shape * jnp.log(2.0) - jax.lax.lgamma(shape)
    return -0.5 * quadratic + gamma


def _draw_log_w(rng_key, rest):
    return jax.random.loggamma(rng_key, 3.0 + rest["x"][0] ** 2) - jnp.log(2.0)


def exact(rng_key, num, scale=1.0):
    key_x, key_z, key_w = jax.random.split(rng_key, 3)
    x = jax.random.normal(key_x, (num,))
    z = CORRELATION * x + np.sqrt(1 - CORRELATION**2) * jax.random.normal(key_z, (num,))
    x = _MEAN[0] + scale * x
    return {
        "x": x[:, None],
        "z": _MEAN[1] + z,
        "log_w": jax.random.loggamma(key_w, 3.0 + x**2) - jnp.log(2.0),
    }


def _mala(step_size, density):
    return mala(density, step_size)


def _blackjax_hmc(density):
    return blackjax.hmc(density.logdensity, 0.5, jnp.ones(1), 3)


def _hmc(density):
    return hmc(density, 0.5, 3)


BLOCKS = {
    "three blocks": {"x": Partial(_mala, 0.1), "z": _blackjax_hmc, "log_w": exact_draw(_draw_log_w)},
    "two blocks": {("z", "log_w"): _hmc, ("x",): Partial(_mala, 0.1)},
}


def values(position):
    x, z, log_w = position["x"][:, 0], position["z"], position["log_w"]
    w = np.exp(log_w)
    return np.stack([x, z, x**2, x * z, z**2, w, x * w, w**2], axis=1)


def exact_values():
    # With s = 3 + x^2: E[w | x] = s/2, E[w^2 | x] = s (s + 1)/4, and x ~ N(1, 1): E x^2 = 2, E x^3 = 4, E x^4 = 10.
    m, n = _MEAN
    return [
        m,
        n,
        1 + m**2,
        CORRELATION + m * n,
        1 + n**2,
        (3 + 2) / 2,
        (3 * 1 + 4) / 2,
        (9 + 6 * 2 + 10 + 3 + 2) / 4,
    ]


@pytest.mark.parametrize("case", quick(BLOCKS, "three blocks"))
def test_gibbs_keeps_the_joint_law(case):
    algorithm = gibbs(Partial(_joint, jnp.asarray(1.0)), BLOCKS[case])
    start = exact(jax.random.key(2), CHAINS)
    assert_moments(values(jax.tree.map(np.asarray, start)), exact_values(), "start")
    trace = run(algorithm, 5, start)
    position = trace.state.position
    assert_moments(values(position), exact_values(), case)
    # E log w given x is digamma(s) - log 2, in every chain.
    gap = position["log_w"] - (digamma(3.0 + position["x"][:, 0].astype(float) ** 2) - np.log(2.0))
    assert_moments(np.stack([gap, gap * position["x"][:, 0]], axis=1), [0.0, 0.0], case)
    rates = trace.info.block_acceptance_rates
    assert rates.shape == (CHAINS, 1, len(BLOCKS[case])) and np.all(rates.mean((0, 1)) > 0.5)
    np.testing.assert_allclose(trace.info.acceptance_rate, rates.mean(-1), rtol=1e-5)
    for name, entry in position.items():
        assert np.mean(entry != np.asarray(start[name])) > 0.8, name
    # Another target of the same form and other step sizes need no new trace.
    before = len(_traces)
    blocks = {
        name: Partial(_mala, 0.2) if name in ("x", ("x",)) else part for name, part in BLOCKS[case].items()
    }
    run(gibbs(Partial(_joint, jnp.asarray(2.0)), blocks), 5, start)
    assert len(_traces) == before


@pytest.mark.slow
def test_gibbs_from_far_away_finds_the_law():
    blocks = {"x": Partial(_mala, 0.2), "z": Partial(_mala, 0.3), "log_w": exact_draw(_draw_log_w)}
    algorithm = gibbs(Partial(_joint, jnp.asarray(1.0)), blocks)
    start = {"x": jnp.full((2000, 1), -3.0), "z": jnp.full(2000, 3.0), "log_w": jnp.full(2000, 3.0)}
    position = run(algorithm, 200, start, 2000).state.position
    assert_moments(values(position), exact_values())


class _ScoreOnly:
    def score(self, x):
        return {"a": -(x["a"] - 0.5 * x["b"]), "b": -(x["b"] - 0.5 * x["a"])}


def test_gibbs_with_a_score_only():
    def block(density):
        assert not hasattr(density, "logdensity")
        return hmc(density, 0.5, 2, accept="line_integral")

    algorithm = gibbs(_ScoreOnly(), {"a": block, "b": block})
    key_a, key_b = jax.random.split(jax.random.key(3))
    a = np.sqrt(4 / 3) * jax.random.normal(key_a, (CHAINS,))
    start = {"a": a, "b": 0.5 * a + jax.random.normal(key_b, (CHAINS,))}
    position = run(algorithm, 3, start).state.position
    a, b = position["a"], position["b"]
    assert_moments(np.stack([a, b, a**2, a * b, b**2], axis=1), [0, 0, 4 / 3, 2 / 3, 4 / 3])


def test_what_is_refused():
    target = law()
    with pytest.raises(ValueError, match=r"weights must have the shape \(4,\), got \(2,\)"):
        mixture(parts(target), [0.5, 0.5])
    with pytest.raises(ValueError, match="weights must be non-negative and finite, and not all zero"):
        mixture(parts(target), [1.0, 1.0, 1.0, -1.0])
    with pytest.raises(ValueError, match="cycle needs at least one algorithm"):
        cycle([])
    with pytest.raises(TypeError, match="cycle needs SamplingAlgorithms, got function"):
        cycle([_joint])
    with pytest.raises(ValueError, match="blocks must name at least one block"):
        gibbs(_joint, {})
    with pytest.raises(
        TypeError, match=r"blocks\['x'\] must be a function density -> SamplingAlgorithm, got float"
    ):
        gibbs(_joint, {"x": 0.1})
    with pytest.raises(ValueError, match=r"step_size must be positive and finite, got -0\.1"):
        gibbs(_joint, {"x": Partial(mcmc.mala, step_size=-0.1)})
    start = {"x": jnp.zeros(1), "z": jnp.zeros(()), "log_w": jnp.zeros(())}
    for blocks in ({"x": _hmc}, {**BLOCKS["three blocks"], "y": _hmc}):
        with pytest.raises(
            ValueError, match=r"blocks must name the entries \['log_w', 'x', 'z'\], and only these"
        ):
            gibbs(Partial(_joint, 1.0), blocks).init(start, jax.random.key(0))
    with pytest.raises(TypeError, match="gibbs needs a position that is a dictionary"):
        gibbs(Partial(_joint, 1.0), {"x": _hmc}).init(jnp.zeros(2), jax.random.key(0))
