"""An inverse problem: a measurement y of an unknown sample x, and its likelihood.

    y = A x + noise,        log p(y | x) = noise.log_likelihood(y, A x)

A diffusion model as the prior of x makes it a posterior: p(x | y) proportional to p(x) p(y | x).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from smcdiff.inverse.noise import GaussianNoise
from smcdiff.inverse.operators import LinearOperator

__all__ = ["InverseProblem", "simulate_problem", "unobserved"]


class InverseProblem(eqx.Module):
    """A measurement with its operator and its noise. All methods act on ONE sample.

    Everything is a pytree leaf, ``y`` too: a compiled sampler serves every measurement of the same shape.

    Parameters
    ----------
    operator
        The measurement operator A.
    y
        The measurement, an array of shape ``operator.output_shape``; its float dtype is kept.
    noise
        `GaussianNoise`, or its standard deviation: a number, or an array of the shape of ``y``.

    Raises
    ------
    TypeError
        If ``operator`` is not a `LinearOperator`.
    ValueError
        If ``y`` has another shape than the operator's output, is complex, or is not finite (values are not
        checked when traced); if ``noise`` does not fit ``y``.
    """

    operator: LinearOperator
    y: Float[Array, "*measurement"]
    noise: GaussianNoise

    def __init__(
        self,
        operator: LinearOperator,
        y: Float[Array, "*measurement"],
        noise: GaussianNoise | Float[Array, "*measurement"] | float,
    ):
        self.operator = operator
        y = jnp.asarray(y)
        if jnp.iscomplexobj(y):
            raise ValueError(f"y must be real, got dtype {y.dtype}; stack real and imaginary parts.")
        self.y = y if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(float)
        self.noise = noise if isinstance(noise, GaussianNoise) else GaussianNoise(_in_dtype_of(self.y, noise))

    def __check_init__(self):
        if not isinstance(self.operator, LinearOperator):
            raise TypeError(
                f"operator must be a LinearOperator, got {type(self.operator).__name__}; "
                "make one of a function by smcdiff.inverse.linear."
            )
        if self.y.shape != self.operator.output_shape:
            raise ValueError(
                f"y must have the operator's output shape {self.operator.output_shape}, got {self.y.shape}; "
                "for several measurements build the problem inside jax.vmap."
            )
        if not isinstance(self.y, jax.core.Tracer) and not np.all(np.isfinite(self.y)):
            raise ValueError("y must be finite, got NaN or infinite entries; mask missing entries out.")
        if self.noise.std.shape not in ((), self.y.shape):
            raise ValueError(
                f"noise must have a scalar std or one of the shape of y, {self.y.shape}, got shape "
                f"{self.noise.std.shape}."
            )

    def log_likelihood(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        """log p(y | x), normalised, in nats."""
        return self.noise.log_likelihood(self.y, self.operator.apply(x))

    def residual(self, x: Float[Array, "*event"]) -> Float[Array, "*measurement"]:
        """y - A x."""
        return self.y - self.operator.apply(x)

    def adjoint(self, y: Float[Array, "*measurement"]) -> Float[Array, "*event"]:
        """A* y, for any ``y`` in the space of measurements."""
        return self.operator.adjoint(y)

    def simulate(self, rng_key: PRNGKeyArray, x: Float[Array, "*event"]) -> Float[Array, "*measurement"]:
        """Draw a new measurement of the sample ``x``."""
        return self.noise.sample(rng_key, self.operator.apply(x))

    def with_measurement(self, y: Float[Array, "*measurement"]) -> "InverseProblem":
        """The same operator and noise with another measurement; checked as at construction."""
        return InverseProblem(self.operator, y, self.noise)


def simulate_problem(
    rng_key: PRNGKeyArray,
    operator: LinearOperator,
    x: Float[Array, "*event"],
    noise: GaussianNoise | Float[Array, "*measurement"] | float,
) -> InverseProblem:
    """Measure a known sample: the problem whose ``y`` is A x plus one draw of the noise.

    Parameters
    ----------
    rng_key
        Random key.
    operator
        The measurement operator A.
    x
        The true sample, of shape ``operator.input_shape``.
    noise
        `GaussianNoise`, or its standard deviation: a number, or an array of the measurement's shape.

    Returns
    -------
    The inverse problem.

    Raises
    ------
    ValueError
        If ``x`` does not fit the operator, or ``noise`` does not fit its output.
    """
    noiseless = InverseProblem(operator, operator.apply(x), noise)
    return noiseless.with_measurement(noiseless.simulate(rng_key, x))


def _in_dtype_of(y, noise):
    """A number takes the dtype of ``y``; whatever else was passed is left to `GaussianNoise`."""
    return jnp.asarray(noise, y.dtype) if isinstance(noise, int | float) else noise


def unobserved(problem: InverseProblem) -> Bool[np.ndarray, "*event"]:
    """Pixels that are not themselves measured: the hidden ones of a mask, all of them for every other operator.

    Parameters
    ----------
    problem
        The inverse problem.

    Returns
    -------
    Boolean array of the event shape.
    """
    shape = problem.operator.input_shape
    kept = np.asarray(problem.adjoint(problem.operator(jnp.ones(shape))))
    # A* A of a mask multiplies by zeros and ones. No other operator of a random image does that.
    image = jax.random.normal(jax.random.key(0), shape)
    is_mask = set(np.unique(kept)) <= {0.0, 1.0} and np.array_equal(
        problem.adjoint(problem.operator(image)), kept * np.asarray(image)
    )
    return kept == 0.0 if is_mask and not kept.all() else np.ones(shape, bool)
