"""Chain diagnostics are ArviZ's, NaN included; one pass says what the formulas say of all draws."""

import functools
import warnings

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.special import ndtri

from smcdiff import diagnostics
from smcdiff.diagnostics import ranks

SHAPES = {(4, 60): 0, (1, 10): 1, (3, 4): 2, (2, 9): 3}  # chains and draws: seed
BLOCK = 16  # of the 50 entries: three blocks, and one that overlaps


def kinds(num_chains, num_draws):
    """Arrays (chain, draw) of 50 kinds, by name; float64."""
    rng = np.random.default_rng(SHAPES[num_chains, num_draws])
    chain, draw = np.arange(num_chains)[:, None], np.arange(num_draws)[None]
    found = {}

    def normal():
        return rng.normal(size=(num_chains, num_draws))

    def autoregressive(rho):
        return lfilter([1], [1, -rho], normal(), axis=1)

    for i in range(3):
        found |= {
            f"independent {i}": normal(),
            f"slow {i}": autoregressive(0.9),
            f"correlated {i}": autoregressive(0.5),
            f"antithetic {i}": autoregressive(-0.9),
            f"Cauchy {i}": rng.standard_cauchy(size=(num_chains, num_draws)),
            f"lognormal {i}": np.exp(2 * normal()),
            f"Poisson {i}": rng.poisson(3, size=(num_chains, num_draws)).astype(float),
            f"binary {i}": (normal() > 0.3).astype(float),
            f"rounded {i}": np.round(autoregressive(0.5), 1),
            f"repeats {i}": np.repeat(normal(), 3, axis=1)[:, :num_draws],
            f"chains apart {i}": normal() + chain,
            f"scales apart {i}": normal() * (1 + chain),
            f"drift {i}": normal() + 3 * draw / num_draws,
            f"far from zero {i}": 100 + normal(),
        }
    return found | {
        "constant": np.full((num_chains, num_draws), 2.5),
        "NaN": np.where(draw == 2, np.nan, normal()),
        "infinite": np.where(draw == 2, np.inf, normal()),
        "alternating": np.tile((-1.0) ** draw, (num_chains, 1)),
        "two values": np.where(normal() > 0, 1.0, -1.0),
        "small": 1e-3 * normal(),
        "one value often": np.where(normal() > 0.5, normal(), 0.0),
        "bounded": np.clip(normal(), -0.5, 1.0),
    }


def stacked(num_chains, num_draws):
    return np.stack(list(kinds(num_chains, num_draws).values()), axis=-1)


def expected(y):
    """ArviZ's diagnostics of an array (chain, draw), and NumPy's moments."""
    square = (y - y.mean()) ** 2
    q5, median, q95 = np.quantile(y, [0.05, 0.5, 0.95])
    variance, ess_square = square.mean(), az.ess(square, method="mean")
    return {
        "rhat": az.rhat(y),
        "ess_bulk": az.ess(y),
        "ess_tail": az.ess(y, method="tail", prob=(0.05, 0.95)),
        "ess_mean": az.ess(y, method="mean"),
        "mcse_mean": az.mcse(y),
        # As ArviZ has it, whose own cannot be called with every NumPy.
        "mcse_sd": np.sqrt(np.maximum((square**2).mean() - variance**2, 0) / ess_square / variance / 4),
        "mean": y.mean(),
        "sd": y.std(ddof=1),
        "q5": q5,
        "median": median,
        "q95": q95,
    }


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("shape", SHAPES)
def test_chain_diagnostics_are_arvizs(double, shape):
    arrays = kinds(*shape)
    found = diagnostics.chain_diagnostics(stacked(*shape), block_size=BLOCK)
    assert all(leaf.shape == (len(arrays),) and leaf.dtype == np.float64 for leaf in found)
    for k, (name, y) in enumerate(arrays.items()):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            wanted = expected(y)
        for field, value in wanted.items():
            if field[0] == "q" and np.isinf(y).any():
                continue  # NumPy's quantile next to infinity is NaN
            np.testing.assert_allclose(
                getattr(found, field)[k],
                np.squeeze(value),
                rtol=1e-5,
                atol=1e-9 * (field == "mcse_sd"),
                err_msg=f"{field} of {name}",
            )


def test_quantiles_are_arvizs(double):
    found = [
        diagnostics.ess_quantile(stacked(4, 60), 0.3, block_size=BLOCK),
        diagnostics.mcse_quantile(stacked(4, 60), 0.3, block_size=BLOCK),
    ]
    for k, (name, y) in enumerate(kinds(4, 60).items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = [call(y, method="quantile", prob=0.3) for call in (az.ess, az.mcse)]
        for value, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(value[k], np.squeeze(other), rtol=1e-5, err_msg=name)


def test_xlas_loop_finds_the_same(double):
    x = stacked(2, 9)
    for name in ("rhat", "ess_quantile"):
        function = getattr(diagnostics, name)
        function = functools.partial(function, **({} if name == "rhat" else {"prob": 0.3}), block_size=BLOCK)
        # Not the last digits: differently fused programs round differently.
        np.testing.assert_allclose(jax.jit(function)(x), function(x), rtol=1e-9)


@pytest.mark.parametrize("shape", [(4, 60), (2, 9)])
def test_xlas_ranks_are_numpys(double, shape):
    # Of odd and even numbers of draws, with ties and infinity.
    x = np.moveaxis(stacked(*shape), -1, 0)
    x = x[~np.isnan(x).any(axis=(1, 2))]
    jax.tree.map(np.testing.assert_array_equal, jax.jit(ranks.RANKS.by_xla)(x), ranks.RANKS.by_numpy(x))


def test_single_precision():
    # Distances from the median are rounded, which makes ties, and these move R-hat.
    tolerances = {"rhat": 5e-4, "ess_bulk": 1e-4, "ess_tail": 1e-4, "mcse_mean": 1e-3, "mcse_sd": 1e-3}
    x = stacked(4, 60)
    is_fine = np.isfinite(x).all(axis=(0, 1))
    found = diagnostics.chain_diagnostics(x.astype(np.float32), block_size=BLOCK)
    with jax.enable_x64(True):
        exact = diagnostics.chain_diagnostics(x, block_size=BLOCK)
    for field, tolerance in tolerances.items():
        value, other = getattr(found, field), getattr(exact, field)
        assert value.dtype == np.float32
        np.testing.assert_allclose(value[is_fine], other[is_fine], rtol=tolerance, err_msg=field)


def test_one_number_of_an_event_of_integers(double):
    x = np.random.default_rng(4).poisson(3, size=(2, 9, 2, 8))
    found = diagnostics.rhat(x, block_size=BLOCK)
    assert found.shape == (2, 8) and found.dtype == np.float64
    np.testing.assert_allclose(found[1, 3], az.rhat(x[:, :, 1, 3]), rtol=1e-6)
    assert diagnostics.rhat(x[..., 1, 3]).shape == ()


def test_stuck_chains_infinite_medians_and_few_draws(double):
    rng = np.random.default_rng(8)
    x = np.tile([[[0.0]], [[1.0]]], (1, 9, BLOCK))
    x[..., 1] = np.where(rng.uniform(size=(2, 9)) < 0.7, np.inf, rng.normal(size=(2, 9)))
    found = diagnostics.rhat(x, block_size=BLOCK)
    assert found[0] > 1e6
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found[1], az.rhat(x[..., 1]), rtol=1e-6)
    assert all(np.isnan(leaf).all() for leaf in diagnostics.chain_diagnostics(np.zeros((2, 3, 1))))


def quasi(num_chains, num_draws, start=1.0):
    """Uniform numbers that no random generator decides: multiples of sqrt(2), less their integer parts."""
    numbers = (np.arange(num_chains * num_draws) + start) * np.sqrt(2)
    return np.modf(numbers)[0].reshape(num_chains, num_draws)


HEAVY = (1 - quasi(4, 250)) ** -0.7
SHIFTED = ndtri(quasi(6, 50, 1.5)) + 0.3 * np.array([0, 0, 1, 1, 2, 2])[:, None]


# Of `arviz_stats.base.array_stats` 1.3: `pareto_khat`, and `psislw` for weights.
@pytest.mark.parametrize(
    ("x", "options", "value"),
    [
        (HEAVY, {}, 0.6149659950432305),
        (np.log(HEAVY), {"r_eff": 0.5, "log_weights": True}, 0.6379634970312495),
        (SHIFTED, {"r_eff": 0.02, "tail": "left"}, -0.07519788174114826),
    ],
    ids=["both", "weights", "few"],
)
def test_pareto_khat_is_arvizs(double, x, options, value):
    np.testing.assert_allclose(diagnostics.pareto_khat(x, **options), value, rtol=1e-8)
    if "log_weights" in options:
        np.testing.assert_allclose(diagnostics.pareto_khat(5 + x.ravel(), **options), value, rtol=1e-8)


def test_pareto_khat_of_equal_draws_is_nan():
    assert np.isnan(diagnostics.pareto_khat(np.ones((4, 250)), tail="left", r_eff=1.0))


# Of `arviz.rhat_nested` 1.3.
@pytest.mark.parametrize(
    ("ids", "value"), [((0, 0, 1, 1, 2, 2), 1.0424500204838494), ((2, 0, 1, 1, 0, 2), 1.0011963554480112)]
)
def test_nested_rhat_is_arvizs(double, ids, value):
    np.testing.assert_allclose(diagnostics.rhat_nested(SHIFTED, ids), value, rtol=1e-10)


def test_bfmi_is_arvizs(double):
    np.testing.assert_allclose(diagnostics.bfmi(SHIFTED), az.bfmi(SHIFTED), rtol=1e-10)


@pytest.mark.parametrize("num_draws", [60, 61])
def test_one_pass_finds_what_the_formulas_say(double, num_draws):
    x = 5 + 0.1 * np.random.default_rng(5).normal(size=(3, num_draws, 2)).cumsum(axis=1)
    state = diagnostics.streaming_init({"a": np.zeros(2)}, 3, num_draws)
    half, batch, number = num_draws // 2, 7, 3 * num_draws  # isqrt(60) = isqrt(61) = 7

    @jax.jit
    def one_by_one(state, x):
        def step(state, draw):
            return diagnostics.streaming_update(state, {"a": draw[:, None]}), None

        return jax.lax.scan(step, state, jnp.moveaxis(x, 1, 0))[0]

    in_blocks = state
    for block in np.split(x, [20, 40, 60], axis=1):
        in_blocks = diagnostics.streaming_update(in_blocks, {"a": block})
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), in_blocks, one_by_one(state, x)
    )
    found = diagnostics.streaming_summary(in_blocks)
    means = [
        x[:, first + k * batch : first + (k + 1) * batch].mean(axis=1)
        for first in (0, num_draws - half)
        for k in range(half // batch)
    ]
    variance = x.var(axis=(0, 1), ddof=1)
    sigma = batch * np.concatenate(means).var(axis=0, ddof=1)
    wanted = diagnostics.StreamingSummary(
        x.mean(axis=(0, 1)),
        variance,
        [az.rhat(x[..., k], method="split") for k in range(2)],
        number * variance / sigma,
        np.sqrt(sigma / number),
    )
    for value, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(value["a"], other, rtol=1e-9)


def test_one_pass_on_its_way():
    x = 1e4 + np.random.default_rng(6).normal(size=(2, 10, 1)).astype(np.float32)
    state = diagnostics.streaming_update(diagnostics.streaming_init(np.zeros(1, np.float32), 2, 100), x)
    found = diagnostics.streaming_summary(state)
    np.testing.assert_allclose(found.variance, x.astype(float).var(axis=(0, 1), ddof=1), rtol=1e-3)
    assert np.isnan(found.rhat) and np.isfinite(found.mcse_mean)


@pytest.mark.slow
def test_monte_carlo_errors_are_right():
    # Entries are 2000 independent runs of an autoregression with tau = 3. The sample variance of their means has a
    # standard error of 3.2 %, of which five fail once in 2 million; batch means of 20 draws are biased by some -7 %.
    x = lfilter([1], [1, -0.5], np.random.default_rng(7).normal(size=(4, 500, 2000)), axis=1)[:, 100:]
    x = x.astype(np.float32)
    actual = x.mean(axis=(0, 1)).var()
    found = diagnostics.chain_diagnostics(x)
    assert abs(np.mean(found.mcse_mean**2) / actual - 1) < 5 * 0.032 + 0.01
    state = diagnostics.streaming_init(np.zeros(2000, np.float32), 4, 400)
    passed = diagnostics.streaming_summary(diagnostics.streaming_update(state, x))
    assert abs(np.mean(passed.mcse_mean**2) / actual - 1) < 5 * 0.032 + 0.07
    assert abs(np.mean(found.ess_mean) / (1600 / 3) - 1) < 0.1
    assert np.mean(found.rhat < 1.03) > 0.98


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagnostics.rhat(np.zeros(5)), "axes"),
        (lambda: diagnostics.rhat(np.zeros((2, 5)), block_size=0), "block_size"),
        (lambda: diagnostics.ess_quantile(np.zeros((2, 5)), 1.5), "prob"),
        (lambda: diagnostics.rhat_nested(np.zeros((3, 5)), [0, 1]), "one number a chain"),
        (lambda: diagnostics.rhat_nested(np.zeros((3, 5)), [0, 1, 1]), "as often"),
        (lambda: diagnostics.pareto_khat(np.zeros(20), tail="upper"), "tail"),
        (lambda: diagnostics.pareto_khat(np.zeros(10)), "draws"),
        (lambda: diagnostics.streaming_init(np.zeros(2), 2, 3), "num_draws"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
