"""Log density of a diffusion model by its probability-flow equation.

In the coordinates z = x_t / alpha_t and u = log(sigma_t / alpha_t) = -log_snr(t), the flow which has the marginals of
the diffusion is, with the denoiser D,

    dz/du = z - D(alpha z, t),        d log q_u(z_u)/du = -(d - tr dD/dz).

It is followed from the data, where u is so small that its noise does not matter, to t = 1, where q is N(0,
(sigma/alpha)^2 I):

    log p(x) = log q_1(z_1) + integral of (d - tr dD/dz) du.

The trace takes d Jacobian-vector products, or is estimated by fixed probes of signs (Hutchinson), which is unbiased in
the integrand and leaves a deterministic function of x.

Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", arXiv 2011.13456, App.
D.
"""

import math

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.checks import check_count, check_positive
from smcdiff.density import DiffusionModel, require, warn_unless_diffusion

__all__ = ["ode_logdensity"]


def ode_logdensity(
    model: DiffusionModel,
    x: Float[Array, "*event"],
    *,
    num_probes: int | None = None,
    log_snr_max: Float[Array, ""] | float = 5.0,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    max_steps: int = 512,
) -> Float[Array, ""]:
    """Log density of one sample under a diffusion model, differentiable in the sample and in the weights.

    Its gradient is the score only as far as the denoiser is the exact one: a network's flow has a density of its own.

    Parameters
    ----------
    model
        The diffusion model.
    x
        One sample, of shape ``event_shape``.
    num_probes
        Probes of the trace; None takes the exact trace, at d Jacobian-vector products an evaluation.
    log_snr_max
        Where the flow begins: the density is that of the data with noise of deviation exp(-log_snr_max).
    rtol, atol
        Tolerances of the adaptive solver (Tsitouras 5).
    max_steps
        Its largest number of steps; the density is NaN where they do not suffice.

    Returns
    -------
    Scalar, in nats.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser.
    ValueError
        If ``x`` has another shape than the model's samples, or a number is out of range.

    Warns
    -----
    UserWarning
        If ``model`` is a composition, which is not the noised version of its law at t = 0.

    Source: "Score-Based Generative Modeling through Stochastic Differential Equations", arXiv 2011.13456.
    """
    require(model, DiffusionModel, "ode_logdensity")
    warn_unless_diffusion(model, "ode_logdensity")
    if jnp.shape(x) != tuple(model.event_shape):
        raise ValueError(f"x must be one sample of shape {tuple(model.event_shape)}, got {jnp.shape(x)}.")
    check_count("max_steps", max_steps)
    check_positive("rtol", rtol)
    check_positive("atol", atol)
    if num_probes is not None:
        check_count("num_probes", num_probes)
    schedule, dimension, dtype = model.schedule, x.size, x.dtype
    end = -schedule.log_snr(jnp.ones((), dtype))

    def velocity(u, carry, _):
        z, _ = carry
        t = schedule.time_from_log_snr(-u)
        alpha = schedule.alpha(t)

        def denoise(z):
            return model.denoise(alpha * z, t)

        denoised, push = jax.linearize(denoise, z)
        return z - denoised, dimension - _trace(push, z, num_probes)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Tsit5(),
        jnp.asarray(-log_snr_max, dtype),
        end,
        None,
        (x, jnp.zeros((), dtype)),
        stepsize_controller=diffrax.PIDController(rtol, atol),
        max_steps=max_steps,
        throw=False,
    )
    z, change = jax.tree.map(lambda leaf: leaf[-1], solution.ys)
    log_base = -0.5 * jnp.sum((z * jnp.exp(-end)) ** 2) - dimension * (end + 0.5 * math.log(2 * math.pi))
    return jnp.where(solution.result == diffrax.RESULTS.successful, log_base + change, jnp.nan)


def _trace(push, z, num_probes):
    """Trace of the linear map ``push``, exact or estimated."""
    if num_probes is None:
        basis = jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
        return jnp.trace(jax.vmap(push)(basis).reshape(z.size, z.size))
    probes = jax.random.rademacher(jax.random.key(0), (num_probes, *z.shape), z.dtype)
    return jnp.mean(jax.vmap(lambda probe: jnp.sum(probe * push(probe)))(probes))
