"""Hamiltonian Monte Carlo from scores: one leapfrog kernel, of which HMC, generalised HMC and Langevin are cases.

The state is a sample x and a momentum u ~ N(0, I), in coordinates whitened by M^-1 = L L^T. A step partly renews the
momentum, u <- rho u + sqrt(1 - rho^2) xi, and follows n leapfrog steps of size e,

    u <- u + e/2 L^T s(x),    x <- x + e L u,    u <- u + e/2 L^T s(x),

to (x', u'), accepted with probability min(1, exp(Delta + |u|^2/2 - |u'|^2/2)), Delta = log p(x') - log p(x). On
rejection x stays and the momentum is turned round: if it is partly kept, the target would not be left alone otherwise.

Where only the score is known, Delta is an integral of it, either along the straight line (Gauss-Legendre,
`smcdiff.line_integral`), or along the leapfrog path by the trapezoidal rule, which costs nothing:

    Delta = sum_k <s(x_k) + s(x_{k+1}), x_{k+1} - x_k> / 2
          = |u'|^2/2 - |u|^2/2 - e^2/8 (|L^T s(x')|^2 - |L^T s(x)|^2);

the sum telescopes, since L^-1 (x_{k+1} - x_k) = e (u_k + u_{k+1})/2 + e^2/4 L^T (s_k - s_{k+1}), and the momenta
differ by e/2 L^T (s_k + s_{k+1}). Line and path integral turn their sign with the direction. The first is as good as
exact for a few nodes; the second has an error of order e^2, and the law of the chain one of that order. What the two
differ by, `path_gap`, also tells how far the score is from being a gradient.

Sources: Neal, "MCMC using Hamiltonian dynamics", arXiv 1206.1901; Horowitz, "A generalized guided Monte Carlo
algorithm", Phys. Lett. B 268 (1991); Sjoberg, Lindqvist and Schon, "MCMC-Correction of Score-Based Diffusion Models for
Model Composition", arXiv 2307.14012.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, PyTree

from smcdiff.checks import check_between, check_count, check_positive
from smcdiff.density import SCORE_KERNELS, HasLogDensity, HasScore, as_target, logdensity_and_score, require
from smcdiff.line_integral import line_integral
from smcdiff.mcmc.metric import InverseMassMatrix, from_whitened, mass_factor, score_in_whitened

__all__ = ["HamiltonianInfo", "HamiltonianState", "ghmc", "hamiltonian", "hmc", "uhmc"]

ACCEPT = ("exact", "line_integral", "path_integral", "never rejects")
_DIVERGENCE = 1000.0  # of the total energy, as in BlackJAX and NumPyro


class HamiltonianState(NamedTuple):
    """State of a leapfrog kernel.

    Attributes
    ----------
    position
        The sample, an array or a pytree.
    logdensity
        Log density there; None where the kernel knows scores only.
    score
        Score there, like ``position``.
    momentum
        Flat momentum in whitened coordinates, shape (d,); None where it is drawn anew in every step.
    """

    position: PyTree
    logdensity: Float[Array, ""] | None
    score: PyTree
    momentum: Float[Array, " d"] | None


class HamiltonianInfo(NamedTuple):
    """What happened in one step of a leapfrog kernel.

    Attributes
    ----------
    acceptance_rate
        Probability of acceptance; 1 for kernels that never reject.
    is_accepted
        Whether the chain moved.
    is_divergent
        Whether the total energy rose by more than 1000, or is no number.
    log_ratio
        log p(x') - log p(x) of the proposal, as the decision saw it.
    path_gap
        ``log_ratio`` minus the integral of the score along the leapfrog path; 0 where the one is the other, as in
        ``accept="path_integral"`` and in kernels that never reject, and then it says nothing of the score.
    energy
        Total energy of the state that was kept, for E-BFMI; None where the log density is not known.
    num_integration_steps
        Leapfrog steps.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    log_ratio: Float[Array, ""]
    path_gap: Float[Array, ""]
    energy: Float[Array, ""] | None
    num_integration_steps: int


class _Kernel(eqx.Module):
    target: Any
    step_size: Float[Array, ""] | float
    persistence: Float[Array, ""] | float | None  # of the momentum; None: drawn anew
    factor: InverseMassMatrix
    num_integration_steps: int = eqx.field(static=True)
    accept: str = eqx.field(static=True)
    num_nodes: int = eqx.field(static=True)

    def evaluate(self, x, unravel):
        """Log density (None where it is not needed) and flat score at flat ``x``."""
        if self.accept == "exact":
            logdensity, score = logdensity_and_score(self.target, unravel(x))
            return logdensity, ravel_pytree(score)[0]
        return None, ravel_pytree(self.target.score(unravel(x)))[0]


def hmc(
    target: Any,
    step_size: Float[Array, ""] | float,
    num_integration_steps: int,
    *,
    inverse_mass_matrix: InverseMassMatrix = None,
    accept: str = "exact",
    num_nodes: int = 4,
) -> SamplingAlgorithm:
    """Hamiltonian Monte Carlo, with the acceptance from a log density or from scores.

    Parameters
    ----------
    target
        A log density function, or an object with a log density, a score or both, for instance ``model.at(t)``.
    step_size
        Leapfrog step, positive, in units of the sample (of whitened coordinates with ``inverse_mass_matrix``).
    num_integration_steps
        Leapfrog steps, one evaluation each.
    inverse_mass_matrix
        Estimate of the target's covariance over the flattened sample: None, variances (d,), or a matrix (d, d).
    accept
        "exact" needs a log density. "line_integral" needs a score only, and ``num_nodes`` more evaluations of it;
        right if the score is a gradient. "path_integral" needs a score and no more evaluations; the law of the chain
        then has an error of second order in the step.
    num_nodes
        Gauss-Legendre nodes of the line integral.

    Returns
    -------
    SamplingAlgorithm, with `HamiltonianState` and `HamiltonianInfo`.

    Raises
    ------
    TypeError
        If the target lacks what ``accept`` needs.
    ValueError
        If a number is out of range or ``accept`` is unknown.

    Source: Neal, "MCMC using Hamiltonian dynamics", arXiv 1206.1901.
    """
    return hamiltonian(
        "hmc", target, step_size, num_integration_steps, None, inverse_mass_matrix, accept, num_nodes
    )


def ghmc(
    target: Any,
    step_size: Float[Array, ""] | float,
    num_integration_steps: int = 1,
    *,
    persistence: Float[Array, ""] | float = 0.9,
    inverse_mass_matrix: InverseMassMatrix = None,
    accept: str = "exact",
    num_nodes: int = 4,
) -> SamplingAlgorithm:
    """Generalised Hamiltonian Monte Carlo: a part of the momentum is kept, and turned round on rejection.

    Parameters
    ----------
    target, step_size, num_integration_steps, inverse_mass_matrix, accept, num_nodes
        As in `hmc`.
    persistence
        Share rho of the momentum that is kept, in [0, 1): near 1 the chain runs on in its direction.

    Raises
    ------
    TypeError, ValueError
        As `hmc`.

    Source: Horowitz, "A generalized guided Monte Carlo algorithm", Phys. Lett. B 268 (1991).
    """
    check_between("persistence", persistence, 0.0, 1.0)
    return hamiltonian(
        "ghmc", target, step_size, num_integration_steps, persistence, inverse_mass_matrix, accept, num_nodes
    )


def uhmc(
    target: Any,
    step_size: Float[Array, ""] | float,
    num_integration_steps: int,
    *,
    persistence: Float[Array, ""] | float = 0.0,
    inverse_mass_matrix: InverseMassMatrix = None,
) -> SamplingAlgorithm:
    """Hamiltonian Monte Carlo without rejection: biased, by an error of second order in the step.

    Parameters
    ----------
    target, step_size, num_integration_steps, inverse_mass_matrix
        As in `hmc`; a score is enough.
    persistence
        As in `ghmc`.

    Raises
    ------
    TypeError, ValueError
        As `hmc`.

    Source: Du et al., "Reduce, Reuse, Recycle", arXiv 2302.11552.
    """
    check_between("persistence", persistence, 0.0, 1.0)
    return hamiltonian(
        "uhmc", target, step_size, num_integration_steps, persistence, inverse_mass_matrix, "never rejects"
    )


def hamiltonian(
    who: str,
    target: Any,
    step_size: Float[Array, ""] | float,
    num_integration_steps: int,
    persistence: Float[Array, ""] | float | None,
    inverse_mass_matrix: InverseMassMatrix,
    accept: str,
    num_nodes: int = 4,
) -> SamplingAlgorithm:
    """The leapfrog kernel in all its cases, checked; ``who`` asks, for messages. See `hmc` and `ghmc`."""
    check_positive("step_size", step_size)
    check_count("num_integration_steps", num_integration_steps)
    check_count("num_nodes", num_nodes)
    if accept not in ACCEPT:
        raise ValueError(f"accept must be one of {ACCEPT[:3]}, got {accept!r}.")
    target = as_target(target)
    require(target, HasScore, who)
    if accept == "exact":
        require(
            target,
            HasLogDensity,
            who,
            SCORE_KERNELS,
        )
    kernel = _Kernel(
        target,
        step_size,
        persistence,
        mass_factor(inverse_mass_matrix),
        num_integration_steps,
        accept,
        num_nodes,
    )
    return SamplingAlgorithm(Partial(_init, kernel), Partial(_step, kernel))


def _init(kernel, position, rng_key):
    """Evaluate the target at the start, and draw a momentum if it is to be kept."""
    x, unravel = ravel_pytree(position)
    logdensity, score = kernel.evaluate(x, unravel)
    momentum = None if kernel.persistence is None else jax.random.normal(rng_key, x.shape, x.dtype)
    return HamiltonianState(position, logdensity, unravel(score), momentum)


def _step(kernel, rng_key, state):
    """Renew the momentum, follow the leapfrog path, accept or not."""
    key_momentum, key_accept = jax.random.split(rng_key)
    x, unravel = ravel_pytree(state.position)
    u = jax.random.normal(key_momentum, x.shape, x.dtype)
    if kernel.persistence is not None:
        u = kernel.persistence * state.momentum + jnp.sqrt(1.0 - kernel.persistence**2) * u
    start = (x, u, state.logdensity, ravel_pytree(state.score)[0])
    end, kinetic_rise, path_integral = _leapfrog(kernel, unravel, start)

    log_ratio = _log_ratio(kernel, unravel, start, end, path_integral)
    kinetic = 0.5 * jnp.sum(u**2)
    gain = log_ratio - kinetic_rise
    gain = jnp.where(jnp.isnan(gain), -jnp.inf, gain)
    if kernel.accept == "never rejects":
        probability, is_accepted = jnp.ones_like(gain), jnp.ones((), bool)
    else:
        probability = jnp.exp(jnp.minimum(gain, 0.0))
        is_accepted = jax.random.uniform(key_accept, (), x.dtype) < probability

    turned = (x, -u, *start[2:])
    x, u, logdensity, score = jax.tree.map(lambda new, old: jnp.where(is_accepted, new, old), end, turned)
    energy = None if logdensity is None else kinetic + jnp.where(is_accepted, kinetic_rise, 0.0) - logdensity
    info = HamiltonianInfo(
        probability,
        is_accepted,
        gain < -_DIVERGENCE,
        log_ratio,
        log_ratio - path_integral,
        energy,
        kernel.num_integration_steps,
    )
    momentum = None if kernel.persistence is None else u
    return HamiltonianState(unravel(x), logdensity, unravel(score), momentum), info


def _leapfrog(kernel, unravel, start):
    """The end of the path, the rise of the kinetic energy, and the trapezoidal integral of the score along it.

    Half kicks that meet are one, and neither the rise nor the integral is summed on the way: see the top.
    """
    (x, u, _, score), step_size = start, kernel.step_size
    before = score_in_whitened(kernel.factor, score)

    def drift_and_kick(carry, _):
        x, u, _, _ = carry
        x = x + step_size * from_whitened(kernel.factor, u)
        logdensity, score = kernel.evaluate(x, unravel)
        return (x, u + step_size * score_in_whitened(kernel.factor, score), logdensity, score), None

    carry = (x, u + 0.5 * step_size * before, *start[2:])
    if kernel.num_integration_steps == 1:
        carry, _ = drift_and_kick(carry, None)
    else:
        carry, _ = jax.lax.scan(drift_and_kick, carry, length=kernel.num_integration_steps)
    new_x, new_u, logdensity, new_score = carry
    after = score_in_whitened(kernel.factor, new_score)
    new_u = new_u - 0.5 * step_size * after

    squares = 0.125 * jnp.asarray(step_size, x.dtype) ** 2 * (after + before) * (after - before)
    if kernel.num_integration_steps == 1:  # without the momenta, which then need not be kept (MALA)
        rise = jnp.sum(0.5 * (score + new_score) * (new_x - x) + squares)
    else:
        rise = 0.5 * jnp.sum(new_u**2) - 0.5 * jnp.sum(u**2)
    return (new_x, new_u, logdensity, new_score), rise, rise - jnp.sum(squares)


def _log_ratio(kernel, unravel, start, end, path_integral):
    """log p at the end minus log p at the start, by the kernel's means."""
    if kernel.accept == "exact":
        return end[2] - start[2]
    if kernel.accept == "line_integral":
        return line_integral(kernel.target.score, unravel(start[0]), unravel(end[0]), kernel.num_nodes)
    return path_integral
