"""Density-tempered marginalised SMC: the parameters of a Feynman-Kac model, from the prior to the posterior.

A particle is a parameter theta with an estimate Z of its evidence, made by an SMC run of its own, and one particle of
that run. With u for the random numbers of the run, the targets

    pi_k(theta, u)  proportional to  p(theta) psi(u | theta) Z(theta, u)^b_k,        0 = b_0 < b_1 < ... < b_n = 1,

go from the prior to a law whose marginal is the posterior of theta, because Z is unbiased: the last cloud is exact for
any number of inner particles, and so is the estimate of the evidence, the integral of p(theta) E[Z]. Weights grow by
Z^(b_{k+1} - b_k); particle marginal Metropolis-Hastings steps with Z^b_{k+1} in the place of Z renew the particles.

Source: Duan and Fulop, "Density-Tempered Marginalized Sequential Monte Carlo Samplers", J. Bus. Econ. Stat. 33 (2015).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from smcdiff.density import as_pytree
from smcdiff.smc.feynman_kac import FeynmanKac, Move, repeat
from smcdiff.smc.marginal_mh import MarginalMHState, particle_marginal_mh

__all__ = ["tempered_marginal"]


class _Tempered(eqx.Module):
    sample_prior: Callable
    log_prior: Callable
    make_fk: Callable
    exponents: Float[Array, " n+1"]
    scale: Float[Array, " d"]
    options: dict[str, Any]
    num_particles: int = eqx.field(static=True)

    def chain(self, log_scale, exponent, like):
        """The Metropolis-Hastings chain of the target with the exponent ``exponent``."""
        _, unravel = ravel_pytree(like)
        step_size = unravel(jnp.exp(log_scale) * self.scale)
        return particle_marginal_mh(
            self.log_prior,
            self.make_fk,
            self.num_particles,
            step_size=step_size,
            exponent=exponent,
            **self.options,
        )


def tempered_marginal(
    sample_prior: Callable[[PRNGKeyArray], PyTree],
    log_prior: Callable[[PyTree], Float[Array, ""]],
    make_fk: Callable[[PyTree], FeynmanKac],
    num_inner: int,
    *,
    exponents: Float[Array, " n+1"],
    scale: PyTree = 1.0,
    target_acceptance: float = 0.25,
    ess_threshold: float = 0.5,
    batch_size: int | None = None,
) -> tuple[FeynmanKac, Move]:
    """SMC over the parameters of a Feynman-Kac model, each with a cloud of its own.

    Run it with ``fk, move = tempered_marginal(...)`` and ``smcdiff.run_smc(rng_key, fk, num_particles, move=move,
    num_moves=...)``. Particles are `smcdiff.smc.marginal_mh.MarginalMHState`, whose ``position`` is the parameter. A
    step costs ``num_moves`` runs of inner SMC a particle.

    Parameters
    ----------
    sample_prior
        ``sample_prior(rng_key) -> theta``, any pytree of float arrays.
    log_prior
        Its log density, up to a constant.
    make_fk
        ``make_fk(theta)`` makes the model; see `smcdiff.particle_marginal_mh`.
    num_inner
        Particles of one estimate of the evidence.
    exponents
        From 0 to 1, rising; small at first, such as ``jnp.linspace(0, 1, 20) ** 3``.
    scale
        Deviations of the prior, one number or a pytree like theta: the random walk's first step is 2.4 / sqrt(d) of
        them. Its size is tuned from step to step.
    target_acceptance
        Acceptance rate towards which it is tuned, between 0 and 1.
    ess_threshold, batch_size
        Of the inner runs, see `smcdiff.smc.smc`.

    Returns
    -------
    The model, with ``len(exponents) - 1`` steps, and its moves.

    Raises
    ------
    ValueError
        If ``exponents`` do not rise from 0 to 1, or as `smcdiff.particle_marginal_mh` does.

    Source: Duan and Fulop, "Density-Tempered Marginalized Sequential Monte Carlo Samplers" (2015).
    """
    exponents = jnp.asarray(exponents, float)
    values = np.asarray(exponents)
    if values.ndim != 1 or values[0] != 0 or values[-1] != 1 or not np.all(np.diff(values) > 0):
        raise ValueError(f"exponents must rise strictly from 0 to 1, got {values}.")
    if not 0.0 < target_acceptance < 1.0:
        raise ValueError(f"target_acceptance must lie between 0 and 1, got {target_acceptance}.")
    theta = jax.eval_shape(sample_prior, jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(theta))
    scales = jax.tree.map(lambda a, s: jnp.full(a.shape, s, a.dtype), theta, jax.tree.broadcast(scale, theta))
    tempered = _Tempered(
        as_pytree(sample_prior),
        as_pytree(log_prior),
        as_pytree(make_fk),
        exponents,
        ravel_pytree(scales)[0],
        {"ess_threshold": ess_threshold, "batch_size": batch_size},
        num_inner,
    )
    first = jnp.log(jnp.asarray(2.4 / size**0.5, exponents.dtype))
    tempered.chain(first, exponents[-1], scales)  # raises now what it has to say
    move = Move(Partial(_move, tempered), first, Partial(_retune, target_acceptance))
    return FeynmanKac(Partial(_init, tempered), Partial(_step, tempered), len(values) - 1), move


def _init(tempered, rng_key):
    """A parameter of the prior, with an estimate of its evidence."""
    key_prior, key_run = jax.random.split(rng_key)
    theta = tempered.sample_prior(key_prior)
    chain = tempered.chain(jnp.zeros((), tempered.exponents.dtype), tempered.exponents[0], theta)
    state = chain.init(theta, key_run)
    return state, jnp.zeros((), state.log_evidence.dtype)


def _step(tempered, rng_key, particle: MarginalMHState, k):
    """Weigh for the next exponent; the moves follow."""
    rise = tempered.exponents[k + 1] - tempered.exponents[k]
    return particle, rise.astype(particle.log_evidence.dtype) * particle.log_evidence


def _move(tempered, log_scale, rng_key, particle, k, num_moves):
    """Metropolis-Hastings steps on the target after step ``k``."""
    algorithm = tempered.chain(log_scale, tempered.exponents[k + 1], particle.position)

    def step(key, state):
        state, info = algorithm.step(key, state)
        return state, info.acceptance_rate

    return repeat(step, rng_key, particle, num_moves)


def _retune(target, log_scale, acceptance):
    """Shorter steps where less is accepted than wanted, by the ratio of both at most halved or doubled."""
    change = jnp.clip(jnp.log(jnp.maximum(acceptance, 1e-3) / target), -0.7, 0.7)
    return log_scale + jnp.where(jnp.isnan(change), 0.0, change).astype(log_scale.dtype)
