"""NumPyro models with Gaussian and mixture diffusions, shared by the tests of `smcdiff.ppl`."""

import functools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers

import smcdiff
from smcdiff import analytic, schedules
from smcdiff.ppl import DiffusionPrior

A = np.array([[1.0, -0.6], [0.3, 0.8]], np.float32)
Y = np.array([1.7, -0.2], np.float32)
COVARIANCE = np.array([[1.1, 0.4], [0.4, 0.6]])


@functools.cache
def gaussian():
    return smcdiff.GaussianDiffusion(np.array([0.6, -0.8]), COVARIANCE, schedules.cosine())


@functools.cache
def gaussian_1d():
    return smcdiff.GaussianDiffusion(np.array([0.6]), np.array([[0.7]]), schedules.cosine())


@functools.cache
def mixture():
    return analytic.GaussianMixtureDiffusion.create(
        jnp.array([0.7, 0.3]), jnp.array([[-1.5, 0.5], [1.0, -1.0]]), jnp.asarray(COVARIANCE), schedules.vp()
    )


def network():
    """A model with scores and no density."""
    return smcdiff.Diffusion({"gain": jnp.array(0.3)}, _apply, schedules.vp(), "eps", (2,))


def _apply(params, x, t):
    return params["gain"] * x


def linear(diffusion, matrix, y):
    gain = numpyro.sample("gain", dist.Normal(1.0, 0.3))
    noise = numpyro.sample("noise", dist.LogNormal(-0.5, 0.4))
    x = numpyro.sample("x", DiffusionPrior(diffusion))
    numpyro.deterministic("signal", gain * (matrix @ x))
    numpyro.sample("y", dist.Normal(gain * (matrix @ x), noise).to_event(1), obs=y)


def correlated(diffusion, matrix, y):
    x = numpyro.sample("x", DiffusionPrior(diffusion))
    numpyro.sample("y", dist.MultivariateNormal(matrix @ x, jnp.asarray(COVARIANCE, x.dtype)), obs=y)


def weighted(diffusion, matrix, y):
    x = numpyro.sample("x", DiffusionPrior(diffusion))
    with handlers.scale(scale=4.0):
        numpyro.sample("y", dist.Normal(matrix @ x, 0.5).to_event(1), obs=y)


LINEAR = {"linear": linear, "correlated": correlated, "weighted": weighted}


def counts(diffusion, y, squares):
    shift = numpyro.sample("shift", dist.Normal(0.0, 0.5))
    x = numpyro.sample("x", DiffusionPrior(diffusion))[0]
    with numpyro.plate("counts", len(y)):
        numpyro.sample("y", dist.Poisson(jnp.exp(0.7 * x + shift)), obs=y)
    numpyro.sample("square", dist.Normal(x**2 + shift, 0.8), obs=squares)


COUNTS = np.array([2, 0, 3, 1]), np.array(1.3, np.float32)


def copies(diffusion, y):
    """Two unknown samples under a plate, each with a measurement."""
    with numpyro.plate("copy", 2):
        x = numpyro.sample("x", DiffusionPrior(diffusion))
        numpyro.sample("y", dist.Normal(x, 0.6).to_event(1), obs=y)
