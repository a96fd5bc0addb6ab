"""Targets of the kernels' tests: mixtures of Student laws, all with one structure, so that a kernel compiles once.

Asymmetric in every way: unequal weights, means off the origin, correlated and unequal scales. Exact draws are at hand,
and a kernel that leaves the target alone leaves the law of anything computed from it alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from smcdiff.density import LogDensity

NUM_COMPONENTS = 3


class StudentMixture(NamedTuple):
    """Weights (K,), means (K, d), lower factors (K, d, d), degrees of freedom (K,), and a leapfrog step that fits."""

    weights: np.ndarray
    means: np.ndarray
    factors: np.ndarray
    freedoms: np.ndarray
    step: float

    def density(self) -> LogDensity:
        """The log density as a target, its parameters leaves."""
        return LogDensity(Partial(logdensity, *self.leaves()))

    def leaves(self):
        """Parameters of the log density, in JAX's default precision."""
        inverses = np.linalg.inv(self.factors)
        log_dets = np.log(np.abs(np.diagonal(self.factors, axis1=1, axis2=2))).sum(axis=1)
        values = (np.log(self.weights) - log_dets, self.means, inverses, self.freedoms)
        return tuple(jnp.asarray(value, jnp.result_type(float)) for value in values)

    def sample(self, seed: int, num_samples: int) -> np.ndarray:
        """Exact draws."""
        rng = np.random.default_rng(seed)
        chosen = rng.choice(NUM_COMPONENTS, size=num_samples, p=self.weights)
        normal = rng.normal(size=(num_samples, self.means.shape[1]))
        freedom = self.freedoms[chosen]
        scale = np.sqrt(freedom / rng.chisquare(freedom))
        return self.means[chosen] + scale[:, None] * np.einsum("nij,nj->ni", self.factors[chosen], normal)


def logdensity(logits, means, inverses, freedoms, x):
    """Log density, up to a constant."""
    d = x.shape[0]
    whitened = jnp.einsum("kij,kj->ki", inverses, x[None] - means)
    squares = jnp.sum(whitened**2, axis=-1)
    half = 0.5 * (freedoms + d)
    constants = jax.scipy.special.gammaln(half) - jax.scipy.special.gammaln(0.5 * freedoms)
    constants = constants - 0.5 * d * jnp.log(freedoms)
    return jax.nn.logsumexp(logits + constants - half * jnp.log1p(squares / freedoms))


def _lower(rng, d, spread):
    """A lower factor with correlations and unequal scales."""
    factor = np.tril(0.4 * rng.normal(size=(d, d)) / np.sqrt(d), -1)
    return spread * (factor + np.diag(np.exp(0.5 * rng.normal(size=d))))


# Leapfrog steps of which a half to four fifths are accepted: faults sit in the ratio, so a good part must be rejected.
_STEPS = {
    2: {"mixture": 0.6, "skewed": 0.65, "heavy tailed": 1.4, "correlated": 0.6},
    20: {"mixture": 0.23, "skewed": 0.45, "heavy tailed": 0.85, "correlated": 0.35},
}


def targets(d: int) -> dict[str, StudentMixture]:
    """The catalogue in dimension ``d``; between 2 and 20 the steps are those of 2."""
    step = _STEPS.get(d, _STEPS[2])
    rng = np.random.default_rng(d)
    direction = rng.normal(size=d)
    direction /= np.linalg.norm(direction)
    gaussian, heavy = np.full(3, 1e4), np.array([3.0, 5.0, 9.0])
    one = np.stack([_lower(rng, d, 1.0)] * 3)
    return {
        "mixture": StudentMixture(
            np.array([0.55, 0.3, 0.15]),
            np.outer([-1.2, 1.6, 0.3], direction) + 0.3 * rng.normal(size=(3, d)),
            np.stack([_lower(rng, d, scale) for scale in (0.6, 0.4, 0.8)]),
            gaussian,
            step["mixture"],
        ),
        "skewed": StudentMixture(
            np.array([0.5, 0.3, 0.2]),
            np.outer([0.0, 0.8, 2.2], direction) - 0.7,
            np.stack([one[0] * scale for scale in (0.4, 0.7, 1.3)]),
            gaussian,
            step["skewed"],
        ),
        "heavy tailed": StudentMixture(
            np.array([0.6, 0.3, 0.1]),
            np.outer([0.5, 0.2, -0.4], direction) + 0.4,
            one,
            heavy,
            step["heavy tailed"],
        ),
        "correlated": StudentMixture(
            np.array([0.2, 0.3, 0.5]),
            np.tile(0.5 + np.arange(d) / d, (3, 1)),
            np.stack([np.linalg.cholesky(0.1 * np.eye(d) + 0.9 * np.outer(*[1 + np.arange(d) / d] * 2))] * 3),
            gaussian,
            step["correlated"],
        ),
    }


def features(target: StudentMixture, x: np.ndarray) -> np.ndarray:
    """Bounded statistics of samples (N, d), one column each: positions, scales, mode weights."""
    x = np.asarray(x, float)
    centred = x - target.weights @ target.means
    bounded = np.tanh(centred)
    distances = np.linalg.norm(x[:, None] - target.means, axis=-1)
    nearest = distances.argmin(axis=1)
    columns = [
        *bounded.T[:4],
        *(bounded**2).T[:4],
        bounded[:, 0] * bounded[:, 1],
        np.log1p(np.sum(centred**2, axis=1)),
        *[nearest == k for k in range(2)],
        bounded[:, -1] > 0.3,
    ]
    return np.stack(columns, axis=1).astype(float)
