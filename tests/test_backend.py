"""The compiler under us: programs of the shape ours have, whose results one release of JAX got wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.mark.parametrize("count", [64, 2048, 40_000])
def test_a_vectorised_matrix_vector_product_that_is_summed(count):
    """JAX 0.10.2 mixes rows up here on the CPU (jax issue 39103): a wrong likelihood without an error."""
    matrix = np.array([[1.0, -0.4, 0.3], [0.2, 0.9, -0.7]], np.float32)
    x = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)

    def log_likelihood(x, weigh):
        z = (jnp.asarray([1.9, -0.3]) - jnp.asarray(matrix) @ x) / jnp.asarray([0.4, 0.7])
        return jnp.where(weigh, -jnp.sum(0.5 * z**2 + jnp.asarray([0.1, 0.2])), 0.0 * jnp.sum(x))

    optimised = {"xla_backend_optimization_level": 3}
    values = jax.jit(jax.vmap(log_likelihood), compiler_options=optimised)(x, np.ones(count, bool))
    z = (np.array([1.9, -0.3]) - x @ matrix.T) / np.array([0.4, 0.7])
    np.testing.assert_allclose(
        values, -np.sum(0.5 * z**2 + np.array([0.1, 0.2]), axis=1), rtol=1e-4, atol=1e-4
    )
