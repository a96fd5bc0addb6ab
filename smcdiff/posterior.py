"""The front door: posterior samples of an inverse problem under a diffusion prior, in one call."""

from collections.abc import Callable

from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.density import DiffusionModel, require
from smcdiff.guidance import Twist
from smcdiff.inverse import InverseProblem
from smcdiff.schedules import log_snr_times
from smcdiff.smc import SMCResult, run_smc, tds

__all__ = ["METHODS", "posterior"]

METHODS: dict[str, Callable] = {"tds": tds}


def posterior(
    rng_key: PRNGKeyArray,
    model: DiffusionModel,
    problem: InverseProblem,
    *,
    method: str = "tds",
    num_particles: int = 64,
    num_chains: int = 4,
    num_steps: int = 100,
    times: Float[Array, " steps"] | None = None,
    twist: Twist | None = None,
    ess_threshold: float | Float[Array, " steps"] = 0.5,
    batch_size: int | None = None,
    progress: bool = True,
) -> SMCResult:
    """Draw weighted posterior samples, with log evidence, by several independent SMC runs.

    It returns what the long form returns::

        fk = smcdiff.tds(model, problem, times=smcdiff.log_snr_times(model.schedule, num_steps))
        result = smcdiff.run_smc(rng_key, fk, num_particles, num_chains=num_chains)

    Parameters
    ----------
    rng_key
        Key.
    model
        The prior.
    problem
        The measurement.
    method
        Sampler: "tds".
    num_particles
        Particles of one run.
    num_chains
        Independent runs.
    num_steps
        Reverse steps, on the grid uniform in log-SNR.
    times
        Another grid from 1 to 0, instead of ``num_steps``.
    twist
        See `smcdiff.guidance`; the sampler's default if omitted.
    ess_threshold, batch_size, progress
        See `smcdiff.run_smc`.

    Returns
    -------
    SMCResult
        With the samples themselves as ``particles``, shape (num_chains, num_particles, *event_shape).

    Raises
    ------
    ValueError
        If ``method`` is unknown, or as `smcdiff.tds` and `smcdiff.run_smc` do.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}.")
    require(model, DiffusionModel, "posterior")
    grid = log_snr_times(model.schedule, num_steps) if times is None else times
    fk = METHODS[method](model, problem, times=grid, twist=twist)
    result = run_smc(
        rng_key,
        fk,
        num_particles,
        num_chains=num_chains,
        ess_threshold=ess_threshold,
        batch_size=batch_size,
        progress=progress,
    )
    return result._replace(particles=result.particles.x)
