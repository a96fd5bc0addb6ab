"""Eight schools: effects y_j of coaching with known errors s_j, and a hierarchical model of them.

    mu ~ N(0, 5^2),  tau ~ HalfCauchy(5),  theta_j given mu, tau ~ N(mu, tau^2),  y_j given theta_j ~ N(theta_j, s_j^2).

A sample is (mu, log tau, theta_1, ..., theta_8), or with z_j = (theta_j - mu) / tau in place of theta_j. Jacobians and
all constants of prior and likelihood are in the density, so that Z = p(y).

Given tau all is Gaussian: y_j ~ N(mu, v_j) with v_j = tau^2 + s_j^2, mu given tau, y has precision 1/25 + sum_j 1/v_j,
and z_j given mu, tau, y is N(tau (y_j - mu) / v_j, s_j^2 / v_j). One integral over log tau remains: the trapezoidal
rule gives it to machine precision, and inverting its distribution function makes an exact sampler. Centred, the neck of
the funnel at small tau is where samplers fail.

Sources: Rubin, "Estimation in parallel randomized experiments", Journal of Educational Statistics 6 (1981); priors as
in posteriordb's eight_schools.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.targets.inverse_cdf import InverseCdf
from smcdiff.targets.target import Target, exact_moments, parameter

__all__ = ["EightSchoolsTarget", "eight_schools"]

_EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
_SCALE = 5.0  # of both priors


class EightSchoolsTarget(Target):
    """The posterior of eight schools; build it with `eight_schools`."""

    effects: Float[Array, " 8"]
    errors: Float[Array, " 8"]
    log_tau: InverseCdf
    centered: bool = eqx.field(static=True)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (10,)

    def logdensity(self, x: Float[Array, " 10"]) -> Float[Array, ""]:
        """Log of prior times likelihood at one sample ``x``."""
        mu, log_tau, rest = x[0], x[1], x[2:]
        tau = jnp.exp(log_tau)
        z, theta = ((rest - mu) / tau, rest) if self.centered else (rest, mu + tau * rest)
        squares = (mu / _SCALE) ** 2 + jnp.sum(z**2) + jnp.sum(((self.effects - theta) / self.errors) ** 2)
        log_prior_tau = math.log(2 / (math.pi * _SCALE)) - jnp.log1p((tau / _SCALE) ** 2) + log_tau
        constant = -8.5 * math.log(2 * math.pi) - math.log(_SCALE) - jnp.sum(jnp.log(self.errors))
        jacobian = -8 * log_tau if self.centered else 0.0
        return constant + jacobian + log_prior_tau - 0.5 * squares

    def sample(self, rng_key: PRNGKeyArray, num_samples: int) -> Float[Array, "n 10"]:
        """Draw ``num_samples`` independent samples."""
        key_tau, key_mu, key_z = jax.random.split(rng_key, 3)
        log_tau = self.log_tau.sample(key_tau, (num_samples,))
        tau, square = jnp.exp(log_tau)[:, None], (self.errors**2)[None]
        variances = tau**2 + square
        precision = 1 / _SCALE**2 + jnp.sum(1 / variances, axis=1)
        normal = jax.random.normal(key_mu, (num_samples,), log_tau.dtype)
        mu = jnp.sum(self.effects[None] / variances, axis=1) / precision + normal / jnp.sqrt(precision)
        gap = self.effects[None] - mu[:, None]
        noise = jax.random.normal(key_z, (num_samples, 8), log_tau.dtype)
        z = tau * gap / variances + jnp.sqrt(square / variances) * noise
        rest = mu[:, None] + tau * z if self.centered else z
        return jnp.concatenate([mu[:, None], log_tau[:, None], rest], axis=1)


def eight_schools(centered: bool = False) -> EightSchoolsTarget:
    """The posterior of eight schools, with exact moments, evidence and samples.

    Parameters
    ----------
    centered
        Whether a sample holds theta_j, which is harder, rather than z_j.
    """
    effects, errors = np.array(_EFFECTS), np.array(_ERRORS)
    log_tau = np.linspace(-45.0, 15.0, 12_001)
    tau = np.exp(log_tau)[:, None]
    variances = tau**2 + errors**2
    precision = 1 / _SCALE**2 + np.sum(1 / variances, axis=1)
    centre = np.sum(effects / variances, axis=1) / precision
    # log p(y, log tau): the Gaussians' constants, and what is left of the squares when mu is integrated out.
    log_values = -0.5 * (np.sum(np.log(2 * np.pi * variances) + effects**2 / variances, axis=1))
    log_values += 0.5 * precision * centre**2 - 0.5 * np.log(precision) - math.log(_SCALE)
    log_values += math.log(2 / (math.pi * _SCALE)) - np.log1p((tau[:, 0] / _SCALE) ** 2) + log_tau
    weights = np.exp(log_values - log_values.max())
    log_evidence = float(log_values.max() + math.log(weights.sum() * (log_tau[1] - log_tau[0])))
    weights /= weights.sum()
    # z_j = slope (y_j - mu) + noise, with mu ~ N(centre, 1/precision): moments given tau.
    slope, gap = tau / variances, effects - centre[:, None]
    first, second = slope * gap, slope**2 * (gap**2 + 1 / precision[:, None]) + errors**2 / variances
    if centered:
        # theta_j = mu + tau z_j = (1 - share) mu + share y_j + noise.
        share = tau**2 / variances
        first = (1 - share) * centre[:, None] + share * effects
        second = first**2 + (1 - share) ** 2 / precision[:, None] + share * errors**2
    means = np.concatenate([centre[:, None], log_tau[:, None], first], axis=1)
    squares = np.concatenate([(centre**2 + 1 / precision)[:, None], log_tau[:, None] ** 2, second], axis=1)
    mean = weights @ means
    return EightSchoolsTarget(
        log_evidence,
        exact_moments(mean, np.sqrt(weights @ squares - mean**2)),
        parameter(effects),
        parameter(errors),
        InverseCdf.create(log_tau, log_values),
        centered,
    )
