"""Resampling: from weights to ancestor indices.

A resampling function is ``f(rng_key, weights, num_samples) -> indices`` with normalised weights of shape (N,) and
indices of shape (num_samples,), as in BlackJAX, whose functions fit too. Ours never draw a particle of weight
zero, however the weights round, and have no outcome of small probability in which all indices are one.

`systematic` and `ssp` give particle i either the floor or the ceiling of m_i = num_samples * weights[i] offspring.
Both see the fractions f_i of the m_i only through the running sum of them, of which they ask where it passes an
integer. A float32 sum of a million terms cannot tell; so fractions are unsigned integers in units of 2^-32, whose
running sum is exact and wraps where it passes an integer: it has passed one at i if it is less than f_i. The numbers of
offspring are then written out as indices by one scatter and one running sum, without a search and without branches.

Sources: Kitagawa, "Monte Carlo Filter and Smoother", J. Comput. Graph. Stat. 5 (1996); Douc, Cappé and Moulines,
"Comparison of Resampling Schemes for Particle Filtering", arXiv cs/0507025; Gerber, Chopin and Whiteley, "Negative
association, ordering and convergence of resampling methods", arXiv 1707.01845.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

__all__ = [
    "ResamplingFn",
    "killing",
    "multinomial",
    "owners",
    "resample_from_log_weights",
    "residual",
    "ssp",
    "stratified",
    "systematic",
]

ResamplingFn = Callable[[PRNGKeyArray, Float[Array, " N"], int], Int[Array, " num_samples"]]


def systematic(
    rng_key: PRNGKeyArray, weights: Float[Array, " N"], num_samples: int
) -> Int[Array, " num_samples"]:
    """Systematic resampling: particle i gets floor or ceil of ``num_samples * weights[i]`` offspring.

    Parameters
    ----------
    rng_key
        Key of the single uniform that is drawn.
    weights
        Normalised weights, shape (N,).
    num_samples
        Number of indices.

    Returns
    -------
    Sorted ancestor indices, shape (num_samples,).

    Source: Kitagawa, "Monte Carlo Filter and Smoother", J. Comput. Graph. Stat. 5 (1996).
    """
    whole, part, level = _expected_offspring(weights, num_samples)
    # Their sum is off by up to 1e-4 or so; a point in there would have no owner, or be one too many.
    excess = level[-1].astype(jnp.int32)
    first, beyond = jnp.maximum(-excess, 0).astype(jnp.uint32), jnp.maximum(excess, 0).astype(jnp.uint32)
    point = jnp.clip(jax.random.bits(rng_key, (), jnp.uint32), first, ~beyond)  # ~x is 2^32 - 1 - x
    return _indices(whole + (level + point < part).astype(jnp.int32), num_samples)


def ssp(rng_key: PRNGKeyArray, weights: Float[Array, " N"], num_samples: int) -> Int[Array, " num_samples"]:
    """Srinivasan sampling process: floor or ceil of ``num_samples * weights[i]`` as well, negatively associated.

    The choice where weighted averages must be proved to converge: systematic resampling, whose numbers of offspring
    can be positively correlated, has no such proof, and orders of the particles for which it fails.

    One particle at a time is open, its fraction undecided. It meets the next one: if their fractions a and b sum to
    less than one, one of them takes both and stays open, the newcomer with probability b/(a + b), and the other gets
    no further offspring; otherwise one gets an offspring, the newcomer with probability (1 - a)/(2 - a - b), and the
    other keeps a + b - 1. So the open fraction is the running sum of all fractions, and who holds it is the last
    newcomer that took over: no step has to wait for the one before.

    Parameters as in `systematic`; sorted indices.

    Source: Gerber, Chopin and Whiteley, "Negative association, ordering and convergence of resampling methods",
    arXiv 1707.01845, whose algorithm is sequential.
    """
    whole, part, after = _expected_offspring(weights, num_samples)
    index = jnp.arange(weights.shape[0], dtype=jnp.int32)
    # Their sum is off by up to 1e-4 or so, which is the heaviest one's.
    heaviest = jnp.max(jnp.where(weights == jnp.max(weights), index, 0))
    rest = jnp.where(index == heaviest, -after[-1], 0)  # -x is 2^32 - x
    whole, part = _add((whole, part), (rest.astype(jnp.int32) >> 31, rest))
    after -= jnp.where(index >= heaviest, after[-1], 0)
    before, passed = after - part, after < part
    new = jnp.where(passed, -part, part).astype(weights.dtype)
    old = jnp.where(passed, -before, before).astype(weights.dtype)
    takes_over = jax.random.uniform(rng_key, weights.shape, weights.dtype) * (new + old) < new
    holder = _running(jnp.maximum, jnp.where(takes_over, index, 0))
    chosen = jnp.where(takes_over, jnp.roll(holder, 1), index)
    nobody = weights.shape[0]
    counts = whole.at[jnp.where(passed, chosen, nobody)].add(1, mode="drop")
    return _indices(counts, num_samples)


def stratified(
    rng_key: PRNGKeyArray, weights: Float[Array, " N"], num_samples: int
) -> Int[Array, " num_samples"]:
    """Stratified resampling: one uniform point in each of ``num_samples`` equal intervals; sorted indices.

    Parameters as in `systematic`. Source: Kitagawa (1996).
    """
    uniforms = jax.random.uniform(rng_key, (num_samples,), weights.dtype)
    return owners(weights, (jnp.arange(num_samples, dtype=weights.dtype) + uniforms) / num_samples)


def multinomial(
    rng_key: PRNGKeyArray, weights: Float[Array, " N"], num_samples: int
) -> Int[Array, " num_samples"]:
    """Multinomial resampling: independent draws, in sorted order. The noisiest choice.

    Parameters as in `systematic`. Source: Douc et al., "Comparison of Resampling Schemes", arXiv cs/0507025.
    """
    # Order statistics of uniforms from their spacings; `exponential` is finite, unlike -log of a uniform in [0, 1).
    total = jnp.cumsum(jax.random.exponential(rng_key, (num_samples + 1,), weights.dtype))
    return owners(weights, total[:-1] / total[-1])


def residual(
    rng_key: PRNGKeyArray, weights: Float[Array, " N"], num_samples: int
) -> Int[Array, " num_samples"]:
    """Residual resampling: floor(num_samples * weights[i]) copies of particle i, the rest by independent draws.

    Parameters as in `systematic`. Source: Douc et al., "Comparison of Resampling Schemes", arXiv cs/0507025.
    """
    expected = weights * num_samples
    copies = jnp.floor(expected).astype(jnp.int32)
    kept = jnp.repeat(jnp.arange(weights.shape[0], dtype=jnp.int32), copies, total_repeat_length=num_samples)
    drawn = owners(expected - jnp.floor(expected), jax.random.uniform(rng_key, (num_samples,), weights.dtype))
    return jnp.where(jnp.arange(num_samples) < jnp.sum(copies), kept, drawn)


def killing(
    rng_key: PRNGKeyArray, weights: Float[Array, " N"], num_samples: int
) -> Int[Array, " num_samples"]:
    """Killing: particle i stays in its place with probability w_i / max w, or else is replaced by a draw by weight.

    Nearly even weights move nearly no particle. Indices are not sorted: whoever survives keeps its index.

    Parameters as in `systematic`, but ``num_samples`` must be N.

    Raises
    ------
    ValueError
        If ``num_samples`` is not the number of weights.

    Source: Del Moral, "Feynman-Kac Formulae", Springer (2004).
    """
    if num_samples != weights.shape[0]:
        raise ValueError(
            f"killing keeps the number of particles: num_samples must be {weights.shape[0]}, got {num_samples}. "
            "Use another scheme, for instance systematic, to change it."
        )
    key_kill, key_draw = jax.random.split(rng_key)
    survives = jax.random.uniform(key_kill, weights.shape, weights.dtype) * jnp.max(weights) < weights
    drawn = owners(weights, jax.random.uniform(key_draw, weights.shape, weights.dtype))
    return jnp.where(survives, jnp.arange(num_samples, dtype=jnp.int32), drawn.astype(jnp.int32))


def resample_from_log_weights(
    resampling_fn: ResamplingFn, rng_key: PRNGKeyArray, log_weights: Float[Array, " N"], num_samples: int
) -> Int[Array, " num_samples"]:
    """Ancestor indices from log weights that need not be normalised.

    Parameters
    ----------
    resampling_fn
        A resampling function of normalised weights.
    rng_key
        Key.
    log_weights
        Shape (N,), up to an additive constant; minus infinity is allowed, but not for all.
    num_samples
        Number of indices.
    """
    return resampling_fn(rng_key, jax.nn.softmax(log_weights), num_samples)


def owners(weights: Float[Array, " N"], points: Float[Array, " M"]) -> Int[Array, " M"]:
    """Index of the particle whose share of [0, 1), proportional to its weight, holds each of ``points``."""
    cumulative = jnp.cumsum(weights)
    found = jnp.searchsorted(cumulative, points * cumulative[-1], side="right")
    # A point may round to 1, and lies beyond all weights then.
    index = jnp.arange(weights.shape[0], dtype=jnp.int32)
    return jnp.minimum(found, jnp.max(jnp.where(weights > 0, index, 0)))


def _indices(counts, num_samples):
    """Index i repeated ``counts[i]`` times, for counts that sum to ``num_samples``."""
    ends = _running(jnp.add, counts)
    return _running(jnp.add, jnp.zeros(num_samples, jnp.int32).at[ends].add(1, mode="drop"))


def _expected_offspring(weights, num_samples):
    """``num_samples * weights / sum(weights)``: int32 whole parts, uint32 parts in units of 2^-32, their running sum.

    They sum to ``num_samples`` up to 1e-4 or so for a million of both, though the weights, being rounded, may sum to
    something else than one.
    """
    index = jnp.arange(weights.shape[0], dtype=jnp.uint32)
    # First a thousandth too few, so that what is missing is positive; it is known exactly and shared out by weight.
    expected = weights * (num_samples * 0.999)
    first = _fixed_point(expected)
    total = _total(*first)
    missing = (num_samples - total[0]).astype(weights.dtype) - total[1].astype(weights.dtype) * 2.0**-32
    # A Weyl sequence decides which fractions of a unit are rounded up, for all or none would add up to a lot.
    dither = ((index * jnp.uint32(2654435769)) >> 8).astype(weights.dtype) * 2.0**-24
    share = _fixed_point(expected * (jnp.maximum(missing, 0) / (num_samples - missing)), dither)
    whole, part = _add(first, share)
    return whole, part, _running(jnp.add, part)


def _fixed_point(values, dither=0.0):
    """Non-negative values as whole parts and parts in units of 2^-32, rounded down after adding ``dither`` units."""
    whole = jnp.floor(values)
    largest = 2.0**32 * (1 - float(jnp.finfo(values.dtype).epsneg))  # what this precision has below 2^32
    part = jnp.minimum((values - whole) * 2.0**32 + dither, largest)
    return whole.astype(jnp.int32), part.astype(jnp.uint32)


def _add(a, b):
    part = a[1] + b[1]
    return a[0] + b[0] + (part < b[1]).astype(jnp.int32), part


def _total(whole, part):
    """Exact sum of fixed-point numbers."""
    count = jnp.sum(whole, dtype=jnp.int32)
    while part.shape[0] > 1:
        rows = jnp.pad(part, (0, -part.shape[0] % 64)).reshape(64, -1)
        # Sixteen bits at a time, so that no sum overflows.
        low = jnp.sum(rows & 0xFFFF, axis=0, dtype=jnp.uint32)
        high = jnp.sum(rows >> 16, axis=0, dtype=jnp.uint32) + (low >> 16)
        count = count + jnp.sum(high >> 16, dtype=jnp.uint32).astype(jnp.int32)
        part = (high << 16) | (low & 0xFFFF)
    return count, part[0]


def _running(op, values):
    """Running sum or maximum of non-negative values.

    In blocks side by side, whose steps are operations on vectors: for a million values, a third of the time of
    `jnp.cumsum`. Longer blocks cost more in transposing than they save.
    """
    length, block = values.shape[0], 8
    columns = jnp.pad(values, (0, -length % block)).reshape(-1, block).T
    totals = jax.lax.reduce(columns, jnp.zeros((), values.dtype), op, (0,))
    ends = jax.lax.associative_scan(op, totals) if len(totals) <= 1024 else _running(op, totals)

    def step(carry, row):
        carry = op(carry, row)
        return carry, carry

    return jax.lax.scan(step, jnp.pad(ends[:-1], (1, 0)), columns)[1].T.reshape(-1)[:length]
