"""What is planted is said, and nothing else."""

import blackjax
import jax.numpy as jnp
import numpy as np
import pytest

import smcdiff
from smcdiff import inverse
from smcdiff.diagnostics.diagnose import diagnose
from smcdiff.from_arviz import from_arviz
from smcdiff.mcmc.hamiltonian import HamiltonianInfo
from smcdiff.mcmc.slice_1d import SliceInfo
from smcdiff.reverse_diffusion.sampler import RdmcParticle
from smcdiff.smc.feynman_kac import SMCInfo

CHAINS, STEPS, SIZE = 4, 6, 200


def _calm(seed=0):
    """A result with which nothing is wrong."""
    rng = np.random.default_rng(seed)
    shape = CHAINS, STEPS
    evidence = np.array([-3.0, -3.1, -2.9, -3.0])
    uniform = np.full((CHAINS, SIZE), -np.log(SIZE))
    info = SMCInfo(
        ess=np.full(shape, 150.0),
        resampled=np.zeros(shape, bool),
        ancestors=np.tile(np.arange(SIZE), (*shape, 1)),
        log_evidence_increment=np.repeat(evidence[:, None] / STEPS, STEPS, 1),
        num_invalid=np.zeros(shape, int),
    )
    particles = rng.normal(size=(CHAINS, SIZE, 3)).astype(np.float32)
    return smcdiff.SMCResult(particles, uniform, evidence, info, np.repeat(uniform[:, None], STEPS, 1))


def _with_info(**fields):
    return lambda r: r._replace(info=r.info._replace(**fields))


def _lost(r):
    increments = r.info.log_evidence_increment.copy()
    increments[1, 2:] = -np.inf
    return r._replace(
        log_evidence=np.array([-3.0, -np.inf, -2.9, -3.0]),
        info=r.info._replace(log_evidence_increment=increments),
    )


def _heavy(r):
    weights = -0.9 * np.log(np.random.default_rng(1).uniform(size=(CHAINS, SIZE)))
    return r._replace(log_weights=weights - np.logaddexp.reduce(weights, axis=1, keepdims=True))


def _one_family(step):
    ancestors = np.tile(np.arange(SIZE), (CHAINS, STEPS, 1))
    ancestors[2, step] = 7
    return _with_info(ancestors=ancestors)


def _nan_particle(r):
    particles = r.particles.copy()
    particles[0, 5, 1] = np.nan
    return r._replace(particles=particles)


def _rdmc(r):
    flags = np.zeros((CHAINS, SIZE), int)
    flags[:, :50] = 1
    return r._replace(particles=RdmcParticle(r.particles, None, None, flags, flags, 2.0 + flags))


ESS = np.full((CHAINS, STEPS), 150.0)
ESS[3, 4] = 2.5
INVALID = np.zeros((CHAINS, STEPS), int)
INVALID[2, 3] = 4
SHIFT = np.array([0.0, 0.0, 1.5, 0.0], np.float32)[:, None, None]


@pytest.mark.parametrize(
    ("plant", "check", "severity", "words"),
    [
        (_lost, "evidence", "invalid", ["in chain 1 every particle", "at step 3"]),
        (_with_info(num_invalid=INVALID), "weights", "invalid", ["4 of 4800 weights", "step 4"]),
        (_with_info(ess=ESS), "ess", "warning", ["2.5 of 200", "step 5, chain 3"]),
        (_heavy, "pareto_k", "warning", ["Pareto k", "more particles"]),
        (lambda r: r._replace(log_evidence=np.array([-3.0, -9.0, -2.0, -3.0])), "evidence", "warning", ["3.2 nats"]),
        (lambda r: r._replace(particles=r.particles + SHIFT), "rhat", "warning", ["R-hat reaches"]),
        (_one_family(5), "ancestors", "warning", ["chain 2", "step 5 of 6", "move="]),
        (_one_family(0), "ancestors", "note", ["chain 2 descend from 1 of the first"]),
        (_nan_particle, "particles", "invalid", ["1 particles", "not finite in x"]),
        (_with_info(move_info={"acceptance_rate": np.full((CHAINS, STEPS), 0.02)}), "moves", "warning", ["2%"]),
        (_rdmc, "estimates", "warning", ["25% of the particles", "2.0"]),
    ],
)  # fmt: skip
def test_of_a_weighted_result(plant, check, severity, words):
    (found,) = diagnose(plant(_calm()), show=False)
    assert (found.check, found.severity) == (check, severity)
    for word in words:
        assert word in found.sentence


def test_nothing_is_said_of_a_calm_result(capsys):
    assert diagnose(_calm()) == ()
    assert capsys.readouterr().out == "Nothing is out of bounds.\n"
    diagnose(_with_info(num_invalid=INVALID, ess=ESS)(_calm()))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["invalid", "warning"]


def test_a_sampler_without_weights_is_said_to_be_one():
    calm = _calm()
    nothing = np.zeros_like(calm.info.log_evidence_increment)
    result = calm._replace(
        log_evidence=np.zeros(CHAINS), info=calm.info._replace(log_evidence_increment=nothing)
    )
    (found,) = diagnose(result, show=False)
    assert found.severity == "note" and "gives no weights" in found.sentence


def test_of_many_entries_a_few_are_above_by_chance():
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(CHAINS, SIZE, 300)).astype(np.float32)
    assert diagnose(_calm()._replace(particles=wide), show=False) == ()
    wide[1, :, :30] += 1.5
    assert [f.check for f in diagnose(_calm()._replace(particles=wide), show=False)] == ["rhat"]


def test_the_mean_misses_the_measurement():
    problem = inverse.InverseProblem(inverse.mask(np.ones(3, bool)), jnp.asarray([0.0, 0.4, 0.0]), 0.1)
    calm = _calm()
    calm = calm._replace(particles=calm.particles - calm.particles.mean((0, 1)))
    (found,) = diagnose(calm, problem=problem, show=False)
    assert found.check == "residual" and "2.3 deviations" in found.sentence  # sqrt(4^2 / 3)


def test_a_result_without_its_particles():
    problem = inverse.InverseProblem(inverse.mask(np.ones(3, bool)), jnp.asarray([0.0, 0.4, 0.0]), 0.1)
    (found,) = diagnose(_calm()._replace(particles=None), problem=problem, show=False)
    assert found.check == "rhat" and "could not be computed" in found.sentence


# Markov chains

DRAWS = 800


def _info(**fields):
    rng = np.random.default_rng(3)
    shape = 4, DRAWS
    calm = {
        "acceptance_rate": rng.uniform(0.6, 1.0, shape),
        "is_accepted": np.ones(shape, bool),
        "is_divergent": np.zeros(shape, bool),
        "log_ratio": np.zeros(shape),
        "path_gap": np.zeros(shape),
        "energy": rng.normal(size=shape),
        "num_integration_steps": np.full(shape, 8),
    }
    return HamiltonianInfo(**calm | fields)


def _slice_info(**fields):
    ones = np.ones((4, DRAWS), bool)
    calm = {"acceptance_rate": np.ones((4, DRAWS)), "is_accepted": ones, "is_bracketed": ones}
    counts = dict.fromkeys(("num_evaluations", "num_expansions", "num_shrinkages"), np.ones((4, DRAWS), int))
    return SliceInfo(**calm | counts | fields)


def _draws():
    return {
        "x": np.random.default_rng(4).normal(size=(4, DRAWS, 2)),
        "fixed": np.ones((4, DRAWS)),  # a deterministic site that never moves is nobody's fault
    }


def _planted(plant):
    draws = _draws()
    draws["x"] = plant(draws["x"].copy())
    return draws


def _shift(x):
    x[2, :, 1] += 2.0
    return x


def _slow(x):
    for i in range(1, x.shape[1]):
        x[:, i] = 0.98 * x[:, i - 1] + np.sqrt(1 - 0.98**2) * x[:, i]
    return x


def _nan(x):
    x[1, 37, 0] = np.nan
    return x


def _stays(x):
    x[3, 100:400] = x[3, 100]
    return x


def _never(x):
    x[3] = x[3, :1]
    return x


SOME = np.zeros((4, DRAWS), bool)
SOME[1, :8] = True
WALK = np.random.default_rng(6).normal(size=(4, DRAWS)).cumsum(axis=1)
ACCEPTED = np.random.default_rng(7).uniform(0.0, 0.1, (4, DRAWS))


@pytest.mark.parametrize(
    ("draws", "info", "expected", "words"),
    [
        (_planted(_shift), _info(), ["warning rhat", "warning ess"], ["x[1]", "chain 2 is farthest", "of 2 entries"]),
        (_planted(_slow), _info(), ["warning rhat", "warning ess"], ["effective sample size"]),
        (_planted(_nan), _info(), ["invalid finite"], ["1 draws of x", "first draw 37 of chain 1"]),
        (_planted(_stays), _info(), ["warning stuck", "warning rhat", "warning ess"], ["Chain 3 stayed", "300 of 800"]),
        (_planted(_never), _info(), ["invalid stuck", "warning rhat", "warning ess"], ["chain 3 never moved"]),
        (_draws(), _info(is_divergent=SOME), ["warning divergences"], ["8 of 3200", "chain 1: 8"]),
        (_draws(), _info(acceptance_rate=ACCEPTED), ["warning acceptance"], ["accepts 5%"]),
        (_draws(), _info(acceptance_rate=np.full((4, DRAWS), 0.999)), ["note acceptance"], ["could be larger"]),
        (_draws(), _info(energy=WALK), ["warning bfmi"], ["E-BFMI", "chains 0, 1, 2, 3"]),
        (_draws(), _slice_info(is_accepted=~SOME), ["warning caps"], ["max_shrinkage", "0.2%"]),
        (_draws(), _slice_info(is_bracketed=~SOME), ["warning caps"], ["max_expansions"]),
        (_draws(), {"solve_residual": np.where(SOME, 0.3, 0.0)}, ["warning solver"], ["0.3"]),
        (_draws(), {"num_invalid": SOME.astype(int)}, ["invalid weights"], ["8 weights"]),
        (_draws(), {"part": {"is_bracketed": ~SOME}}, ["warning caps"], ["part.is_bracketed"]),
        (_draws(), _info(), [], []),
        (_draws(), _slice_info(), [], []),
    ],
)  # fmt: skip
def test_of_chains(draws, info, expected, words):
    found = diagnose(smcdiff.Trace(draws, info, None), show=False)
    names = [f"{f.severity} {f.check}" for f in found]
    # The slow chain's R-hat may be above 1.01 or not; the stuck chain's ESS likewise.
    assert (
        set(expected[:1]) <= set(names) <= {*expected, *(["warning ess"] if "stuck" in str(expected) else [])}
    )
    text = " ".join(f.sentence for f in found)
    for word in words:
        assert word in text


def test_one_chain_is_told_that_it_is_alone():
    trace = smcdiff.Trace(np.random.default_rng(0).normal(size=(1, DRAWS)), {}, None)
    (found,) = diagnose(trace, show=False)
    assert found.severity == "note" and "at least 2 chains" in found.sentence


@pytest.mark.lenient_promotion
def test_of_what_came_back_from_arviz():
    trace = smcdiff.Trace(_planted(_shift), _info(is_divergent=SOME), None)
    told = diagnose(trace, show=False)
    assert diagnose(from_arviz(smcdiff.to_arviz(trace)), show=False) == told
    assert {f.check for f in told} == {"rhat", "ess", "divergences"}


def test_of_a_state_and_other_things():
    x = np.random.default_rng(0).normal(size=(4, DRAWS, 2))
    state = blackjax.mcmc.hmc.HMCState(x, x[..., 0], x)
    assert diagnose(smcdiff.Trace(state, {}, None), show=False) == ()
    with pytest.raises(TypeError, match="SMCResult or a Trace, got ndarray"):
        diagnose(x)
