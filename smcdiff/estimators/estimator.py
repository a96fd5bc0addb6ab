"""Estimates of the score of a noised density, from the bare density alone.

For x_0 ~ pi / Z and x = alpha x_0 + sigma eps, the law of x_0 given x is the denoising posterior

    q(x_0) ~ pi(x_0) N(x_0; c, r^2 I),      c = x / alpha the centre,  r = sigma / alpha the width,

whose mean is the denoised sample, and the score follows from it, s(x) = (alpha E_q[x_0] - x) / sigma^2. Two functions
of x_0 have the denoised sample as their mean under q,

    x_0                              (the denoising identity),
    c + r^2 grad log pi(x_0)         (the target score identity),

the first with less variance at high noise and the second at low noise: for modes of deviation tau their variances are
about r^2 tau^2 / (r^2 + tau^2) times 1 and r^2 / tau^2. Their difference is r^2 grad log q(x_0), of mean zero, and
serves as a control variate: the combination x_0 + a (c + r^2 grad log pi(x_0) - x_0) has the least variance for the
regression coefficient a, taken for every coordinate; it is exact for a Gaussian pi with a diagonal covariance. Both
need a pi without hard edges: the gradient does not see where pi jumps, and its mean is then not 0 under pi.

An estimator draws weighted samples from q. Those that draw from a Gaussian proposal, N(c, r^2 I) or what becomes of it
if a Gaussian reference N(m, s^2) is known that covers the target, give an unbiased estimate of

    Z(c, r) = integral of pi(x_0) N(x_0; c, r^2 I) dx_0 = alpha^d Z p_t(x).

To add an estimator, subclass `ScoreEstimator`. Sources: Huang et al., "Reverse Diffusion Monte Carlo", arXiv
2307.02037; De Bortoli et al., "Target Score Matching", arXiv 2402.08667 (the second identity).
"""

import abc
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from smcdiff.checks import check_positive

__all__ = [
    "Estimate",
    "Proposal",
    "Reference",
    "ScoreEstimator",
    "as_reference",
    "check_identity",
    "ess_of_chains",
    "proposal",
    "summarise",
]

IDENTITIES = ("denoising", "target", "combined")


class Estimate(NamedTuple):
    """What an estimator says of one noisy sample.

    Attributes
    ----------
    denoised
        Estimate of E_q[x_0], shaped like a sample.
    draw
        One draw from the weighted samples of q, shaped like a sample.
    variance
        Estimate of the variance of q, averaged over coordinates.
    log_marginal
        Log of an unbiased estimate of Z(c, r), the integral of pi(x_0) N(x_0; c, r^2 I); NaN where there is none.
    ess
        Effective number of samples from q behind the estimate.
    is_valid
        False where the estimate is not what it should be: no proposal was accepted, every weight is zero, a bound was
        exceeded, no chain has moved, one is where the density vanishes, or a value is not finite.
    num_evaluations
        Evaluations of the target's log density, with its gradient where that is used.
    """

    denoised: Float[Array, "*event"]
    draw: Float[Array, "*event"]
    variance: Float[Array, ""]
    log_marginal: Float[Array, ""]
    ess: Float[Array, ""]
    is_valid: Bool[Array, ""]
    num_evaluations: int | Array


class ScoreEstimator(eqx.Module):
    """Estimates the mean of the denoising posterior, and what belongs to it.

    An estimator may carry a state from one noise level to the next, such as the last positions of its chains.
    """

    has_marginal: eqx.AbstractClassVar[bool]

    def init(
        self,
        rng_key: PRNGKeyArray,
        target: Any,
        centre: Float[Array, "*event"],
        width: Float[Array, ""],
    ) -> tuple[PyTree, int | Array]:
        """The state before the first estimate, and the evaluations that it took; None and 0 without one."""
        del rng_key, target, centre, width
        return None, 0

    @abc.abstractmethod
    def __call__(
        self,
        rng_key: PRNGKeyArray,
        target: Any,
        centre: Float[Array, "*event"],
        width: Float[Array, ""],
        state: PyTree,
    ) -> tuple[Estimate, PyTree]:
        """Estimate at one noisy sample.

        Parameters
        ----------
        rng_key
            Key.
        target
            Object with a log density, and a score where that is used.
        centre, width
            c = x / alpha and r = sigma / alpha.
        state
            From `init`, or from the last call.

        Returns
        -------
        The estimate, and the state for the next noise level.
        """


class Reference(NamedTuple):
    """A Gaussian N(mean, std^2) that covers the target; numbers, or arrays like a sample."""

    mean: Float[Array, "*event"] | float
    std: Float[Array, "*event"] | float


def as_reference(value: Any) -> Reference | None:
    """A reference from a pair (mean, std), or None.

    Raises
    ------
    ValueError
        If it is no pair, or std is not positive.
    """
    if value is None:
        return None
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"reference must be None or a pair (mean, std) of a Gaussian, got {value!r}.")
    check_positive("the reference's std", value[1])
    return Reference(*value)


class Proposal(NamedTuple):
    """The denoising posterior of the reference, N(mean, std^2), against which the target's is weighed.

    Attributes
    ----------
    mean, std
        Arrays like a sample.
    log_constant
        Log of the integral of the reference's density times N(x_0; c, r^2 I); 0 without a reference.
    reference
        The reference, or None: then it is flat.
    """

    mean: Float[Array, "*event"]
    std: Float[Array, "*event"]
    log_constant: Float[Array, ""]
    reference: Reference | None

    def draw(self, rng_key: PRNGKeyArray, num_samples: int, antithetic: bool = False):
        """Samples (num_samples, *event); in pairs mirrored about the mean, if antithetic."""
        count = num_samples // 2 if antithetic else num_samples
        size = self.mean.size
        noise = jax.random.normal(rng_key, (count * size,), self.mean.dtype).reshape(count, *self.mean.shape)
        if antithetic:
            noise = jnp.concatenate([noise, -noise])
        return self.mean[None] + self.std[None] * noise

    def log_reference(self, x):
        """Log density of the reference at one sample."""
        if self.reference is None:
            return jnp.zeros((), x.dtype)
        mean, std = (jnp.asarray(value, x.dtype) for value in self.reference)
        return _log_normal(x - mean, jnp.broadcast_to(std, x.shape))


def proposal(
    reference: Reference | None, centre: Float[Array, "*event"], width: Float[Array, ""]
) -> Proposal:
    """What the denoising posterior would be if the target were the reference."""
    width = jnp.asarray(width, centre.dtype)
    if reference is None:
        return Proposal(centre, jnp.broadcast_to(width, centre.shape), jnp.zeros((), centre.dtype), None)
    mean, std = (jnp.broadcast_to(jnp.asarray(v, centre.dtype), centre.shape) for v in reference)
    total = jnp.hypot(std, width)
    gain, keep = (std / total) ** 2, (width / total) ** 2
    return Proposal(
        gain * centre + keep * mean,
        std * width / total,
        _log_normal(centre - mean, total),
        reference,
    )


def _log_normal(residual, std):
    scaled = residual / std
    return -0.5 * jnp.sum(scaled**2) - jnp.sum(jnp.log(std)) - 0.5 * residual.size * math.log(2.0 * math.pi)


def check_identity(identity: str) -> None:
    """Raise a `ValueError` unless ``identity`` names a way to the denoised sample."""
    if identity not in IDENTITIES:
        raise ValueError(f"identity must be one of {IDENTITIES}, got {identity!r}.")


def summarise(
    rng_key: PRNGKeyArray,
    samples: Float[Array, "n *event"],
    log_weights: Float[Array, " n"],
    gradients: Float[Array, "n *event"] | None,
    centre: Float[Array, "*event"],
    width: Float[Array, ""],
    identity: str,
) -> tuple[
    Float[Array, "*event"], Float[Array, "*event"], Float[Array, ""], Float[Array, ""], Bool[Array, ""]
]:
    """Denoised sample, draw, variance, effective sample size and validity, from weighted samples of q.

    Parameters
    ----------
    rng_key
        Key of the draw.
    samples, log_weights
        From q; the weights need not be normalised.
    gradients
        grad log pi at the samples, for other identities than "denoising".
    centre, width
        c and r.
    identity
        "denoising", "target" or "combined".
    """
    flat = samples.reshape(samples.shape[0], -1)
    usable = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    greatest = jnp.max(usable)
    is_valid = jnp.isfinite(greatest)
    usable = jnp.where(is_valid, usable, 0.0)
    weights = jax.nn.softmax(usable)
    square_sum = jnp.sum(weights**2)
    by_denoising = weights @ flat
    # Of weighted samples, 1 - sum w^2 of the variance is seen; a single one shows none.
    seen = jnp.maximum(1.0 - square_sum, jnp.finfo(flat.dtype).eps)
    variance = jnp.mean(weights @ (flat - by_denoising[None]) ** 2) / seen
    if gradients is None:
        denoised = by_denoising
    else:
        shift = centre.reshape(1, -1) + width**2 * gradients.reshape(flat.shape) - flat
        shift = jnp.where(weights[:, None] > 0, shift, 0.0)  # no gradient where the density vanishes
        mean_shift = weights @ shift
        share = jnp.ones(())
        if identity == "combined":
            cross = weights @ ((flat - by_denoising[None]) * (shift - mean_shift[None]))
            square = weights @ (shift - mean_shift[None]) ** 2
            share = jnp.clip(-cross / jnp.where(square > 0, square, 1.0), 0.0, 1.0)
        denoised = by_denoising + share.astype(flat.dtype) * mean_shift
    chosen = jax.random.categorical(rng_key, usable)
    is_valid &= jnp.all(jnp.isfinite(denoised))
    shape = centre.shape
    return denoised.reshape(shape), samples[chosen], variance, 1.0 / square_sum, is_valid


def ess_of_chains(
    means: Float[Array, "chains *event"], variance: Float[Array, ""], most: Float[Array, ""] | float
) -> Float[Array, ""]:
    """How many independent samples would have a mean as sure as that of chains is, by the spread of theirs.

    Parameters
    ----------
    means
        Mean of each chain.
    variance
        Of one sample, averaged over coordinates.
    most
        Upper bound.

    Returns
    -------
    From 1 to ``most``; 1 where the chains' means do not differ, as that of a single chain.
    """
    num_chains = means.shape[0]
    between = jnp.mean(jnp.var(means, axis=0, ddof=min(1, num_chains - 1)))
    ratio = num_chains * variance / jnp.where(between > 0, between, 1.0)
    return jnp.where(between > 0, jnp.clip(ratio, 1.0, most), 1.0)
