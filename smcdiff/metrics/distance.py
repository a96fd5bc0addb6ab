"""What all distances share: the record they return, weights, and the reference split for the floor.

A distance compares the law of a cloud x_1..x_n with weights w_i (sum 1) with a reference law, known by independent
samples y_1..y_m or by its density. Between two finite clouds of ONE law most distances are not zero. That level, which
no sampler can beat at this size, is the floor, and a value is read beside it. The n samples of the floor are
exact and unweighted, so that what uneven weights cost is part of the value and not of the floor.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = [
    "Distance",
    "HypothesisTest",
    "as_clouds",
    "as_points",
    "dot",
    "normalised_weights",
    "reference_split",
    "without_dead",
]


class Distance(NamedTuple):
    """A distance, how precisely it is known, and what exact samples would give. All are scalars in one unit.

    Attributes
    ----------
    value
        The distance.
    standard_error
        Of ``value``; which randomness it covers is said by each distance. Samples are taken as independent: for
        chains, pass a thinned one.
    floor
        The same statistic between exact samples of the same sizes; where its mean is zero, its root mean square.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]
    floor: Float[Array, ""]


class HypothesisTest(NamedTuple):
    """A test of the hypothesis that the samples have the law of the reference.

    Attributes
    ----------
    statistic
        What was compared with its law under the hypothesis.
    p_value
        Probability, under the hypothesis, of a statistic at least as large.
    """

    statistic: Float[Array, ""]
    p_value: Float[Array, ""]


def as_points(name: str, x) -> Float[Array, "n d"]:
    """Samples (n, *event) as an array (n, d) of floats, at least two of them."""
    x = jnp.asarray(x)
    if x.ndim < 1 or len(x) < 2:
        raise ValueError(f"{name} must hold at least two samples, shape (n, *event), got shape {x.shape}.")
    x = x.reshape(len(x), -1)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def as_clouds(x, y) -> tuple[Float[Array, "n d"], Float[Array, "m d"]]:
    """Both clouds flattened, in one dtype; a `ValueError` unless their samples have as many entries."""
    x, y = as_points("x", x), as_points("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must hold samples of one size, got {x.shape[1]} and {y.shape[1]} entries.")
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return x.astype(dtype), y.astype(dtype)


def normalised_weights(log_weights, size: int, dtype) -> Float[Array, " n"]:
    """Weights that sum to 1 from log weights (n,), or uniform ones."""
    if log_weights is None:
        return jnp.full(size, 1.0 / size, dtype)
    log_weights = jnp.asarray(log_weights, dtype)
    if log_weights.shape != (size,):
        raise ValueError(
            f"log_weights must have one entry a sample, shape ({size},), got {log_weights.shape}."
        )
    return jax.nn.softmax(log_weights)


def dot(a: Array, b: Array) -> Array:
    """Matrix product in full precision, which accelerators do not give by default."""
    return jnp.matmul(a, b, precision="highest")


def without_dead(x: Float[Array, "n d"], weights: Float[Array, " n"]) -> Float[Array, "n d"]:
    """The points, zero where the weight is: a particle without weight may be NaN."""
    return jnp.where(weights[:, None] > 0, x, jnp.zeros_like(x))


def reference_split(size: int, y: Float[Array, "m d"], exact) -> tuple[Array, Array, float]:
    """Two independent clouds of reference samples for the floor, and a factor for their sizes.

    ``exact`` against ``y`` if it is given, else the first n of ``y`` against the others if these are no fewer, else
    the halves of ``y``. Distances with the rate of the root of 1/n + 1/m are multiplied by the factor, which
    is 1 where the sizes are those asked for.
    """
    if exact is not None:
        # In the array type of y: the host's distances are in double precision.
        first, second = (np if isinstance(y, np.ndarray) else jnp).asarray(exact, y.dtype), y
        first = first.reshape(len(first), -1)
        if first.shape[1] != y.shape[1]:
            raise ValueError(f"exact must hold samples of {y.shape[1]} entries, got {first.shape[1]}.")
    else:
        cut = size if len(y) >= 2 * size else len(y) // 2
        first, second = y[:cut], y[cut:]
    asked, got = 1 / size + 1 / len(y), 1 / len(first) + 1 / len(second)
    return first, second, float(np.sqrt(asked / got))
