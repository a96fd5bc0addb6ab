"""The algebra of density paths: products, powers, guidance, negation and reward tilts.

Every function returns a `Composition`; compositions of compositions are taken apart into one weighted product.
Exponents are numbers or functions of t. What is known to have no finite integral is refused: the exponents must have
a positive sum, and for Gaussian mixtures the Gaussian tails must fall off.

Sources: Du et al., "Reduce, Reuse, Recycle", arXiv 2302.11552; Liu et al., "Compositional Visual Generation with
Composable Diffusion Models", arXiv 2206.01714; Ho and Salimans, "Classifier-Free Diffusion Guidance",
arXiv 2207.12598.
"""

from smcdiff.compose.weighted import Composition, Exponent, Reward, affine, compose
from smcdiff.density import ScheduledPath

__all__ = ["condition", "contrast", "geometric_average", "guide", "product", "temper"]


def product(*paths: ScheduledPath) -> Composition:
    """The product of densities p^1 p^2 ...: what is likely under every one of them.

    Parameters
    ----------
    *paths
        Density paths with one schedule and event shape.

    Raises
    ------
    TypeError
        If one of them is no density path.
    ValueError
        If there is none, or their schedules or event shapes differ.
    """
    return compose("product", paths, [1.0] * len(paths))


def temper(path: ScheduledPath, beta: Exponent) -> Composition:
    """The power p^beta: sharper for beta > 1, flatter for beta < 1.

    Parameters
    ----------
    path
        Density path.
    beta
        Positive number (an inverse temperature), or a function of t.

    Raises
    ------
    ValueError
        If ``beta`` is not positive.
    """
    return compose("temper", [path], [beta])


def geometric_average(a: ScheduledPath, b: ScheduledPath, weight: Exponent) -> Composition:
    """The geometric average a^(1 - weight) b^weight.

    Parameters
    ----------
    a, b
        Density paths with one schedule and event shape.
    weight
        Exponent of ``b``, or a function of t; between 0 and 1 for an average in the proper sense.

    Raises
    ------
    ValueError
        As `product`, or if the result is known to have no finite integral.
    """
    return compose("geometric_average", [a, b], [affine(weight, 1.0, -1.0), weight])


def guide(conditional: ScheduledPath, unconditional: ScheduledPath, scale: Exponent) -> Composition:
    """Classifier-free guidance as a density: conditional^scale unconditional^(1 - scale).

    Parameters
    ----------
    conditional, unconditional
        Density paths with one schedule and event shape.
    scale
        Guidance scale, or a function of t: 1 is the conditional model, more exaggerates what sets it apart.

    Raises
    ------
    ValueError
        As `product`, or if the result is known to have no finite integral: with Gaussian tails scale / variance of
        the conditional must exceed (scale - 1) / variance of the unconditional in every direction.

    Source: "Classifier-Free Diffusion Guidance", arXiv 2207.12598.
    """
    return compose("guide", [conditional, unconditional], [scale, affine(scale, 1.0, -1.0)])


def contrast(a: ScheduledPath, b: ScheduledPath, strength: Exponent) -> Composition:
    """Negation a / b^strength: what is likely under ``a`` and unlikely under ``b``.

    Parameters
    ----------
    a, b
        Density paths with one schedule and event shape.
    strength
        Number below 1, or a function of t.

    Raises
    ------
    ValueError
        As `product`, or if the result is known to have no finite integral; for a strength of 1 or more it has none.

    Source: "Reduce, Reuse, Recycle", arXiv 2302.11552.
    """
    return compose("contrast", [a, b], [1.0, affine(strength, 0.0, -1.0)])


def condition(path: ScheduledPath, reward: Reward) -> Composition:
    """The tilted path p_t(x) exp(R(x, t)).

    At t = 0 this is p_0 tilted by exp(R(., 0)); how R grows from noise to data is free and decides the variance of
    the weights. A reward that does not matter at t = 1 keeps the start simple, for instance alpha(t) r(x).

    Parameters
    ----------
    path
        Density path.
    reward
        ``reward(x, t) -> scalar`` for one sample, differentiable in x. Make it a `jax.tree_util.Partial` of a
        module-level function, so that what it holds are leaves. Nothing is known of its tails, so that a reward that
        grows faster than the density falls is NOT refused.

    Raises
    ------
    TypeError
        If ``path`` is no density path or ``reward`` is not callable.
    """
    if not callable(reward):
        raise TypeError(f"reward must be a function of (x, t), got {type(reward).__name__}.")
    return compose("condition", [path], [1.0], [reward])
