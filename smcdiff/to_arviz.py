"""Results as ArviZ data: an `xarray.DataTree` with ArviZ 1, an `InferenceData` before.

| group | what is in it |
| --- | --- |
| posterior | equally weighted draws, chain x draw x event |
| sample_stats | what the kernel says of each draw, by ArviZ's names; for SMC, which particle it is, of what weight |
| warmup_posterior, warmup_sample_stats | the same of the warm-up |
| log_likelihood, posterior_predictive | by draw |
| prior, prior_predictive | draws of the prior |
| observed_data, constant_data | the measurement, and what is known |
| smc | the weighted history of SMC by step |

**Weights.** ArviZ knows none, so weighted particles are resampled, and the average of exported draws is the weighted
one, up to the noise of systematic resampling. By default every SMC run is resampled by itself and is a chain, so that
R-hat compares runs: the draws of a chain have the mean of that run. Runs count by their evidence, as ``evidence_share``
in the group ``smc`` says, and a plain average over chains, as in a summary, ignores that: a warning says so where few
runs hold most of the evidence. ``pool=True`` resamples all runs together into one chain, whose mean is that of
`SMCResult.mean`, and whose R-hat says nothing about the runs.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import xarray
from jaxtyping import PRNGKeyArray, PyTree

from smcdiff.arviz_io.datasets import (
    container,
    dataset,
    evaluate,
    groups_of,
    named_arrays,
    split_sample,
    structure,
)
from smcdiff.arviz_io.smc_group import write_smc
from smcdiff.arviz_io.statistics import chain_statistics
from smcdiff.inverse import InverseProblem
from smcdiff.run import Trace
from smcdiff.smc import SMCResult

__all__ = ["to_arviz"]

# `numpyro.infer.MCMC` is spelled out below, and not imported: ArviZ 1 leaves a lazy numpyro in sys.modules, whose
# submodules that would load twice, so that `numpyro.infer.initialization`, which ArviZ looks for, is lost.


def to_arviz(
    result: SMCResult | Trace | numpyro.infer.MCMC,
    *,
    rng_key: PRNGKeyArray | None = None,
    name: str = "x",
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    pool: bool | None = None,
    keep_particles: bool = False,
    warmup: Trace | int | None = None,
    sample_stats: Mapping[str, Any] | None = None,
    superchains: Sequence[int] | None = None,
    log_likelihood: Callable | PyTree | bool | None = None,
    posterior_predictive: Callable | PyTree | None = None,
    prior: PyTree = None,
    prior_predictive: PyTree = None,
    problem: InverseProblem | None = None,
    observed_data: Mapping[str, Any] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
):
    """Convert a result to ArviZ's container.

    Parameters
    ----------
    result
        An `SMCResult`, the `Trace` of a Markov chain or of `smcdiff.infer` whose samples have the axes (chain, draw,
        *event), or a NumPyro ``MCMC`` that has run. Of a kernel's state or a sampler's particle the sample is the
        posterior, and its other scalars are ``sample_stats``; of a particle Gibbs trajectory, the last particle.
    rng_key
        Key of the resampling of weighted particles, and of ``posterior_predictive``; the fixed key 0 if omitted.
    name
        Name of the variable where the samples are a bare array; pytrees name theirs by path.
    dims
        Names of the event axes of a variable, as in ``{"x": ["row", "col"]}``.
    coords
        Coordinate values of dimensions.
    pool
        For SMC: whether to resample all runs together, by their evidence, into one chain, so that plain averages are
        right, instead of each as a chain of its own, so that R-hat compares them. None is False with a warning where
        the runs, weighed by their evidence, are worth less than half their number.
    keep_particles
        For SMC: whether to keep the weighted particles too, in the group ``smc``, from which `smcdiff.from_arviz`
        makes the result again.
    warmup
        For chains: the `Trace` of the warm-up, or how many draws at the beginning of ``result`` were warm-up.
    sample_stats
        More statistics of the draws, or other ones than those found: arrays (chain, draw), or functions of one draw,
        such as ``{"lp": logdensity}``.
    superchains
        To which superchain each chain belongs, for the nested R-hat of many short chains; it becomes the coordinate
        ``superchain`` of the dimension chain.
    log_likelihood
        Log likelihood of each observation apart, for PSIS-LOO: a function of one draw that returns an array, or a
        dictionary of them, or such arrays with the leading axes (chain, draw). True takes that of ``problem``.
    posterior_predictive
        The same of predictions; the function is called as ``function(rng_key, draw)``.
    prior, prior_predictive
        Draws from the prior, and of the data that they predict, with the axes (draw, *event).
    problem
        The inverse problem: its measurement and noise become ``observed_data`` and ``constant_data``.
    observed_data, constant_data
        Further arrays to keep, for instance the true image.
    attrs
        Attributes of the whole, for instance the seed and the versions.

    Returns
    -------
    `xarray.DataTree` with ArviZ 1 or newer, `arviz.InferenceData` with older ones. Arrays that come without a name are
    called ``y`` in ``log_likelihood`` and the predictive groups.

    Raises
    ------
    TypeError
        If ``result`` is none of these, or an option is given that it has no use for.
    ValueError
        If shapes do not fit, or runs are to be pooled of which none has any weight left.
    """
    rng_key = jax.random.key(0) if rng_key is None else rng_key
    dims, coords = dict(dims or {}), dict(coords or {})
    _check_options(result, pool, keep_particles, warmup, superchains)
    sample: PyTree
    if isinstance(result, SMCResult):
        sample, statistics = _resampled(result, rng_key, pool)
        groups = {"smc": write_smc(result, keep_particles)}
        if pool is None:
            _warn_of_uneven_runs(groups["smc"]["evidence_share"].values)
    elif isinstance(result, Trace):
        if isinstance(warmup, int | np.integer):
            warmup, result = _split_off(result, int(warmup))
        sample, statistics = _chain(result)
        groups = {}
        if warmup is not None:
            early, early_statistics = _chain(warmup)
            groups["warmup_posterior"] = _sampled(early, name, dims, coords)
            groups["warmup_sample_stats"] = dataset(early_statistics, ("chain", "draw"), {}, {})
    else:
        groups = groups_of(arviz.from_numpyro(result, dims=dims or None, coords=coords or None))
        sample, statistics = result.get_samples(group_by_chain=True), {}
    if not isinstance(result, numpyro.infer.MCMC):
        groups["posterior"] = _sampled(sample, name, dims, coords)
    for key, value in (sample_stats or {}).items():
        statistics[key] = evaluate(value, sample) if callable(value) else np.asarray(value)
    if statistics:
        made = dataset(statistics, ("chain", "draw"), dims, coords)
        groups["sample_stats"] = (
            made.combine_first(groups["sample_stats"]) if "sample_stats" in groups else made
        )
    if superchains is not None:
        ids = ("chain", _superchains(superchains, groups["posterior"].sizes["chain"]))
        for key in ("posterior", "sample_stats"):
            groups[key] = groups[key].assign_coords(superchain=ids)

    if log_likelihood is True:
        log_likelihood = _pointwise(problem)
    if callable(log_likelihood):
        log_likelihood = evaluate(log_likelihood, sample)
    if callable(posterior_predictive):
        shape = groups["posterior"].sizes["chain"], groups["posterior"].sizes["draw"]
        keys = jax.random.split(jax.random.fold_in(rng_key, 1), shape)
        predict = posterior_predictive
        posterior_predictive = evaluate(lambda draw, key: predict(key, draw), sample, keys)
    for key, value in (("log_likelihood", log_likelihood), ("posterior_predictive", posterior_predictive)):
        if value is not None and value is not False:
            groups[key] = dataset(named_arrays(value, "y"), ("chain", "draw"), dims, coords)
    for key, value, default in (("prior", prior, name), ("prior_predictive", prior_predictive, "y")):
        if value is not None:
            one_chain = {k: array[None] for k, array in named_arrays(value, default).items()}
            groups[key] = dataset(one_chain, ("chain", "draw"), dims, coords)
    observed = {key: np.asarray(value) for key, value in (observed_data or {}).items()}
    constants = {key: np.asarray(value) for key, value in (constant_data or {}).items()}
    if problem is not None:
        observed.setdefault("y", np.asarray(problem.y))
        constants.setdefault("noise_std", np.sqrt(np.asarray(problem.noise.variance(problem.y.shape))))
    for key, arrays in (("observed_data", observed), ("constant_data", constants)):
        if arrays:
            groups[key] = dataset(arrays, (), dims, coords)
    return container(groups, dict(attrs or {}))


def _check_options(result, pool, keep_particles, warmup, superchains):
    if not isinstance(result, SMCResult | Trace | numpyro.infer.MCMC):
        raise TypeError(
            f"to_arviz takes an SMCResult or a Trace, or NumPyro's MCMC, got {type(result).__name__}."
        )
    if not isinstance(result, SMCResult) and (pool is not None or keep_particles):
        raise TypeError(f"pool and keep_particles are about an SMCResult, got a {type(result).__name__}.")
    if not isinstance(result, Trace) and warmup is not None:
        raise TypeError(f"warmup is about the Trace of a Markov chain, got a {type(result).__name__}.")
    if isinstance(result, SMCResult) and superchains is not None:
        raise TypeError("superchains are about Markov chains, and an SMCResult has none.")


def _warn_of_uneven_runs(shares):
    """Say so where a plain average over the chains is far from the weighted one."""
    worth = 1.0 / np.sum(shares**2)
    if worth < 0.5 * len(shares):
        warnings.warn(
            f"{len(shares)} runs of SMC become chains that a summary averages evenly, but their evidences differ so "
            f"much that they are worth {worth:.1f} runs (group smc, evidence_share). Give pool=True for one chain with "
            "the right averages, or pool=False where the chains are only compared; more particles even the runs out.",
            UserWarning,
            stacklevel=3,
        )


def _resampled(result, rng_key, pool):
    """Equally weighted draws, and which particles they are."""
    sample, statistics = split_sample(result.particles)
    log_weights = np.asarray(result.log_weights)
    if pool:
        run, particle = (indices[None] for indices in result.resample_pooled_indices(rng_key))
        chosen = {"run": run, "particle": particle}
    else:
        particle = result.resample_indices(rng_key)
        run, chosen = np.arange(len(particle))[:, None], {"particle": particle}
    sample, statistics = jax.tree.map(lambda leaf: np.asarray(leaf)[run, particle], (sample, statistics))
    return sample, {**statistics, **chosen, "log_weight": log_weights[run, particle]}


def _chain(trace):
    """The samples of a chain, and their statistics."""
    sample, statistics = split_sample(trace.samples)
    return sample, chain_statistics(trace.info) | chain_statistics(statistics)


def _split_off(trace, count):
    """The first ``count`` draws, and the others."""
    draws = np.shape(jax.tree.leaves(trace.samples)[0])[1]
    if not 0 < count < draws:
        raise ValueError(f"warmup must leave some of the {draws} draws, and be positive, got {count}.")
    parts = slice(None, count), slice(count, None)
    return [
        trace._replace(
            samples=jax.tree.map(lambda leaf: leaf[:, part], trace.samples),  # noqa: B023
            info=jax.tree.map(lambda leaf: leaf[:, part], trace.info),  # noqa: B023
        )
        for part in parts
    ]


def _superchains(ids, num_chains):
    ids = np.asarray(ids)
    if ids.shape != (num_chains,):
        raise ValueError(
            f"superchains must be one number a chain, {num_chains} of them, got the shape {ids.shape}."
        )
    return ids


def _pointwise(problem):
    """Log likelihood of each entry of the measurement, as a function of the sample."""
    if problem is None:
        raise ValueError(
            "log_likelihood=True takes the likelihood of the problem: give problem, or a function."
        )
    variance = problem.noise.variance(problem.y.shape)
    return lambda x: -0.5 * (problem.residual(x) ** 2 / variance + jnp.log(2.0 * np.pi * variance))


def _sampled(tree, name, dims, coords) -> xarray.Dataset:
    """Dataset of a pytree whose leaves have the axes (chain, draw, *event)."""
    from smcdiff import __version__

    made = dataset(named_arrays(tree, name), ("chain", "draw"), dims, coords)
    return made.assign_attrs(
        inference_library="smcdiff",
        inference_library_version=__version__,
        sample_structure=structure(tree),
    )
