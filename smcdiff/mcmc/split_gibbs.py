"""Split Gibbs sampling of inverse problems: the likelihood and the diffusion prior take turns.

A copy z of the sample x, bound to it by noise of deviation rho, carries the measurement:

    pi(x, z) ~ p(x) N(z; x, rho^2 I) L(y | z).

    z | x ~ N(z; x, rho^2 I) L(y | z)      knows no prior,
    x | z ~ p(x) N(z; x, rho^2 I)          knows no measurement: it is denoising.

The second is the reverse process of the diffusion, with its noise, from alpha z at the time with sigma/alpha = rho.
The first is drawn exactly for a linear operator and Gaussian noise, by conditioning a free draw on the measurement,

    w = x + rho xi,   z = w + rho^2 A^T (rho^2 A A^T + R)^-1 (y + e - A w),   e ~ N(0, R),

solved by conjugate gradients, and by Metropolis-adjusted Langevin steps otherwise. The law of x is the posterior under
the noise R + rho^2 A A^T: known, and the posterior as rho goes to 0, while the turns get shorter with rho. Hence the
falling schedules of rho, of which the last one is kept.

Sources: Vono, Dobigeon and Chainais, "Split-and-augmented Gibbs sampler", arXiv 1804.05809; Wu et al., "Principled
Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors", arXiv 2405.18782.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from smcdiff.checks import check_count, check_order, check_positive
from smcdiff.density import DiffusionModel, LogDensity, as_pytree, require, warn_unless_diffusion
from smcdiff.guidance.twist import whitened_apply, whitened_residual
from smcdiff.inverse import GaussianNoise, InverseProblem, LinearOperator
from smcdiff.mcmc.langevin import mala
from smcdiff.mcmc.log_concave_chain import check_noise_std
from smcdiff.mcmc.restart import denoise_along

__all__ = [
    "HasLogLikelihood",
    "LikelihoodStep",
    "SplitGibbsInfo",
    "SplitGibbsState",
    "as_measurement",
    "likelihood_step",
    "log_likelihood",
    "split_gibbs",
]


class SplitGibbsState(NamedTuple):
    """State of split Gibbs sampling.

    Attributes
    ----------
    position
        The sample x, of shape ``event_shape``.
    copy
        Its noisy copy z, which agrees with the measurement.
    step
        Number of steps made: the place in the schedule of ``rho``.
    """

    position: Float[Array, "*event"]
    copy: Float[Array, "*event"]
    step: Int[Array, ""]


class SplitGibbsInfo(NamedTuple):
    """What happened in one turn.

    Attributes
    ----------
    acceptance_rate
        Mean probability of acceptance of the Langevin steps on the likelihood; 1 where it was drawn exactly.
    solve_residual
        Residual of the linear system, relative to its right-hand side; 0 where none was solved. Not small: more
        iterations are needed.
    rho
        Deviation of the noise between x and z in this step.
    is_divergent
        Whether one of the Langevin steps diverged.
    """

    acceptance_rate: Float[Array, ""]
    solve_residual: Float[Array, ""]
    rho: Float[Array, ""]
    is_divergent: Bool[Array, ""]


@runtime_checkable
class HasLogLikelihood(Protocol):
    """A measurement that says how likely it is made of a sample."""

    def log_likelihood(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        """log L(y | x), up to a constant."""
        ...


class LikelihoodStep(eqx.Module):
    """The draw of z from N(z; x, rho^2 I) L(y | z); build it with `likelihood_step`."""

    problem: Any
    step_size: Float[Array, ""] | float
    curvature: Float[Array, ""] | float
    num_mala_steps: int = eqx.field(static=True)
    max_iterations: int = eqx.field(static=True)
    is_linear: bool = eqx.field(static=True)

    def __call__(self, rng_key, x, start, rho):
        """A new z, the acceptance rate, the solver's residual, and divergence; Langevin steps begin at ``start``."""
        one = jnp.ones((), x.dtype)
        if self.is_linear:
            z, residual = condition_draw(rng_key, self.problem, x, rho, self.max_iterations)
            return z, one, residual, jnp.zeros((), bool)
        target = LogDensity(Partial(_log_anchored, self.problem, x, rho))
        algorithm = mala(target, self.step_size / (1.0 / rho**2 + self.curvature))
        walker, infos = jax.lax.scan(
            lambda walker, key: algorithm.step(key, walker),
            algorithm.init(start, rng_key),
            jax.random.split(rng_key, self.num_mala_steps),
        )
        return walker.position, jnp.mean(infos.acceptance_rate), 0.0 * one, jnp.any(infos.is_divergent)


def likelihood_step(
    who: str,
    model: DiffusionModel,
    problem: Any,
    step_size: Float[Array, ""] | float,
    curvature: Float[Array, ""] | float,
    num_mala_steps: int,
    max_iterations: int,
) -> LikelihoodStep:
    """The draw given the measurement, checked; ``who`` asks, for messages. See `split_gibbs`."""
    require(model, DiffusionModel, who)
    warn_unless_diffusion(model, who)
    check_positive("step_size", step_size)
    if not isinstance(curvature, jax.core.Tracer) and not 0.0 <= curvature < np.inf:
        raise ValueError(f"curvature must be non-negative and finite, got {curvature}.")
    check_count("num_mala_steps", num_mala_steps)
    check_count("max_iterations", max_iterations)
    is_linear = False
    if isinstance(problem, InverseProblem):
        problem.operator.check(model.event_shape)
        is_linear = isinstance(problem.operator, LinearOperator) and isinstance(problem.noise, GaussianNoise)
    problem = as_measurement(problem)
    return LikelihoodStep(problem, step_size, curvature, num_mala_steps, max_iterations, is_linear)


def as_measurement(problem: Any) -> Any:
    """What has a ``log_likelihood(x)``, or the function itself as a pytree; a `TypeError` if it is neither."""
    if isinstance(problem, HasLogLikelihood):
        return problem
    if not callable(problem):
        raise TypeError(
            f"problem must be an InverseProblem, an object with log_likelihood(x), or a function x -> log "
            f"likelihood, got {type(problem).__name__}."
        )
    return as_pytree(problem)


def log_likelihood(problem: Any, x: Float[Array, "*event"]) -> Float[Array, ""]:
    """log L at one sample ``x``, of what `as_measurement` returned."""
    return problem.log_likelihood(x) if isinstance(problem, HasLogLikelihood) else problem(x)


class _Kernel(eqx.Module):
    model: DiffusionModel
    likelihood: LikelihoodStep
    rho: Float[Array, " K"]
    log_snr_max: Float[Array, ""] | float
    num_steps: int = eqx.field(static=True)
    order: int = eqx.field(static=True)


def split_gibbs(
    model: DiffusionModel,
    problem: Any,
    rho: Float[Array, "*K"] | float,
    *,
    num_steps: int = 25,
    log_snr_max: Float[Array, ""] | float = 5.0,
    order: int = 2,
    step_size: Float[Array, ""] | float = 0.3,
    curvature: Float[Array, ""] | float = 0.0,
    num_mala_steps: int = 20,
    max_iterations: int = 50,
) -> SamplingAlgorithm:
    """Alternate between the likelihood and the denoising of a diffusion prior, bound by noise of deviation rho.

    Parameters
    ----------
    model
        The prior, any diffusion model.
    problem
        An `InverseProblem`; or an object with ``log_likelihood(x)``, or that function, which must be differentiable.
    rho
        Deviation of the noise between sample and copy, in data units, positive: a number, or a schedule (K,), of which
        step k uses entry k, and the last one from step K - 1 on. At most sigma(1)/alpha(1) of the model's schedule.
    num_steps
        Reverse steps of one denoising, each a call of the denoiser.
    log_snr_max
        Last log-SNR before the final step to t = 0; its noise exp(-log_snr_max) must lie well below ``rho``.
    order
        Order of the reverse steps, 1 or 2, see `smcdiff.mcmc.restart.denoise_along`.
    step_size, curvature, num_mala_steps
        Langevin steps on the likelihood, step_size / (1/rho^2 + curvature), and their number. The curvature is that of
        -log L where it is largest, for instance |A|^2 / noise^2; it matters where the likelihood is narrower than rho.
        Unused for linear Gaussian problems.
    max_iterations
        Cap of the conjugate gradients for linear Gaussian problems; see ``solve_residual`` of the info.

    Returns
    -------
    SamplingAlgorithm, with `SplitGibbsState` and `SplitGibbsInfo`. Started without a position it draws one from the
    prior as seen from noise of deviation ``rho[0]``, which for large ``rho[0]`` is the prior.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser, or ``problem`` no likelihood.
    ValueError
        If a number is out of range, or the operator does not fit the model.

    Warns
    -----
    UserWarning
        If ``model`` is a composition, which is not the noised version of its law at t = 0.

    Source: Wu et al., "Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors",
    arXiv 2405.18782.
    """
    likelihood = likelihood_step(
        "split_gibbs", model, problem, step_size, curvature, num_mala_steps, max_iterations
    )
    check_noise_std("rho", rho, model)
    check_count("num_steps", num_steps)
    check_order(order)
    rho = jnp.atleast_1d(jnp.asarray(rho, float))
    if rho.ndim != 1:
        raise ValueError(f"rho must be a number or have shape (K,), got {rho.shape}.")
    check_floor("rho", rho, log_snr_max)
    kernel = _Kernel(model, likelihood, rho, log_snr_max, num_steps, order)
    return SamplingAlgorithm(Partial(_init, kernel), Partial(_step, kernel))


def check_floor(name: str, rho, log_snr_max) -> None:
    """Raise a `ValueError` unless the grid from noise ``rho`` to ``log_snr_max`` falls; tracers pass."""
    if isinstance(rho, jax.core.Tracer) or isinstance(log_snr_max, jax.core.Tracer):
        return
    smallest = float(np.min(rho))
    if not smallest > np.exp(-log_snr_max):
        raise ValueError(
            f"{name} must exceed the noise exp(-log_snr_max) = {np.exp(-log_snr_max):.3g} at which denoising ends, "
            f"got {smallest:.3g}; raise log_snr_max."
        )


def times_from(schedule, rho, log_snr_max, num_steps: int) -> Float[Array, " num_steps+1"]:
    """Times from sigma/alpha = ``rho`` to 0, uniform in log-SNR up to ``log_snr_max``."""
    share = jnp.linspace(0.0, 1.0, num_steps, dtype=rho.dtype)
    levels = (1.0 - share) * -jnp.log(rho) + share * log_snr_max
    return jnp.append(schedule.time_from_log_snr(levels), jnp.zeros((), rho.dtype))


def _init(kernel, position, rng_key):
    """Start from a position, or from the prior."""
    if position is None:
        z = kernel.rho[0] * jax.random.normal(rng_key, kernel.model.event_shape, kernel.rho.dtype)
        position = _denoise(kernel, jax.random.fold_in(rng_key, 1), z, kernel.rho[0])
    return SplitGibbsState(position, position, jnp.zeros((), int))


def _step(kernel, rng_key, state):
    """The copy given sample and measurement, then the sample given the copy."""
    key_likelihood, key_prior = jax.random.split(rng_key)
    rho = kernel.rho[jnp.minimum(state.step, len(kernel.rho) - 1)].astype(state.position.dtype)
    z, acceptance, residual, is_divergent = kernel.likelihood(key_likelihood, state.position, state.copy, rho)
    x = _denoise(kernel, key_prior, z, rho)
    return SplitGibbsState(x, z, state.step + 1), SplitGibbsInfo(acceptance, residual, rho, is_divergent)


def _denoise(kernel, rng_key, z, rho):
    """A draw of x given z = x + rho noise, by the reverse process."""
    model = kernel.model
    times = times_from(model.schedule, rho, kernel.log_snr_max, kernel.num_steps)
    noisy = model.schedule.alpha(times[0]) * z
    return denoise_along(rng_key, model, noisy, times, eta=1.0, order=kernel.order)


def condition_draw(rng_key, problem: InverseProblem, x, rho, max_iterations: int):
    """A free draw from N(z; x, rho^2 I) N(y; A z, R), which its residual corrects; and the residual of the solver."""
    key_free, key_noise = jax.random.split(rng_key)
    free = x + rho * jax.random.normal(key_free, x.shape, x.dtype)
    residual, adjoint = whitened_residual(problem, free)
    right = residual + jax.random.normal(key_noise, residual.shape, residual.dtype)

    def matvec(v):
        return v + rho**2 * whitened_apply(problem, adjoint(v))

    solution, _ = jax.scipy.sparse.linalg.cg(matvec, right, maxiter=max_iterations)
    left, whole = (jnp.sum(v**2) for v in (right - matvec(solution), right))
    left = jnp.sqrt(left / jnp.maximum(whole, jnp.finfo(whole.dtype).tiny))  # 0 where there is no measurement
    return free + rho**2 * adjoint(solution), left


def _log_anchored(problem, x, rho, z):
    return log_likelihood(problem, z) - 0.5 * jnp.sum(((z - x) / rho) ** 2)
