"""The phi^4 chain: a field on a line with two phases, whose weights depend exponentially on an external field.

    log density(x) = -beta { a d / 2 sum_{i=0}^{d} (x_{i+1} - x_i)^2
                             + 1 / (a d) sum_{i=1}^{d} [(1 - x_i^2)^2 / 4 + b x_i] },      x_0 = x_{d+1} = 0,

so that beta multiplies couplings, wells and field alike, and b > 0 favours the negative phase.

Sites couple to neighbours alone, so that everything follows from integrals on the line, the transfer-matrix method.
With e(x) = exp(-beta [(1 - x^2)^2 / 4 + b x] / (a d)) and k(x, y) = exp(-beta a d (x - y)^2 / 2),

    f_1(x) = k(0, x) e(x),     f_{i+1}(y) = e(y) int k(x, y) f_i(x) dx,     Z = int f_d(x) k(x, 0) dx,

and likewise from the other end; products of the two are the marginals. On a lattice of spacing h the sum over its
points equals the integral up to exp(-2 pi^2 s^2 / h^2), s the deviation of a site given its neighbours, wherever the
lattice starts. That makes an exact sampler as well: backwards, x_i given x_{i+1} is drawn from f_i(x) k(x, x_{i+1})
on a lattice of its own with a uniform offset, where f_i comes from the stored f_{i-1} by one more sum. Averaged over
offsets the law is the chain's.

Source: Gabrié, Rotskoff and Vanden-Eijnden, "Adaptive Monte Carlo augmented with normalizing flows", arXiv 2105.12603.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from smcdiff.checks import check_count, check_positive
from smcdiff.targets.target import Target, exact_moments, parameter

__all__ = ["Phi4Target", "TransferFacts", "phi4_chain", "transfer_facts"]

_SPACING = (
    0.75  # of the lattices, in deviations of a site in a well given its neighbours: an error of exp(-35)
)
_REACH = 6.0  # of the kernel in the sampler, in its deviations, beside the pull of the wells: exp(-18)


class TransferFacts(NamedTuple):
    """What the transfer-matrix method gives.

    Attributes
    ----------
    log_evidence
        log Z.
    mean
        Means (d,) of the sites.
    std
        Deviations (d,) of the sites.
    middle_weights
        Probabilities (2,) that site d // 2, counted from 0, is negative and positive.
    lattice
        Points (n,), evenly spaced about 0.
    log_forward
        log f_i at these points, (d, n), each up to a constant; row 0 is a unit mass at 0, where the chain starts.
    """

    log_evidence: float
    mean: Float[np.ndarray, " d"]
    std: Float[np.ndarray, " d"]
    middle_weights: Float[np.ndarray, " 2"]
    lattice: Float[np.ndarray, " n"]
    log_forward: Float[np.ndarray, "d n"]


class Phi4Target(Target):
    """The phi^4 chain; build it with `phi4_chain`."""

    coupling: Float[Array, ""]  # beta a d
    potential: Float[Array, ""]  # beta / (a d)
    field: Float[Array, ""]  # b
    lattice: Float[Array, " n"]
    log_forward: Float[Array, "d n"]  # log f_i on the lattice
    mode_weights: Float[np.ndarray, " 2"]
    dimension: int = eqx.field(static=True)
    num_taps: int = eqx.field(static=True)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.dimension,)

    def logdensity(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log density at one sample ``x``, up to the constant ``log_evidence``."""
        gaps = jnp.diff(x, prepend=0.0, append=0.0)
        return -0.5 * self.coupling * jnp.sum(gaps**2) + jnp.sum(self._log_site(x))

    def mode_labels(self, x: Float[Array, " d"]) -> Int[Array, ""]:
        """Phase of one sample ``x``: 0 if the middle site, d // 2 counted from 0, is negative, else 1."""
        return (x[self.dimension // 2] > 0).astype(jnp.int32)

    def sample(self, rng_key: PRNGKeyArray, num_samples: int) -> Float[Array, "n d"]:
        """Draw ``num_samples`` independent samples."""
        return jax.lax.map(self._draw, jax.random.split(rng_key, num_samples), batch_size=64)

    def _log_site(self, x):
        return -self.potential * (0.25 * (1 - x**2) ** 2 + self.field * x)

    def _draw(self, rng_key):
        """One sample, from its last site to its first."""
        spacing = self.lattice[1] - self.lattice[0]
        reach = self.num_taps
        lags = jnp.arange(-reach, reach + 1, dtype=spacing.dtype)
        windows = jnp.arange(2 * reach + 1)[:, None] + jnp.arange(2 * reach + 2)[None]
        padding = jnp.full((3 * reach + 2,), -jnp.inf, spacing.dtype)

        def step(neighbour, k):
            key_offset, key_site = jax.random.split(jax.random.fold_in(rng_key, k))
            gaps = spacing * (lags + jax.random.uniform(key_offset, (), spacing.dtype))
            points = neighbour + gaps
            # f_k at the points, from f_{k-1} at those of the stored lattice which are near.
            position = (points[0] - self.lattice[0]) / spacing
            below = jnp.floor(position)
            row = jnp.concatenate([padding, self.log_forward[k], padding])
            begin = below.astype(jnp.int32) - reach + len(padding)
            near = jax.lax.dynamic_slice(row, (begin,), (4 * reach + 2,))
            largest = jnp.maximum(jnp.max(near), jnp.finfo(spacing.dtype).min)
            distances = spacing * (position - below + reach - jnp.arange(2 * reach + 2, dtype=spacing.dtype))
            kernel = jnp.exp(-0.5 * self.coupling * distances**2)
            log_message = jnp.log(jnp.exp(near - largest)[windows] @ kernel)
            logits = log_message + self._log_site(points) - 0.5 * self.coupling * gaps**2
            chosen = points[jax.random.categorical(key_site, logits)]
            return chosen, chosen

        end = jnp.zeros((), spacing.dtype)
        return jax.lax.scan(step, end, jnp.arange(self.dimension), reverse=True)[1]


def phi4_chain(
    dimension: int = 100, *, field: float = 0.0, coupling: float = 0.1, inverse_temperature: float = 20.0
) -> Phi4Target:
    """The phi^4 chain, with its exact log evidence, marginal moments and weights of the two phases.

    Parameters
    ----------
    dimension
        d, number of sites.
    field
        b, of either sign; a positive one favours the negative phase.
    coupling
        a, positive.
    inverse_temperature
        beta, positive.

    Source: arXiv 2105.12603, with the defaults; arXiv 2402.10758 has b = 0, 0.025, 0.05, 0.075, 0.1.
    """
    check_count("dimension", dimension)
    check_positive("coupling", coupling)
    check_positive("inverse_temperature", inverse_temperature)
    stiffness, potential = (
        inverse_temperature * coupling * dimension,
        inverse_temperature / (coupling * dimension),
    )
    facts = transfer_facts(dimension, stiffness, potential, field)
    # The facts want a lattice twice as fine as the sampler.
    lattice, log_forward = facts.lattice[::2], facts.log_forward[:, ::2]
    pull = math.sqrt(potential * (0.5 + 2 * max(1.0, abs(field))))
    reach = (_REACH + pull) / math.sqrt(stiffness) / (lattice[1] - lattice[0])
    return Phi4Target(
        facts.log_evidence,
        exact_moments(facts.mean, facts.std),
        parameter(stiffness),
        parameter(potential),
        parameter(field),
        parameter(lattice),
        parameter(log_forward),
        facts.middle_weights,
        dimension,
        min(math.ceil(reach), len(lattice)),
    )


def transfer_facts(
    dimension: int, stiffness: float, potential: float, field: float, refinement: int = 1
) -> TransferFacts:
    """Exact facts of the chain by the transfer-matrix method, on the host in double precision.

    Parameters
    ----------
    dimension
        d, number of sites.
    stiffness
        beta a d, what multiplies the squared differences over two.
    potential
        beta / (a d), what multiplies wells and field.
    field
        b.
    refinement
        The lattice is this many times as fine, for a check of convergence.
    """
    reach = _reach(potential, field)
    spacing = 0.5 * _spacing(stiffness, potential, field) / refinement
    half = 2 * math.ceil(0.5 * reach / spacing)
    x = spacing * np.arange(-half, half + 1)

    def log_site(points):
        return -potential * (0.25 * (1 - points**2) ** 2 + field * points)

    # messages[i]: the integral over i sites between an end and the site at x, the same from either end.
    messages, log_scales = [-0.5 * stiffness * x**2], [0.0]

    def kernel_to(points):
        return np.exp(-0.5 * stiffness * (points[:, None] - x) ** 2) * spacing

    def message_at(points, i, kernel):
        if i == 0:
            return -0.5 * stiffness * points**2
        with np.errstate(divide="ignore"):
            return np.log(kernel @ np.exp(messages[i - 1] + log_site(x)))

    kernel = kernel_to(x)
    for i in range(1, dimension):
        message = message_at(x, i, kernel)
        messages.append(message - message.max())
        log_scales.append(log_scales[-1] + message.max())
    log_marginals = np.array(messages) + np.array(messages[::-1]) + log_site(x)
    largest = log_marginals.max(axis=1)
    marginals = np.exp(log_marginals - largest[:, None])
    totals = marginals.sum(axis=1)
    log_evidence = largest[0] + math.log(totals[0] * spacing) + log_scales[-1]
    marginals /= totals[:, None]
    mean = marginals @ x
    std = np.sqrt(marginals @ x**2 - mean**2)
    # Half a line is no lattice sum: the marginal of the middle site at Gauss-Legendre nodes, ten a cell of reach / 40.
    nodes, node_weights = np.polynomial.legendre.leggauss(10)
    cells = np.arange(40 * refinement)[:, None]
    points, middle = ((cells + 0.5 + 0.5 * nodes) * reach / cells.size).ravel(), dimension // 2
    halves = []
    for signed in (-points, points):
        kernel = kernel_to(signed)
        log_values = log_site(signed) - largest[middle]
        for i in (middle, dimension - 1 - middle):
            log_values += message_at(signed, i, kernel)
        halves.append(np.exp(log_values) @ np.tile(node_weights, cells.size))
    start = np.where(np.arange(len(x)) == half, 0.0, -np.inf)
    log_forward = np.stack([start, *(message + log_site(x) for message in messages[:-1])])
    return TransferFacts(float(log_evidence), mean, std, np.array(halves) / sum(halves), x, log_forward)


def _spacing(stiffness, potential, field):
    """Spacing of the lattices; wells lie at x^2 <= 1 + |b|, where the site's potential has the curvature 3 x^2 - 1."""
    return _SPACING / math.sqrt(2 * stiffness + potential * (3 + 3 * max(1.0, abs(field))))


def _reach(potential, field):
    """Where the density of a site alone has fallen by exp(-60)."""
    return math.sqrt(1 + math.sqrt(4 * (60 / potential + 4 * max(1.0, abs(field)))))
