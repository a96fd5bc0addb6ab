"""Running independent chains, and comparing where they end with a mixture in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

Z = 5.0  # standard errors: a false failure once in 2 million numbers


def ends(algorithm, num_steps, position=None, num_chains=None, key=1):
    """Positions, infos of the last step and states of independent chains; one program for all numbers of steps."""
    num_chains = num_chains or len(jax.tree.leaves(position)[0])
    keys = jax.random.split(jax.random.key(key), num_chains)
    state, info = _ends(algorithm, keys, position, num_steps)
    return np.asarray(state.position, float), jax.tree.map(np.asarray, info), state


@eqx.filter_jit
def _ends(algorithm, keys, position, num_steps):
    def chain(key, position):
        state = algorithm.init(position, jax.random.fold_in(key, 0))
        like = jax.eval_shape(algorithm.step, key, state)[1]
        info = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        return jax.lax.fori_loop(
            0,
            num_steps,
            lambda k, carry: algorithm.step(jax.random.fold_in(key, k + 1), carry[0]),
            (state, info),
        )

    return jax.vmap(chain)(keys, position)


def exact(law, num_samples):
    """Samples of a mixture, always the same."""
    rng = np.random.default_rng(7)
    weights, means, covariance = parts(law)
    chosen = rng.choice(len(weights), size=num_samples, p=weights)
    noise = rng.normal(size=(num_samples, means.shape[1])) @ np.linalg.cholesky(covariance).T
    return jnp.asarray(means[chosen] + noise, jnp.float32)


def parts(law):
    """Weights, means and shared covariance of a mixture, in double precision."""
    weights = np.exp(np.asarray(law.log_weights, float))
    vectors = np.eye(law.rotated_means.shape[1]) if law.eigenvectors is None else law.eigenvectors[0]
    vectors = np.asarray(vectors, float)
    covariance = (vectors * np.asarray(law.eigenvalues[0], float)) @ vectors.T
    return weights / weights.sum(), np.asarray(law.rotated_means, float) @ vectors.T, covariance


def shares(law, x):
    """Probabilities of the components given each of ``x``: their expectations are the weights."""
    weights, means, covariance = parts(law)
    root = np.linalg.inv(np.linalg.cholesky(covariance))
    squares = np.sum(((x[:, None] - means[None]) @ root.T) ** 2, axis=-1)
    logits = np.log(weights) - 0.5 * squares
    terms = np.exp(logits - logits.max(axis=1, keepdims=True))
    return terms / terms.sum(axis=1, keepdims=True)


def gaps(law, x, weights=None, slack=0.0):
    """Differences from the exact values, in standard errors, of moments, shares of modes and moments within modes.

    ``weights`` weigh the samples; ``slack``, in deviations, is taken off the differences.
    """
    true_weights, means, covariance = parts(law)
    mean = true_weights @ means
    centred = means - mean
    second = covariance + (centred.T * true_weights) @ centred
    products = ((x - mean)[:, :, None] * (x - mean)[:, None, :]).reshape(len(x), -1)
    inside, from_modes = shares(law, x), x[:, None] - means[None]
    within = np.einsum("nk,nki,nkj->nij", inside, from_modes, from_modes).reshape(len(x), -1)
    places = (inside[:, :, None] * from_modes).reshape(len(x), -1)
    values = np.concatenate([x, products, inside, places, within], axis=1)
    zeros = np.zeros(places.shape[1])
    expected = np.concatenate([mean, second.ravel(), true_weights, zeros, covariance.ravel()])
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, float)
    weights = weights / weights.sum()
    found = weights @ values
    error = np.sqrt(weights**2 @ (values - found) ** 2)
    # Where one component is all there is, its share has no error but that of rounding.
    return np.maximum(np.abs(found - expected) - slack * values.std(axis=0), 0.0) / (error + 1e-7)


def assert_law(law, x, weights=None, slack=0.0):
    """All within 5 standard errors, see `gaps`."""
    np.testing.assert_array_less(gaps(law, x, weights, slack), Z)
