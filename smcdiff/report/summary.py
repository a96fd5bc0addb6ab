"""The numbers of a report: what the posterior says, how well it fits, and how far it can be trusted.

All averages are over the particles of all chains together, each chain weighed by its evidence estimate, as in
`SMCResult.mean`. R-hat and bulk ESS are ArviZ's, of the equally weighted draws of each chain:

    psnr      -10 log10(mean((m - truth)^2) / range^2) of the posterior mean m
    coverage  share of the unobserved pixels whose truth lies in its interval, from quantile 5 % to quantile 95 %
"""

from typing import Any

import arviz
import jax.numpy as jnp
import numpy as np
import xarray
from jaxtyping import Array, Bool, Float

from smcdiff.diagnostics.estimates import Estimates, estimate
from smcdiff.inverse import InverseProblem, unobserved
from smcdiff.smc import SMCResult

__all__ = ["coverage", "psnr", "scalar_quantities", "summarise"]

NUM_PIXELS = 5
UNCERTAIN = (
    0.05  # of the distance from black to white: wider intervals are counted apart, black corners are no feat
)


def psnr(image: Float[np.ndarray, "*event"], truth: Float[np.ndarray, "*event"], peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in decibels; infinity for equal images.

    Parameters
    ----------
    image, truth
        The images, of one shape.
    peak
        Distance from black to white.
    """
    error = np.mean((np.asarray(image, float) - np.asarray(truth, float)) ** 2)
    with np.errstate(divide="ignore"):
        return float(-10.0 * np.log10(error / peak**2))


def coverage(
    estimates: Estimates,
    truth: Float[np.ndarray, "*event"],
    where: Bool[np.ndarray, "*event"],
    tolerance: float = 0.0,
) -> float:
    """Share of pixels whose truth lies in its interval, ends included.

    Parameters
    ----------
    estimates
        From `estimate`.
    truth
        The true image.
    where
        Pixels that count.
    tolerance
        Added to both ends: half a grey level if the truth is quantised, since it is known no better than that.
    """
    truth = np.asarray(truth, float)
    inside = (estimates.lower - tolerance <= truth) & (truth <= estimates.upper + tolerance)
    return float(inside[where].mean())


def scalar_quantities(
    samples: Float[np.ndarray, "chains draws *event"],
    std: Float[np.ndarray, "*event"],
    where: Bool[np.ndarray, "*event"],
) -> xarray.Dataset:
    """A few scalars of an image on which chains are compared: the mean of some pixels, and the least certain of them.

    The uncertain pixels lie apart from each other: neighbours would say the same.

    Parameters
    ----------
    samples
        Equally weighted draws.
    std
        Deviation of each pixel, by which the pixels are chosen.
    where
        The unobserved pixels.

    Returns
    -------
    Dataset with the dimensions (chain, draw): ``mean of the unobserved`` and ``pixel (i, j)``, at most five.
    """
    variables = {"mean of the unobserved": samples[:, :, where].mean(axis=-1, dtype=float)}
    flat = samples.reshape(*samples.shape[:2], -1)
    left = np.where(where, np.nan_to_num(std, nan=0.0), -1.0)
    axes = np.indices(left.shape)[-2:]
    apart = max(left.shape[-2:]) / 6
    for _ in range(NUM_PIXELS):
        chosen = int(np.argmax(left))
        index = tuple(int(i) for i in np.unravel_index(chosen, left.shape))
        if left[index] < 0:
            break
        variables[f"pixel {index}"] = flat[:, :, chosen].astype(float)
        distance = np.hypot(axes[0] - index[-2], axes[1] - index[-1])
        left[distance < apart] = -1.0
    return xarray.Dataset({name: (("chain", "draw"), values) for name, values in variables.items()})


def summarise(
    result: SMCResult,
    problem: InverseProblem,
    truth: Float[Array, "*event"] | Float[np.ndarray, "*event"],
    samples: Float[np.ndarray, "chains draws *event"],
    *,
    level: float = 0.9,
    tolerance: float = 0.0,
    peak: float = 1.0,
) -> dict[str, Any]:
    """All figures of a report.

    Parameters
    ----------
    result
        Weighted particles; the samples themselves, as `smcdiff.posterior` returns them.
    problem
        The inverse problem.
    truth
        The true image.
    samples
        Equally weighted draws of each chain: ``posterior`` in what `smcdiff.to_arviz` returns.
    level
        Probability of the intervals.
    tolerance
        See `coverage`.
    peak
        Distance from black to white.

    Returns
    -------
    Dictionary of numbers, lists and further dictionaries. None stands for what cannot be computed.
    """
    truth, where = np.asarray(truth), unobserved(problem)
    estimates = estimate(result, level)
    std = np.sqrt(problem.noise.variance(problem.y.shape))
    misfit = problem.residual(jnp.asarray(estimates.mean, problem.y.dtype)) / std
    uncertain = where & (estimates.upper - estimates.lower > UNCERTAIN * peak)
    quantities = _diagnose(scalar_quantities(np.asarray(samples), estimates.std, where))
    everything = {
        "valid": result.is_valid,
        "log_evidence": _evidence(result),
        "ess": _ess(result),
        "quantities": quantities,
        "max_rhat": _extreme(max, quantities, "rhat"),
        "min_ess_bulk": _extreme(min, quantities, "ess_bulk"),
        "psnr": {
            "image": psnr(estimates.mean, truth, peak),
            "unobserved": psnr(estimates.mean[where], truth[where], peak),
        },
        "coverage": {
            "level": level,
            "fraction": coverage(estimates, truth, where, tolerance),
            "num_pixels": int(where.sum()),
            "fraction_uncertain": coverage(estimates, truth, uncertain, tolerance)
            if uncertain.any()
            else None,
            "num_uncertain": int(uncertain.sum()),
            "tolerance": tolerance,
        },
        "mean_std_unobserved": float(estimates.std[where].mean()),
        "residual_rms": float(np.sqrt(np.mean(np.asarray(misfit, float) ** 2))),
        "num_measurements": int(problem.y.size),
        "num_unobserved": int(where.sum()),
        "num_invalid_weights": int(result.info.num_invalid.sum()),
    }
    if not np.any(np.isfinite(result.log_evidence)):
        everything["coverage"]["fraction"] = None
    return _plain(everything)


def _evidence(result):
    values = np.asarray(result.log_evidence, float)
    several = len(values) > 1
    with np.errstate(invalid="ignore"):
        spread = float(values.std(ddof=1)) if several else None
        shares = np.exp(values - np.logaddexp.reduce(values))
        return {
            "pooled": result.pooled_log_evidence(),
            "mean": values.mean(),
            "sd": spread,
            "standard_error": spread / np.sqrt(len(values)) if spread is not None else None,
            "chains": values.tolist(),
            "effective_chains": 1.0 / np.sum(shares**2),
        }


def _ess(result):
    ess = np.asarray(result.ess, float)
    with np.errstate(invalid="ignore"):  # no chain has any weight left: NaN
        pooled = 1.0 / np.sum(np.exp(2.0 * result.pooled_log_weights()))
    chain, step = np.unravel_index(int(np.argmin(ess)), ess.shape)
    return {
        "minimum": ess.min(),
        "minimum_at_step": int(step) + 1,
        "minimum_in_chain": int(chain),
        "median": np.median(ess),
        "final": ess[:, -1].tolist(),
        "pooled": pooled,
        "num_particles": int(np.shape(result.log_weights)[1]),
        "num_resamplings": np.asarray(result.info.resampled).sum(axis=1).tolist(),
    }


def _diagnose(quantities):
    """Mean, deviation, R-hat and bulk ESS of each scalar; None where ArviZ needs more chains or draws."""
    enough = quantities.sizes["chain"] >= 2 and quantities.sizes["draw"] >= 4
    usable = {
        name: enough and bool(np.isfinite(values).all() and values.std() > 0)
        for name, values in quantities.items()
    }
    chosen = quantities[[name for name in quantities if usable[name]]]
    with np.errstate(divide="ignore", invalid="ignore"):  # every chain is constant: R-hat is infinite
        rhat, bulk = (arviz.rhat(chosen), arviz.ess(chosen, method="bulk")) if len(chosen) else ({}, {})
    return {
        name: {
            "mean": float(values.mean()),
            "sd": float(values.std(ddof=1)) if values.size > 1 else None,
            "rhat": float(rhat[name]) if usable[name] else None,
            "ess_bulk": float(bulk[name]) if usable[name] else None,
        }
        for name, values in quantities.items()
    }


def _extreme(choose, quantities, name):
    values = [entry[name] for entry in quantities.values() if entry[name] is not None]
    return choose(values) if values else None


def _plain(value):
    """The same with Python's own numbers, and None for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, bool | str | int | None):
        return value
    value = (
        float(value) if np.ndim(value) == 0 and not isinstance(value, np.integer | np.bool_) else value.item()
    )
    return value if not isinstance(value, float) or np.isfinite(value) else None
