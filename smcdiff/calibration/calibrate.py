"""The experiment: truths from the prior, data from the simulator, draws from the sampler under test.

For data set j = 0, 1, ..., with the key k_j = fold_in(rng_key, j),

    truth_j ~ prior,   data_j ~ simulate(truth_j),   x_1, ..., x_L ~ sampler(data_j),

and of every scalar function f the place of f(truth_j, data_j) among f(x_i, data_j) is kept, see
`smcdiff.calibration.pit`. Over data sets these are independent and uniform if the sampler's posterior is right,
whatever the model. Wrong posteriors may pass for some functions: the prior itself passes for all functions of the
parameter alone. Add functions that depend on the data, the log likelihood first of all.

Draws of a Markov chain are thinned until they are nearly independent, since the rank among dependent draws is not
uniform: every ceil(2 N / ESS)-th is kept, where a chain with correlation r per step has a correlation of about e^-4
left.

Sources: Talts et al., "Validating Bayesian inference algorithms with simulation-based calibration", arXiv 1804.06788;
Modrak et al., "Simulation-based calibration checking for Bayesian computation: the choice of test quantities shapes
sensitivity", arXiv 2211.02383.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import arviz
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray, PyTree
from tqdm.auto import tqdm

from smcdiff.calibration.columns import as_columns, column_names, column_shapes, evaluate
from smcdiff.calibration.distance import euclidean_distance
from smcdiff.calibration.draws import Draws, as_draws, normalised_weights
from smcdiff.calibration.pit import pit
from smcdiff.checkpoints.progress import RunFolder, fingerprint
from smcdiff.checks import check_count

__all__ = ["Calibration", "calibrate"]

REFERENCE = "distance to the reference"
_LOOKED_AT = 8  # columns whose effective sample size decides on the thinning
_INDEPENDENT = 0.75  # an effective share from which draws count as independent


class Calibration(NamedTuple):
    """Where truths lie among posterior draws, for J data sets and F scalar functions.

    Attributes
    ----------
    names
        Names of the functions, F of them, such as ``x[3, 4]``.
    shapes
        Shape of what each function returned, by name, in the order of the columns.
    pit
        Randomised probability integral transforms, shape (J, F): independent rows, each entry uniform on [0, 1].
    ranks
        Ranks of the truths, shape (J, F), from 0 to ``num_draws``; of weighted draws, what the transform says of
        ``num_draws`` draws.
    num_draws
        Draws of each data set after thinning, shape (J,); of weighted draws their effective number.
    truths
        Functions of the truths, shape (J, F).
    means, stds
        Posterior means and standard deviations of the functions, shape (J, F).
    """

    names: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    pit: Float[np.ndarray, "J F"]
    ranks: Int[np.ndarray, "J F"]
    num_draws: Int[np.ndarray, " J"]
    truths: Float[np.ndarray, "J F"]
    means: Float[np.ndarray, "J F"]
    stds: Float[np.ndarray, "J F"]

    def columns(self, name: str) -> slice:
        """Columns of the function ``name``, which may be an array of them.

        Raises
        ------
        ValueError
            If there is no such function.
        """
        first = 0
        for known, shape in self.shapes.items():
            if known == name:
                return slice(first, first + math.prod(shape))
            first += math.prod(shape)
        raise ValueError(f"name must be one of {list(self.shapes)}, got {name!r}.")


def calibrate(
    rng_key: PRNGKeyArray,
    prior: Callable[[PRNGKeyArray], PyTree],
    simulate: Callable[[PRNGKeyArray, PyTree], Any],
    sampler: Callable[[PRNGKeyArray, Any], Any],
    *,
    num_data_sets: int,
    functions: Callable[[PyTree, Any], PyTree] | None = None,
    references: Callable[[PRNGKeyArray, Any], PyTree] | None = None,
    thin: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Calibration:
    """Simulation-based calibration of a posterior sampler.

    Parameters
    ----------
    rng_key
        Key. Data set j uses fold_in(rng_key, j).
    prior
        ``prior(rng_key)``: one truth, any pytree.
    simulate
        ``simulate(rng_key, truth)``: data, for instance an `smcdiff.InverseProblem`.
    sampler
        ``sampler(rng_key, data)``: posterior draws, a pytree like the truth with a leading axis; a tuple of such draws
        and log weights; a `smcdiff.Trace`; or a `smcdiff.SMCResult`.
    num_data_sets
        Number of data sets J.
    functions
        ``functions(sample, data)`` returns a pytree of arrays, each entry of which is a test quantity; the entries of
        the sample if omitted. It must run under `jax.vmap`.
    references
        ``references(rng_key, data)``: a point for the coverage test of `tarp`, of the form of a truth. Adds the
        function "distance to the reference".
    thin
        Keep every ``thin``-th draw of unweighted draws; from the effective sample size of each data set's draws
        if omitted. 1 for independent draws.
    checkpoint
        Folder in which every finished data set is saved, and from which an interrupted run goes on, with the same
        numbers to the last bit. A finished run goes on to more data sets. What functions close over is not compared:
        name another folder for another experiment.
    progress
        Whether to show a bar. It changes no number.

    Returns
    -------
    Calibration

    Raises
    ------
    ValueError
        If a count is not a positive integer, what the sampler returns has the wrong form, a function is NaN at a
        truth or at a draw that counts, or ``checkpoint`` holds another run.

    Source: arXiv 1804.06788, arXiv 2211.02383.
    """
    check_count("num_data_sets", num_data_sets)
    if thin is not None:
        check_count("thin", thin)
    functions = _entries if functions is None else functions
    truth, data = _simulated(_keys(rng_key, 0), prior, simulate)
    shapes = column_shapes(eqx.filter_eval_shape(functions, truth, data))
    if references is not None:
        shapes |= {REFERENCE: ()}
    names = column_names(shapes)

    records: list[dict[str, Any]] = []
    if checkpoint is not None:
        identity = fingerprint(prior, simulate, sampler, functions, references, rng_key, thin, names)
        folder = RunFolder(checkpoint, identity)
        num_saved = len(list(folder.path.glob("chunk-*.safetensors")))
        found = folder.load(_STATE, [_record_like(len(names))] * num_saved)
        records = [jax.tree.map(np.asarray, record) for record in found[1]][:num_data_sets] if found else []
    with tqdm(total=num_data_sets, initial=len(records), disable=not progress, leave=False) as bar:
        for index in range(len(records), num_data_sets):
            record = _one_data_set(
                rng_key, index, prior, simulate, sampler, functions, references, thin, names
            )
            if checkpoint is not None:
                folder.save(index, _STATE, record)
            records.append(record)
            bar.update()
    return Calibration(
        names, shapes, *(np.stack([record[name] for record in records]) for name in Calibration._fields[2:])
    )


_STATE = {"none": np.zeros((), np.int32)}  # a run's state is the number of data sets, which its folder counts


def _entries(sample, data):
    return sample


def _record_like(num_columns):
    rows = {name: jax.ShapeDtypeStruct((num_columns,), np.float32) for name in Calibration._fields[2:]}
    rows["ranks"] = jax.ShapeDtypeStruct((num_columns,), np.int32)
    return rows | {"num_draws": jax.ShapeDtypeStruct((), np.int32)}


class _Keys(NamedTuple):
    """The keys of one data set: fold_in(fold_in(rng_key, j), i), i = 0, 1, ..., in this order."""

    prior: PRNGKeyArray
    simulate: PRNGKeyArray
    sampler: PRNGKeyArray
    ties: PRNGKeyArray
    reference: PRNGKeyArray


@jax.jit
def _keys(rng_key, index):
    of_data_set = jax.random.fold_in(rng_key, index)
    return _Keys(*(jax.random.fold_in(of_data_set, purpose) for purpose in range(len(_Keys._fields))))


def _simulated(keys, prior, simulate):
    truth = prior(keys.prior)
    return truth, simulate(keys.simulate, truth)


def _one_data_set(rng_key, index, prior, simulate, sampler, functions, references, thin, names):
    """What is kept of one data set, in single precision as a checkpoint holds it."""
    keys = _keys(rng_key, index)
    truth, data = _simulated(keys, prior, simulate)
    draws = as_draws(sampler(keys.sampler, data))
    size = len(jax.tree.leaves(draws.values)[0])
    values = as_columns(evaluate(functions, draws.values, data), size)
    at_truth = as_columns(
        evaluate(functions, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], truth), data), 1
    )
    if references is not None:
        reference = references(keys.reference, data)
        both = zip((truth, draws.values), (at_truth, values), strict=True)
        at_truth, values = (
            np.column_stack([columns, euclidean_distance(x, reference, len(columns))]) for x, columns in both
        )
    values, weights, log_weights = _thinned(values, draws, thin)
    _check_finite(names, index, at_truth[0], values if weights is None else values[weights > 0])
    uniform = np.asarray(jax.random.uniform(keys.ties, (len(names),), jnp.float32), float)
    place = pit(at_truth[0], values.T, uniform, None if log_weights is None else log_weights[None])
    if weights is None:
        num_draws, mean = len(values), values.mean(axis=0)
        std = values.std(axis=0)
    else:
        num_draws = int(1.0 / np.sum(weights**2) + 1e-9)
        alive = np.where((weights > 0)[:, None], values, 0.0)
        mean = weights @ alive
        std = np.sqrt(weights @ np.where((weights > 0)[:, None], alive - mean[None], 0.0) ** 2)
    return {
        "pit": place.astype(np.float32),
        "ranks": np.minimum(np.floor(place * (num_draws + 1)), num_draws).astype(np.int32),
        "num_draws": np.asarray(num_draws, np.int32),
        "truths": at_truth[0].astype(np.float32),
        "means": mean.astype(np.float32),
        "stds": std.astype(np.float32),
    }


def _thinned(values, draws: Draws, thin):
    """Nearly independent rows, and the weights of weighted ones, which are left as they are."""
    if draws.log_weights is not None:
        return values, normalised_weights(draws.log_weights), draws.log_weights
    chains = values.reshape(draws.num_chains, -1, values.shape[1])
    if thin is None:
        thin = _thinning(chains)
    return chains[:, ::thin].reshape(-1, values.shape[1]), None, None


def _thinning(chains) -> int:
    """Steps between draws that are nearly independent, for chains of shape (chains, draws, F)."""
    num_chains, num_steps, num_columns = chains.shape
    if num_steps < 4:  # too few for an estimate
        return 1
    chosen = np.unique(np.linspace(0, num_columns - 1, min(num_columns, _LOOKED_AT)).round().astype(int))
    moving = [i for i in chosen if np.all(np.isfinite(chains[..., i])) and np.ptp(chains[..., i]) > 0]
    share = min((float(arviz.ess(chains[..., i])) for i in moving), default=math.inf) / (
        num_chains * num_steps
    )
    return 1 if not share < _INDEPENDENT else min(num_steps, math.ceil(2.0 / share))


def _check_finite(names, index, truth, values):
    """Infinite values have a rank, NaN has none."""
    for what, bad in (("truth", np.isnan(truth)), ("draws", np.isnan(values).any(axis=0))):
        if bad.any():
            raise ValueError(
                f"data set {index}: the function {names[int(np.argmax(bad))]!r} is NaN at the {what}. A sampler that "
                "fails is not calibrated: find out why it fails, its key is fold_in(fold_in(rng_key, j), 2)."
            )
