"""Mixtures of Gaussians far apart: where samplers lose modes, or their weights.

The density is normalised. A sample belongs to the mode of its most probable component, and the weight of a mode is the
probability of these samples: the weight of the component if none overlaps it, else in the plane by quadrature,

    P(label = k) = sum_j w_j P(label(m_j + L_j z) = k),     z ~ N(0, I),

which is right to 1e-4. In other dimensions the overlap is left out. Of the members only `forty_modes` in three
dimensions has one worth the name, two samples in a hundred, which pairs of equal components share evenly.

Sources: Grenioux et al., "Stochastic Localization via Iterative Posterior Sampling", arXiv 2402.10758 (`eight_modes`,
`two_modes`); Midgley et al., "Flow Annealed Importance Sampling Bootstrap", arXiv 2208.01893 (`forty_modes`); Cardoso
et al., "Monte Carlo guided Denoising Diffusion models", arXiv 2308.07983 (the grid); He, Rojas and Tao,
"Zeroth-Order Sampling Methods for Non-Log-Concave Distributions", arXiv 2402.17886 (`skewed_modes` in the plane).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from smcdiff.checks import check_between, check_count, check_positive
from smcdiff.mixture import GaussianMixture
from smcdiff.targets.target import Target, exact_moments

__all__ = [
    "MixtureTarget",
    "eight_modes",
    "forty_modes",
    "gaussian_modes",
    "grid_modes",
    "random_means",
    "skewed_modes",
    "two_modes",
]


class MixtureTarget(Target):
    """A Gaussian mixture as a target; build it with `gaussian_modes`.

    Parameters
    ----------
    mixture
        The law.
    mode_weights
        Probability (K,) that a component is the most probable one of a sample.
    """

    mixture: GaussianMixture
    mode_weights: Float[np.ndarray, " K"]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.mixture.event_shape

    def logdensity(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        """Normalised log density at one sample ``x``."""
        return self.mixture.logdensity(x)

    def score(self, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
        """Gradient of the log density at one sample ``x``."""
        return self.mixture.score(x)

    def logdensity_and_score(
        self, x: Float[Array, "*event"]
    ) -> tuple[Float[Array, ""], Float[Array, "*event"]]:
        """Both at one sample ``x``, from one evaluation of the components."""
        return self.mixture.logdensity_and_score(x)

    def sample(self, rng_key: PRNGKeyArray, num_samples: int) -> Float[Array, "n *event"]:
        """Draw ``num_samples`` independent samples."""
        return self.mixture.sample(rng_key, num_samples)

    def mode_labels(self, x: Float[Array, "*event"]) -> Int[Array, ""]:
        """The most probable component, from 0 to K - 1, of one sample ``x``."""
        return jnp.argmax(self.mixture.responsibilities(x))


def gaussian_modes(weights, means, covariance) -> MixtureTarget:
    """A mixture of your own as a target.

    Parameters
    ----------
    weights
        Shape (K,), non-negative; normalised here.
    means
        Shape (K, d).
    covariance
        A positive scalar, (d, d) shared by all components, or (K, d, d).
    """
    mixture = GaussianMixture.create(weights, means, covariance)
    weights, means, covariance = (np.asarray(value, float) for value in (weights, means, covariance))
    weights = weights / weights.sum()
    num_modes, d = means.shape
    covariances = np.broadcast_to(
        covariance if covariance.ndim else covariance * np.eye(d), (num_modes, d, d)
    )
    mean = weights @ means
    variances = weights @ (np.diagonal(covariances, axis1=1, axis2=2) + (means - mean) ** 2)
    labels = _label_weights(weights, means, covariances) if d == 2 else weights
    return MixtureTarget(0.0, exact_moments(mean, np.sqrt(variances)), mixture, labels)


def eight_modes(shift: float = 0.0) -> MixtureTarget:
    """Eight equal Gaussians of covariance 0.7 I on a circle of radius 10 in the plane.

    Parameters
    ----------
    shift
        Added to both coordinates; 10 puts the ring off the origin, where chains start.

    Source: arXiv 2402.10758.
    """
    angles = 2 * np.pi * np.arange(8) / 8
    means = 10.0 * np.stack([np.cos(angles), np.sin(angles)], axis=1) + shift
    return gaussian_modes(np.ones(8), means, 0.7)


def grid_modes(spacing: float = 8.0, variance: float = 1.0) -> MixtureTarget:
    """Twenty-five equal Gaussians on a 5 x 5 grid about the origin of the plane.

    Parameters
    ----------
    spacing
        Distance of neighbours, positive.
    variance
        Of each coordinate in a mode, positive.

    Source: the means and the variance of arXiv 2308.07983 with equal weights.
    """
    check_positive("spacing", spacing)
    check_positive("variance", variance)
    steps = spacing * np.arange(-2, 3)
    means = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(25, 2)
    return gaussian_modes(np.ones(25), means, variance)


def forty_modes(dimension: int = 2, *, side: float = 40.0, std: float = 1.0, seed: int = 0) -> MixtureTarget:
    """Forty equal Gaussians, their means uniform in a cube about the origin.

    The means come from `random_means` and are the same on every machine. ``side=80`` and ``std=log(1 + e)``, which is
    softplus(1), make the mixture of arXiv 2208.01893 and arXiv 2402.03008, with their means.

    Parameters
    ----------
    dimension
        d.
    side
        Of the cube, positive.
    std
        Deviation of each coordinate in a mode, positive.
    seed
        Of the means.
    """
    check_positive("std", std)
    return gaussian_modes(np.ones(40), random_means(40, dimension, side, seed), std**2)


def two_modes(dimension: int, weight: float = 2 / 3) -> MixtureTarget:
    """Two Gaussians of covariance 0.05 I with means -2/3 and 4/3 in every coordinate.

    Parameters
    ----------
    dimension
        d.
    weight
        Weight of the first mode, in (0, 1): 2/3 gives a mean of zero.

    Source: arXiv 2402.10758, with weight 2/3.
    """
    check_count("dimension", dimension)
    check_positive("weight", weight)
    check_between("weight", weight, 0.0, 1.0)
    means = np.outer([-2 / 3, 4 / 3], np.ones(dimension))
    return gaussian_modes([weight, 1 - weight], means, 0.05)


def skewed_modes(dimension: int = 2, radius: float = 11.0) -> MixtureTarget:
    """Modes of unequal weights and full, unequal covariances: four in the plane, or three in five dimensions.

    Parameters
    ----------
    dimension
        2 or 5.
    radius
        Distance scale of the modes, positive: means are multiplied by radius / 11.

    Source: arXiv 2402.17886 for the plane; the five-dimensional one is our own.

    Raises
    ------
    ValueError
        If ``dimension`` is neither.
    """
    check_positive("radius", radius)
    if dimension == 2:
        means = np.array([[0.0, 0.0], [0.0, 11.0], [9.0, 9.0], [11.0, 0.0]])
        covariances = np.array(
            [
                [[1.0, 0.5], [0.5, 1.0]],
                [[0.3, -0.2], [-0.2, 0.3]],
                [[1.0, 0.3], [0.3, 1.0]],
                [[1.2, -1.0], [-1.0, 1.2]],
            ]
        )
        return gaussian_modes([0.1, 0.2, 0.3, 0.4], radius / 11 * means, covariances)
    if dimension == 5:
        # Correlations of 0.8^|i - j|, (-0.5)^|i - j| and none, with deviations that rise, fall and alternate.
        means = np.array([[0.0, 0, 0, 0, 0], [8.0, -5, 3, 0, 6], [-6.0, 2, 7, 9, -3]])
        lags = np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
        deviations = np.array(
            [[0.6, 0.8, 1.0, 1.2, 1.4], [1.5, 1.2, 0.9, 0.6, 0.3], [0.5, 1.5, 0.5, 1.5, 0.5]]
        )
        covariances = np.stack([correlation**lags for correlation in (0.8, -0.5, 0.0)])
        covariances *= deviations[:, :, None] * deviations[:, None, :]
        return gaussian_modes([0.15, 0.6, 0.25], radius / 11 * means, covariances)
    raise ValueError(f"dimension of skewed_modes must be 2 or 5, got {dimension!r}.")


def random_means(num_means: int, dimension: int, side: float, seed: int) -> Float[np.ndarray, "K d"]:
    """Points uniform in a cube about the origin: 24 bits each of the Mersenne Twister, whose stream never changes.

    In the plane, a side of 80 and the seed 0 give the means of the 40 modes of arXiv 2208.01893.

    Parameters
    ----------
    num_means
        K.
    dimension
        d.
    side
        Of the cube, positive.
    seed
        Of the generator.
    """
    check_count("dimension", dimension)
    check_positive("side", side)
    words = np.random.RandomState(seed).randint(0, 2**32, (num_means, dimension), np.uint32)
    return ((words & 0xFFFFFF) / 2**24 - 0.5) * side


def _label_weights(weights, means, covariances, width=5.5, spacing=0.1):
    """Probabilities of the most probable components, in the plane."""
    factors = np.linalg.cholesky(covariances)
    largest = math.sqrt(np.linalg.eigvalsh(covariances).max())
    distances = np.linalg.norm(means[:, None] - means[None], axis=-1) + np.diag(np.full(len(means), np.inf))
    axis = np.arange(-width, width, spacing) + spacing / 2
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    measure = np.exp(-0.5 * np.sum(grid**2, axis=1))
    measure /= measure.sum()
    precisions = np.linalg.inv(covariances)
    offsets = np.log(weights) - 0.5 * np.linalg.slogdet(covariances)[1]
    found = np.zeros(len(means))
    for j, weight in enumerate(weights):
        if distances[j].min() > 12 * largest:
            found[j] += weight
            continue
        points = means[j] + grid @ factors[j].T
        best, labels = np.full(len(points), -np.inf), np.zeros(len(points), int)
        # Of the components only those near enough can win, in the cells of its own samples.
        for k in np.flatnonzero((distances[j] < 14 * largest) | (np.arange(len(means)) == j)):
            gaps = points - means[k]
            logits = offsets[k] - 0.5 * np.einsum("ni,ij,nj->n", gaps, precisions[k], gaps)
            labels[logits > best] = k
            best = np.maximum(best, logits)
        found += weight * np.bincount(labels, measure, minlength=len(means))
    return found
