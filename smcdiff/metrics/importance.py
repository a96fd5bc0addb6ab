"""Adaptive importance sampling: several expectations, and the evidence, from one growing sample.

In round t, N points come from the defensive mixture q_t = (1 - c) r_t + c q_1 of a fitted mixture r_t of Student laws
and the first proposal. Their weights p/q_t are unbiased given the rounds before, and the rounds are pooled,

    E f = sum_t a_t sum_i w_ti f(x_ti) / sum_t a_t sum_i w_ti,    Z = sum_t a_t mean_i w_ti / sum_t a_t,

with factors a_t known before the round: the efficiency ESS/N of the round before, and 0 for the first round, which is
a pilot. Adaptation so adds no bias: that of the ratio is of order one over the size, and that of Z comes from stopping
and from the factors only. For the fit, but not for the estimates, all points have weights p / mean of all q_s (adaptive
multiple importance sampling). These are more even, but biased: points that attract later proposals are weighed down.

The expectations of all functions f use control variates of mean zero under p that its score s gives: s, and for every
quadratic polynomial P the Stein operator Laplace P + grad P.s, in standardised coordinates. Their coefficients are
those of least squares with weights w^2, which minimise the variance of the ratio; the standard error is that of the
residuals, corrected for the number of coefficients. For a Gaussian p, linear and quadratic f have no error at all.
Rounds end when all errors, at a joint confidence, are below the tolerance.

Sources: Cornuet et al., "Adaptive Multiple Importance Sampling", arXiv 0907.1254; Portier and Delyon, "Asymptotic
optimality of adaptive importance sampling", arXiv 1806.00989 (factors of rounds); Owen and Zhou, "Safe and Effective
Importance Sampling" (2000); Mira, Solgi and Imparato, "Zero Variance Markov Chain Monte Carlo for Bayesian Estimators",
arXiv 1012.2983.
"""

from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from smcdiff.batching import batched_map
from smcdiff.checks import check_between, check_count, check_positive
from smcdiff.density import HasLogDensity, as_pytree, as_target, logdensity_and_score, require
from smcdiff.metrics.distance import dot
from smcdiff.metrics.student_proposal import StudentMixture, defend, draw, log_density, update
from smcdiff.metrics.triangular import cholesky, solve_lower, solve_positive

__all__ = ["ImportanceEstimate", "adaptive_importance"]


class ImportanceEstimate(NamedTuple):
    """What adaptive importance sampling found.

    Attributes
    ----------
    estimate
        Expectations of the functions, in the shape that ``functions`` returns.
    standard_error
        Of each.
    log_evidence
        Log of the integral of exp(logdensity).
    ess
        Effective size of the pooled points.
    num_evaluations
        Evaluations of the log density and of its gradient.
    converged
        Whether all errors met the tolerance before the cap on rounds, with enough effective size to tell.
    """

    estimate: Float[Array, "*shape"]
    standard_error: Float[Array, "*shape"]
    log_evidence: Float[Array, ""]
    ess: Float[Array, ""]
    num_evaluations: Int[Array, ""]
    converged: Bool[Array, ""]


def adaptive_importance(
    rng_key: PRNGKeyArray,
    logdensity: Any,
    functions,
    *,
    mean,
    covariance,
    tolerance,
    max_rounds: int = 20,
    num_samples: int = 1000,
    confidence: float = 0.95,
    degrees_of_freedom: int = 5,
    control_order: int = 2,
    min_ess: float = 200.0,
    batch_size: int | None = None,
) -> ImportanceEstimate:
    """Expectations under an unnormalised density, to a given precision.

    For densities of up to some ten dimensions that a few ellipses cover. A mode that no component of the first
    proposal reaches is not found, and nothing reports it.

    Parameters
    ----------
    rng_key
        Key.
    logdensity
        A target with a log density, or a function of one vector (d,) that is one, up to a constant.
    functions
        ``functions(x) -> array`` at one vector: all that is to be averaged, in any shape.
    mean, covariance
        Of the first proposal: (d,) and (d, d), or (K, d) and (K, d, d) for a mixture of K. Take it too wide
        rather than too narrow.
    tolerance
        Positive, a number or one for each function: wanted half width of the confidence intervals.
    max_rounds
        Cap on the rounds, at least 2.
    num_samples
        N, points a round.
    confidence
        Of all intervals together (Bonferroni).
    degrees_of_freedom
        Of the Student laws, a positive integer.
    control_order
        2 or 1, the degree of the polynomials that make control variates, or 0 for none, which needs no gradient.
    min_ess
        Effective size below which no error is believed.
    batch_size
        Points evaluated together, or None for all.

    Raises
    ------
    ValueError
        If shapes or numbers do not fit.
    TypeError
        If ``logdensity`` has no log density.
    """
    target = as_target(logdensity)
    require(target, HasLogDensity, "adaptive_importance")
    dtype = jnp.result_type(float)
    mean, covariance = jnp.asarray(mean, dtype), jnp.asarray(covariance, dtype)
    means = mean[None] if mean.ndim == 1 else mean
    covariances = covariance[None] if covariance.ndim == 2 else covariance
    if means.ndim != 2 or covariances.shape != (*means.shape, means.shape[-1]):
        raise ValueError(
            f"mean and covariance must have the shapes (d,) and (d, d), or (K, d) and (K, d, d), got {mean.shape} "
            f"and {covariance.shape}."
        )
    check_positive("tolerance", tolerance)
    check_count("max_rounds", max_rounds, 2)
    check_count("num_samples", num_samples, 10)
    check_between("confidence", confidence, 0.0, 1.0)
    check_count("degrees_of_freedom", degrees_of_freedom)
    if control_order not in (0, 1, 2):
        raise ValueError(f"control_order must be 0, 1 or 2, got {control_order}.")
    functions = as_pytree(functions)
    shape = jax.eval_shape(functions, means[0]).shape
    quantile = NormalDist().inv_cdf(1 - (1 - confidence) / (2 * max(1, int(np.prod(shape)))))
    limits = jnp.broadcast_to(jnp.asarray(tolerance, dtype), shape).reshape(-1) / quantile
    first = StudentMixture(
        jnp.full(len(means), -jnp.log(len(means)), dtype), means, jax.vmap(cholesky)(covariances)
    )
    sizes = (degrees_of_freedom, max_rounds, num_samples, control_order, batch_size)
    least = jnp.asarray(min_ess, dtype)
    estimate, error, *rest = _run(rng_key, target, functions, first, limits, least, *sizes)
    return ImportanceEstimate(estimate.reshape(shape), error.reshape(shape), *rest)


@partial(jax.jit, static_argnames=("nu", "max_rounds", "num_samples", "control_order", "batch_size"))
def _run(
    rng_key, target, functions, first, limits, min_ess, nu, max_rounds, num_samples, control_order, batch_size
):
    dimension, dtype = first.means.shape[1], first.means.dtype
    size = max_rounds * num_samples
    rounds = jnp.arange(size, dtype=jnp.int32) // num_samples
    evaluate = batched_map(Partial(_evaluate, target, functions, control_order > 0), batch_size)

    def unfinished(carry):
        return ~carry["done"] & (carry["t"] < max_rounds)

    def step(carry):
        t, proposals = carry["t"], carry["proposals"]
        fitted = jax.tree.map(lambda leaf: leaf[t], proposals)
        now = defend(fitted, first)
        new = draw(jax.random.fold_in(rng_key, t), now, nu, num_samples)

        def put(all_rows, rows):
            return jax.lax.dynamic_update_slice_in_dim(all_rows, rows, t * num_samples, axis=0)

        log_p, scores, values = (put(carry[k], v) for k, v in zip(_ROWS, evaluate(new), strict=True))
        x = put(carry["x"], new)
        log_now = log_density(x, now, nu)
        log_own = jnp.where(rounds == t, log_now, carry["log_own"])
        # Sum of the densities of all proposals so far: one new term for old points, all terms for new points.
        terms = jax.vmap(lambda leaf: log_density(new, defend(leaf, first), nu))(proposals)
        terms = jnp.where(jnp.arange(max_rounds, dtype=jnp.int32)[:, None] <= t, terms, -jnp.inf)
        log_all = put(jnp.logaddexp(carry["log_all"], log_now), jax.nn.logsumexp(terms, axis=0))

        log_w = jnp.where(rounds <= t, log_p - log_own, -jnp.inf)
        log_pooled = log_w + jnp.log(carry["factors"])[rounds]
        weights, ess = _normalise(log_pooled)
        estimate, error = _estimate(weights, x, scores, values, control_order)
        log_evidence = jax.nn.logsumexp(log_pooled) - jnp.log(num_samples * jnp.sum(carry["factors"]))

        fit_weights, fit_ess = _normalise(jnp.where(rounds <= t, log_p - log_all, -jnp.inf))
        following = update(fit_weights, fit_ess, x, fitted, nu)
        efficiency = _normalise(jnp.where(rounds == t, log_w, -jnp.inf))[1] / num_samples
        return {
            "t": t + 1,
            "proposals": jax.tree.map(lambda a, b: a.at[t + 1].set(b, mode="drop"), proposals, following),
            "factors": carry["factors"].at[t + 1].set(jnp.maximum(efficiency, 1 / num_samples), mode="drop"),
            "x": x,
            "log_p": log_p,
            "scores": scores,
            "values": values,
            "log_own": log_own,
            "log_all": log_all,
            "found": (estimate, error, log_evidence, ess),
            "done": jnp.all(error <= limits) & (ess >= min_ess),
        }

    nan, none = jnp.asarray(jnp.nan, dtype), jnp.full(size, -jnp.inf, dtype)
    start = {
        "t": jnp.zeros((), jnp.int32),
        "proposals": jax.tree.map(lambda leaf: jnp.stack([leaf] * max_rounds), first),
        "factors": jnp.zeros(max_rounds, dtype),
        "x": jnp.zeros((size, dimension), dtype),
        "log_p": none,
        "scores": jnp.zeros((size, dimension), dtype),
        "values": jnp.zeros((size, len(limits)), dtype),
        "log_own": none,
        "log_all": none,
        "found": (jnp.full(len(limits), nan), jnp.full(len(limits), nan), nan, nan),
        "done": jnp.asarray(False),
    }
    outcome = jax.lax.while_loop(unfinished, step, start)
    return *outcome["found"], outcome["t"] * num_samples, outcome["done"]


def _normalise(log_weights):
    """Weights of sum 1 and their effective size; zeros if no weight is left."""
    has_any = jnp.max(log_weights) > -jnp.inf
    weights = jnp.where(has_any, jax.nn.softmax(log_weights), 0.0)
    return weights, jnp.where(has_any, 1 / jnp.sum(weights**2), 0.0)


_ROWS = ("log_p", "scores", "values")


def _evaluate(target, functions, with_score, x):
    """Log density, score and functions at one point; where the density is no number, its weight is zero."""
    if with_score:
        log_p, score = logdensity_and_score(target, x)
    else:
        log_p, score = target.logdensity(x), jnp.zeros_like(x)
    is_valid = ~(jnp.isnan(log_p) | jnp.isposinf(log_p))
    return jnp.where(is_valid, log_p, -jnp.inf), score, jnp.ravel(functions(x)).astype(x.dtype)


def _estimate(weights, x, scores, values, control_order):
    """Expectations by weighted regression on control variates of mean zero, and their standard errors."""
    alive = (weights > 0)[:, None]
    values, scores, x = (jnp.where(alive, rows, 0.0) for rows in (values, scores, x))
    plain = dot(weights, values)
    squared = weights**2 / jnp.sum(weights**2)
    error_scale = jnp.sum(weights**2)
    deviations = values - plain[None]
    variance = dot(squared, deviations**2)
    if control_order == 0:
        return plain, jnp.sqrt(error_scale * variance)
    controls = jnp.where(alive, _stein_controls(weights, x, scores, control_order), 0.0)
    centre = dot(squared, controls)
    centred = controls - centre[None]
    scale = jnp.sqrt(dot(squared, centred**2)) + jnp.finfo(x.dtype).tiny
    centred = centred / scale[None]
    count = centred.shape[1]
    gram = dot((squared[:, None] * centred).T, centred)
    gram = gram + 10 * count * jnp.finfo(x.dtype).eps * jnp.eye(count, dtype=x.dtype)
    right = dot((squared[:, None] * centred).T, deviations)
    coefficients = solve_positive(gram, right)
    shift = dot(weights, controls) / scale
    estimate = plain - dot(shift, coefficients)
    residuals = deviations - dot(controls / scale[None], coefficients) + dot(shift, coefficients)[None]
    freedom = 1 / jnp.sum(squared**2)
    variance_left = dot(squared, residuals**2) * freedom / jnp.maximum(freedom - count - 1, 1.0)
    # Too few effective points for the coefficients, or nothing gained: the plain mean.
    use = (freedom > 2 * (count + 1)) & (variance_left < variance)
    error = jnp.sqrt(error_scale * jnp.where(use, variance_left, variance))
    return jnp.where(use, estimate, plain), error


def _stein_controls(weights, x, scores, order):
    """Functions of mean zero under the target: the score, and z_i s_j + z_j s_i + 2 [i = j], standardised."""
    mean = dot(weights, x)
    centred = x - mean[None]
    covariance = dot((weights[:, None] * centred).T, centred)
    size = jnp.trace(covariance) / len(covariance)
    eye = jnp.eye(len(covariance), dtype=x.dtype)
    factor = cholesky(covariance + (1e-5 * size + jnp.finfo(x.dtype).tiny) * eye)
    z = solve_lower(factor, centred.T).T
    s = dot(scores, factor)
    if order == 1:
        return s
    rows, columns = np.triu_indices(x.shape[1])
    products = z[:, rows] * s[:, columns] + z[:, columns] * s[:, rows]
    return jnp.concatenate([s, products + 2.0 * jnp.asarray(rows == columns, x.dtype)[None]], axis=1)
