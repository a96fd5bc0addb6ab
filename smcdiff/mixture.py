"""The Gaussian mixture density, in a form that is cheap to rescale along a path.

    p(x) = sum_k w_k N(x; m_k, C_k),      C_k = U_k diag(l_k) U_k^T  (or one C for all k).

Means are stored in the eigenbasis, so that adding noise changes eigenvalues only. With a shared covariance the
squared distances are expanded, z.m_k/v - m_k.m_k/(2v), so that many samples against many components are one
matrix product under `jax.vmap`.
"""

import math
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.special import logsumexp

__all__ = ["GaussianMixture"]


class GaussianMixture(eqx.Module):
    """The density sum_k w_k N(m_k, C_k), with shared or per-component covariance.

    Build it with `GaussianMixture.create`. With d the number of entries of a sample, ``rotated_means`` has shape
    (K, d); ``eigenvalues`` (1, d) if shared, else (K, d); ``eigenvectors`` (1, d, d), (K, d, d), or None for
    diagonal covariances.
    """

    log_weights: Float[Array, " K"]
    rotated_means: Float[Array, "K d"]
    eigenvalues: Float[Array, "1_or_K d"]
    eigenvectors: Float[Array, "1_or_K d d"] | None
    event_shape: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def create(cls, weights, means, covariance, *, dtype=None) -> Self:
        """Build a mixture from its parameters.

        Parameters
        ----------
        weights
            Shape (K,), non-negative; normalised here.
        means
            Shape (K, *event_shape).
        covariance
            A positive scalar (isotropic), an array (d, d) shared by all components, or (K, d, d).
        dtype
            Of the stored arrays; JAX's default float if omitted.

        Raises
        ------
        ValueError
            If shapes do not fit, a weight is negative or all are zero, or a covariance is not symmetric
            positive definite.
        """
        weights, means = np.asarray(weights, float), np.asarray(means, float)
        if (
            weights.ndim != 1
            or means.shape[:1] != weights.shape
            or not (np.all(weights >= 0) and weights.sum() > 0)
        ):
            raise ValueError(
                "weights must be non-negative, not all zero and of shape (K,), beside means of shape "
                f"(K, *event_shape); got weights {weights.shape} and means {means.shape}."
            )
        eigenvalues, eigenvectors = _eigendecompose(covariance, len(weights), math.prod(means.shape[1:]))
        with np.errstate(divide="ignore"):
            log_weights = np.log(weights / weights.sum())
        flat, event_shape = means.reshape(len(means), -1), means.shape[1:]
        if eigenvectors is not None:
            flat = np.einsum(
                "kji,kj->ki", np.broadcast_to(eigenvectors, (len(flat), *eigenvectors.shape[1:])), flat
            )
        dtype = dtype or jnp.result_type(float)
        return cls(
            jnp.asarray(log_weights, dtype),
            jnp.asarray(flat, dtype),
            jnp.asarray(eigenvalues, dtype),
            None if eigenvectors is None else jnp.asarray(eigenvectors, dtype),
            event_shape,
        )

    def diffuse(self, alpha: Float[Array, ""], sigma: Float[Array, ""]) -> Self:
        """Law of alpha x + sigma eps for x from this mixture."""
        return eqx.tree_at(
            lambda m: (m.rotated_means, m.eigenvalues),
            self,
            (alpha * self.rotated_means, alpha**2 * self.eigenvalues + sigma**2),
        )

    def logdensity(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        """Normalised log density at one sample ``x``."""
        logits, common = self._log_joint(self._rotate(x))
        return common + jax.nn.logsumexp(logits)

    def score(self, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
        """Gradient of the log density at one sample ``x``."""
        z = self._rotate(x)
        weights = jax.nn.softmax(self._log_joint(z)[0])
        means = (weights @ self.rotated_means)[None] if self._shared else self.rotated_means
        return self._average(weights, (means - z) / self.eigenvalues)

    def logdensity_and_score(
        self, x: Float[Array, "*event"]
    ) -> tuple[Float[Array, ""], Float[Array, "*event"]]:
        """Both at one sample ``x``, from one evaluation of the components."""
        return jax.value_and_grad(self.logdensity)(x)

    def denoise(
        self, x: Float[Array, "*event"], alpha: Float[Array, ""], sigma: Float[Array, ""]
    ) -> Float[Array, "*event"]:
        """E[x_0 | alpha x_0 + sigma eps = x] for x_0 from this mixture, at one sample ``x``."""
        noisy = self.diffuse(alpha, sigma)
        z = self._rotate(x)
        weights = jax.nn.softmax(noisy._log_joint(z)[0])
        means = (weights @ self.rotated_means)[None] if self._shared else self.rotated_means
        gain, keep = alpha * self.eigenvalues / noisy.eigenvalues, sigma**2 / noisy.eigenvalues
        return self._average(weights, gain * z + keep * means)

    def denoising_posterior(
        self, x: Float[Array, "*event"], alpha: Float[Array, ""], sigma: Float[Array, ""]
    ) -> Self:
        """Law of x_0 given alpha x_0 + sigma eps = x: a mixture, whose mean is `denoise`."""
        noisy = self.diffuse(alpha, sigma)
        z = self._rotate(x)
        gain, keep = alpha * self.eigenvalues / noisy.eigenvalues, sigma**2 / noisy.eigenvalues
        means = gain * z + keep * self.rotated_means
        log_weights = jax.nn.log_softmax(noisy._log_joint(z)[0])
        return type(self)(log_weights, means, keep * self.eigenvalues, self.eigenvectors, self.event_shape)

    def responsibilities(self, x: Float[Array, "*event"]) -> Float[Array, " K"]:
        """Posterior probabilities of the components given one sample ``x``."""
        return jax.nn.softmax(self._log_joint(self._rotate(x))[0])

    def sample(self, rng_key: PRNGKeyArray, num_samples: int) -> Float[Array, "n *event"]:
        """Draw ``num_samples`` independent samples."""
        key_component, key_noise = jax.random.split(rng_key)
        chosen = jax.random.categorical(key_component, self.log_weights, shape=(num_samples,))
        noise = jax.random.normal(
            key_noise, (num_samples, self.rotated_means.shape[1]), self.rotated_means.dtype
        )
        owner = jnp.zeros_like(chosen) if self._shared else chosen
        rotated = self.rotated_means[chosen] + jnp.sqrt(self.eigenvalues[owner]) * noise
        if self.eigenvectors is not None and self._shared:
            rotated = rotated @ self.eigenvectors[0].T
        elif self.eigenvectors is not None:
            rotated = _rotate_each(self.eigenvectors, owner, rotated)
        return rotated.reshape(num_samples, *self.event_shape)

    def component_means(self) -> Float[Array, "K *event"]:
        """Means of the components."""
        flat = self.rotated_means
        if self.eigenvectors is not None:
            vectors = jnp.broadcast_to(self.eigenvectors, (len(flat), *self.eigenvectors.shape[1:]))
            flat = jnp.einsum("kij,kj->ki", vectors, flat)
        return flat.reshape(-1, *self.event_shape)

    def component_covariances(self) -> Float[Array, "K d d"]:
        """Covariances of the components, (1, d, d) if shared."""
        if self.eigenvectors is None:
            return jax.vmap(jnp.diag)(self.eigenvalues)
        return jnp.einsum("kij,kj,klj->kil", self.eigenvectors, self.eigenvalues, self.eigenvectors)

    def mean(self) -> Float[Array, "*event"]:
        """Mean of the mixture."""
        return jnp.tensordot(jnp.exp(self.log_weights), self.component_means(), axes=1)

    def covariance(self) -> Float[Array, "d d"]:
        """Covariance of the mixture, over the flattened sample."""
        weights = jnp.exp(self.log_weights)
        centred = (self.component_means() - self.mean()[None]).reshape(len(weights), -1)
        shares = jnp.ones_like(weights[:1]) if self._shared else weights
        within = jnp.tensordot(shares, self.component_covariances(), axes=1)
        return within + jnp.einsum("k,ki,kj->ij", weights, centred, centred)

    def posterior(self, matrix, y, noise_std) -> tuple[Self, float]:
        """Exact posterior and log evidence under the measurement y ~ N(A x, diag(noise_std^2)).

        Computed on the host in double precision; not for use inside compiled code.

        Parameters
        ----------
        matrix
            A, of shape (d_y, d), acting on the flattened sample.
        y
            Measurement with d_y entries, any shape.
        noise_std
            Deviation of the noise: a scalar, or one value an entry of ``y``.

        Returns
        -------
        The posterior mixture, and log p(y).
        """
        dtype = self.rotated_means.dtype
        matrix, y = np.asarray(matrix, float), np.asarray(y, float).ravel()
        if matrix.shape != (y.size, self.rotated_means.shape[1]):
            raise ValueError(
                f"matrix must have the shape (d_y, d) = ({y.size}, {self.rotated_means.shape[1]}), got {matrix.shape}."
            )
        noise = np.diag(np.broadcast_to(np.asarray(noise_std, float).ravel() ** 2, y.shape))
        means = np.asarray(self.component_means(), float).reshape(len(self.rotated_means), -1)
        new_means, covariances, log_weights = np.empty_like(means), [], np.array(self.log_weights, float)
        for k, covariance in enumerate(np.asarray(self.component_covariances(), float)):
            group = slice(None) if self._shared else slice(k, k + 1)
            total = matrix @ covariance @ matrix.T + noise
            gain = np.linalg.solve(total, matrix @ covariance).T
            residual = y - means[group] @ matrix.T
            new_means[group] = means[group] + residual @ gain.T
            covariances.append(covariance - gain @ matrix @ covariance)
            quadratic = np.sum(residual * np.linalg.solve(total, residual.T).T, axis=-1)
            log_weights[group] += -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * total)[1])
        log_evidence = float(logsumexp(log_weights))
        posterior = type(self).create(
            np.exp(log_weights - log_evidence),
            new_means.reshape(-1, *self.event_shape),
            covariances[0] if self._shared else np.stack(covariances),
            dtype=dtype,
        )
        return posterior, log_evidence

    @property
    def _shared(self):
        return len(self.eigenvalues) == 1

    def _rotate(self, x):
        """Coordinates of ``x`` in the eigenbasis, (1, d) or (K, d)."""
        flat = x.reshape(-1)
        return flat[None] if self.eigenvectors is None else jnp.einsum("kij,i->kj", self.eigenvectors, flat)

    def _average(self, weights, rotated):
        """Average over components of ``rotated`` (one row, already averaged, if shared), in the event's shape."""
        weights = jnp.ones_like(weights[:1]) if self._shared else weights
        if self.eigenvectors is None:
            flat = weights @ rotated
        else:
            flat = jnp.einsum("k,kij,kj->i", weights, self.eigenvectors, rotated)
        return flat.reshape(self.event_shape)

    def _log_joint(self, z):
        """log(w_k N(z; m_k, C_k)) as (logits (K,), a term common to all components)."""
        means, values = self.rotated_means, self.eigenvalues
        if self._shared:
            scaled = means / values
            logits = self.log_weights + scaled @ z[0] - 0.5 * jnp.sum(means * scaled, axis=-1)
            return logits, -0.5 * jnp.sum(z**2 / values + jnp.log(2 * jnp.pi * values))
        terms = (z - means) ** 2 / values + jnp.log(2 * jnp.pi * values)
        return self.log_weights - 0.5 * jnp.sum(terms, axis=-1), jnp.zeros((), z.dtype)


def _eigendecompose(covariance, num_components, dimension):
    """Eigenvalues (1 or K, d) and eigenvectors (None if isotropic) of a covariance in any of its three forms."""
    covariance = np.asarray(covariance, float)
    if covariance.ndim == 0:
        values, vectors = np.full((1, dimension), covariance), None
    elif covariance.shape in ((dimension, dimension), (num_components, dimension, dimension)):
        if not np.allclose(
            covariance, np.swapaxes(covariance, -1, -2), rtol=1e-4, atol=1e-6 * np.abs(covariance).max()
        ):
            raise ValueError("covariance must be symmetric.")
        values, vectors = np.linalg.eigh(covariance.reshape(-1, dimension, dimension))
    else:
        raise ValueError(
            "covariance must be a positive scalar or have the shape "
            f"({dimension}, {dimension}) or ({num_components}, {dimension}, {dimension}), got {covariance.shape}."
        )
    if not np.all(values > 0):
        raise ValueError(
            f"covariance must be positive definite, its smallest eigenvalue is {values.min():.3g}."
        )
    return values, vectors


@jax.jit
def _rotate_each(eigenvectors, owner, rotated):
    """Each sample by its component's rotation, without a matrix for every sample."""
    return jax.lax.map(lambda pair: eigenvectors[pair[0]] @ pair[1], (owner, rotated), batch_size=64)
