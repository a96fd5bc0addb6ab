"""`batched_map` is `jax.vmap` in bounded memory: same values, same structure, any size."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcdiff.batching import batched_map


def _function(point, scale):
    """A pytree in two arguments, and a pytree out."""
    return {"sum": jnp.sin(point["a"]) @ point["b"] * scale, "pair": (point["a"] - scale, point["b"] * 2)}


def _arguments(num):
    keys = jax.random.split(jax.random.key(0), 3)
    point = {"a": jax.random.normal(keys[0], (num, 3)), "b": jax.random.normal(keys[1], (num, 3))}
    return point, jax.random.normal(keys[2], (num,))


@pytest.mark.parametrize("batch_size", [None, 1, 3, 4, 7, 12, 50])
def test_equals_vmap(batch_size):
    args = _arguments(12)
    expected, values = jax.vmap(_function)(*args), batched_map(_function, batch_size)(*args)
    assert jax.tree.structure(values) == jax.tree.structure(expected)
    for value, wanted in zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True):
        assert value.shape == wanted.shape and value.dtype == wanted.dtype
        np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_size", [3, 5])
def test_gradient_equals_that_of_vmap(batch_size):
    point, scale = _arguments(12)

    def loss(scale, size):
        return jnp.sum(batched_map(_function, size)(point, scale)["sum"] ** 2)

    gradient = jax.grad(loss)
    np.testing.assert_allclose(gradient(scale, batch_size), gradient(scale, None), rtol=1e-5, atol=1e-6)


def test_function_sees_one_batch_at_a_time():
    """The traced program holds the function for a batch of 3 and for the remaining 2, and never for all 8."""
    program = str(jax.make_jaxpr(batched_map(jnp.sin, 3))(jnp.ones((8, 5))))
    assert set(re.findall(r"f32(\[[\d,]*\]) = sin", program)) == {"[3,5]", "[2,5]"}


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, "4"])
def test_bad_batch_size_raises(batch_size):
    with pytest.raises(ValueError, match=r"^batch_size must be a positive integer or None, got"):
        batched_map(jnp.sin, batch_size)
