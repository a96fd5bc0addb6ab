"""Recursive score estimation: the denoising posterior of a long time, split into short ones.

A noised sample is noised step by step, y_r = y_s + sqrt(r^2 - s^2) eps for widths s < r, so that

    E[x_0 | y_r = c] = E[ E[x_0 | y_s] | y_r = c ],      q(y_s | y_r = c) ~ p_s(y_s) N(c; y_s, (r^2 - s^2) I).

Where the whole posterior of x_0 has many modes, that of y_s has one if the segment is short. It is sampled by the
unadjusted Langevin algorithm, whose drift needs the score of p_s: from the same estimator, one segment further down. In
the time of the Ornstein-Uhlenbeck process, t = log(1 + r^2) / 2 in units in which the target has about unit size, every
segment but the last is ``segment`` long. The cost is (chains times steps) to the power of the depth.

The segment's kernel has the noise of the segment, not of the whole time; with the latter, as in a public
implementation, the estimate is wrong from the second segment on.

Source: Huang et al., "Faster Sampling without Isoperimetry via Diffusion-based Monte Carlo", arXiv 2401.06325.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.checks import check_count, check_positive
from smcdiff.estimators.estimator import Estimate, ScoreEstimator, ess_of_chains

__all__ = ["recursive"]


class _Recursive(ScoreEstimator):
    has_marginal: ClassVar[bool] = False
    base: ScoreEstimator
    segment: Float[Array, ""] | float
    scale: Float[Array, ""] | float
    step_size: Float[Array, ""] | float
    depth: int = eqx.field(static=True)
    num_chains: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)

    def __call__(self, rng_key, target, centre, width, state):
        """Chains over the segment's end, whose denoised samples are averaged."""
        return self._estimate(rng_key, target, centre, width, self.depth), state

    def _estimate(self, rng_key, target, centre, width, depth):
        if depth == 0:
            key_init, key = jax.random.split(rng_key)
            state, first = self.base.init(key_init, target, centre, width)
            estimate, _ = self.base(key, target, centre, width, state)
            return estimate._replace(num_evaluations=estimate.num_evaluations + first)
        # In units of the scale: 1 + s^2 = (1 + r^2) exp(-2 segment), or half of a time that is shorter than two.
        whole = jnp.log1p((width / self.scale) ** 2)
        remaining = jnp.maximum(whole - 2.0 * self.segment, 0.5 * whole)
        inner_width = self.scale * jnp.sqrt(jnp.expm1(remaining))
        gap = (width - inner_width) * (width + inner_width)
        # Curvature of q(y_s): that of the segment's noise, and of p_s where it is narrowest.
        step_size = self.step_size / (1.0 / gap + 1.0 / inner_width**2)
        key_start, key_run, key_draw = jax.random.split(rng_key, 3)
        noise = jax.random.normal(key_start, (self.num_chains, *centre.shape), centre.dtype)
        start = centre[None] + jnp.sqrt(jnp.minimum(gap, inner_width**2)) * noise

        def step(positions, key):
            def one(key, y):
                key_inner, key_noise = jax.random.split(key)
                inner = self._estimate(key_inner, target, y, inner_width, depth - 1)
                drift = (inner.denoised - y) / inner_width**2 + (centre - y) / gap
                noise = jax.random.normal(key_noise, y.shape, y.dtype)
                return y + step_size * drift + jnp.sqrt(2.0 * step_size) * noise, inner

            return jax.vmap(one)(jax.random.split(key, self.num_chains), positions)

        _, found = jax.lax.scan(step, start, jax.random.split(key_run, self.num_steps))
        kept = jax.tree.map(
            lambda leaf: jnp.reshape(leaf[self.num_steps // 2 :], (-1, *leaf.shape[2:])),
            found._replace(num_evaluations=None),
        )
        denoised = jnp.mean(kept.denoised, axis=0)
        variance = jnp.mean(kept.variance) + jnp.mean(jnp.var(kept.denoised, axis=0))
        chosen = jax.random.randint(key_draw, (), 0, kept.variance.shape[0])
        return Estimate(
            denoised,
            kept.draw[chosen],
            variance,
            jnp.asarray(jnp.nan, centre.dtype),
            ess_of_chains(
                jnp.mean(found.denoised[self.num_steps // 2 :], axis=0),
                variance,
                jnp.mean(kept.ess) * kept.ess.shape[0],
            ),
            jnp.all(kept.is_valid) & jnp.all(jnp.isfinite(denoised)),
            _total(found.num_evaluations, self.num_chains * self.num_steps),
        )


def recursive(
    base: ScoreEstimator,
    *,
    depth: int = 1,
    segment: Float[Array, ""] | float = 0.7,
    scale: Float[Array, ""] | float = 1.0,
    num_chains: int = 4,
    num_steps: int = 16,
    step_size: Float[Array, ""] | float = 0.25,
) -> ScoreEstimator:
    """Recursive score estimation (RS-DMC) on top of another estimator.

    Parameters
    ----------
    base
        Estimator of the last segment.
    depth
        Number of segments before it, at least 1; the cost grows exponentially with it.
    segment
        Length of a segment in the time of the Ornstein-Uhlenbeck process, positive.
    scale
        Deviation of the target, about; positive, in its units.
    num_chains, num_steps
        Langevin chains over a segment's end, and their steps, of which the second half is averaged.
    step_size
        Relative to the inverse curvature of the segment's posterior; positive, below 1.

    Returns
    -------
    ScoreEstimator, without an estimate of the marginal; its ``ess`` compares the spread of the chains' means with the
    variance, and is 1 for a single chain.

    Raises
    ------
    TypeError
        If ``base`` is no estimator.
    ValueError
        If a number is out of range.

    Source: "Faster Sampling without Isoperimetry via Diffusion-based Monte Carlo", arXiv 2401.06325.
    """
    if not isinstance(base, ScoreEstimator):
        raise TypeError(f"base must be an estimator from smcdiff.estimators, got {type(base).__name__}.")
    for name, value in (("depth", depth), ("num_chains", num_chains), ("num_steps", num_steps)):
        check_count(name, value)
    for name, number in (("segment", segment), ("scale", scale), ("step_size", step_size)):
        check_positive(name, number)
    return _Recursive(base, segment, scale, step_size, depth, num_chains, num_steps)


def _total(counts, num_calls):
    """Evaluations of all calls: the same number each, which mapped code returns stacked."""
    return jnp.ravel(counts)[0] * num_calls
