"""Linear measurement operators A: one real sample x -> its noiseless measurement A x, of the same dtype.

Each operator has its adjoint A*, defined by <A x, y> = <x, A* y> for all x and y:

    dense       A x = M vec(x);   linear: any linear function;   identity: A x = x

Masks, kernels and matrices are pytree leaves and shapes are static, so a compiled program serves every
operator of the same kind and shapes, and `jax.vmap` runs over stacked operators. For an operator of your
own, call `linear`, or subclass `LinearOperator` and define ``_apply``; ``_adjoint`` comes from transposition
unless you define it too.
"""

import abc
import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["LinearOperator", "as_real", "checked_shape", "dense", "identity", "linear"]


class LinearOperator(eqx.Module):
    """A linear map from one sample of shape ``input_shape`` to a measurement of shape ``output_shape``.

    Parameters
    ----------
    input_shape, output_shape
        Shapes of one sample and of its measurement; static.
    """

    input_shape: tuple[int, ...] = eqx.field(static=True)
    output_shape: tuple[int, ...] = eqx.field(static=True)

    def apply(self, x: Float[Array, "*event"]) -> Float[Array, "*measurement"]:
        """A x for one sample ``x``; `ValueError` if its shape is not ``input_shape``."""
        return self._apply(require_one("x", x, self.input_shape))

    def adjoint(self, y: Float[Array, "*measurement"]) -> Float[Array, "*event"]:
        """A* y for one measurement ``y``; `ValueError` if its shape is not ``output_shape``."""
        return self._adjoint(require_one("y", y, self.output_shape))

    def __call__(self, x: Float[Array, "*event"]) -> Float[Array, "*measurement"]:
        """The same as `apply`."""
        return self.apply(x)

    def matrix(self) -> Float[Array, "outputs inputs"]:
        """The dense matrix of A between row-major vectors; for small problems, it has all its entries."""
        basis = jnp.eye(math.prod(self.input_shape)).reshape(-1, *self.input_shape)
        return jax.vmap(self.apply)(basis).reshape(len(basis), -1).T

    def check(self, event_shape: Sequence[int]) -> None:
        """Raise a `ValueError` unless the operator acts on samples of shape ``event_shape``."""
        if tuple(event_shape) != self.input_shape:
            raise ValueError(
                f"event_shape of the model is {tuple(event_shape)} but the operator acts on samples of shape "
                f"{self.input_shape}; build the operator for the model's event shape."
            )

    @abc.abstractmethod
    def _apply(self, x): ...

    def _adjoint(self, y):
        return jax.linear_transpose(self._apply, jax.ShapeDtypeStruct(self.input_shape, y.dtype))(y)[0]


class _Dense(LinearOperator):
    entries: Float[Array, "outputs inputs"]

    def _apply(self, x):
        return self.entries.astype(x.dtype) @ x.reshape(-1)


class _Linear(LinearOperator):
    matvec: Callable  # a pytree: its arrays are leaves, its function is static

    def _apply(self, x):
        return self.matvec(x)


class _Identity(LinearOperator):
    def _apply(self, x):
        return x


def linear(
    matvec: Callable[[Array], Array], input_shape: Sequence[int], output_shape: Sequence[int] | None = None
) -> LinearOperator:
    """Any linear map given by a function; the adjoint is its transpose.

    Parameters
    ----------
    matvec
        Function of one sample that JAX can transpose. The arrays of a `jax.tree_util.Partial` (or of an
        equinox module) are leaves; a plain function is static, and what it closes over is compiled in.
    input_shape
        Shape of one sample.
    output_shape
        Shape of the measurement, if you want it checked; found by a call of ``matvec`` otherwise.

    Raises
    ------
    ValueError
        If ``matvec`` is seen not to be linear (it cannot be transposed, or matvec(0) is not 0), or returns
        another shape than ``output_shape``.
    """
    if not isinstance(matvec, jax.tree_util.Partial | eqx.Module):
        matvec = jax.tree_util.Partial(matvec)
    shape = checked_shape(input_shape, 0, "input_shape")
    at_zero = matvec(jnp.zeros(shape))
    found = jnp.shape(at_zero)
    if output_shape is not None and tuple(output_shape) != found:
        raise ValueError(f"output_shape is {tuple(output_shape)}, but matvec returns shape {found}.")
    operator = _Linear(shape, found, matvec)
    try:
        jax.eval_shape(operator.adjoint, at_zero)
    except Exception as error:  # which one depends on the operation that has no transpose
        raise ValueError(f"matvec must be linear, but JAX cannot transpose it: {error}") from error
    if not isinstance(at_zero, jax.core.Tracer) and np.any(at_zero):
        raise ValueError("matvec must be linear, but matvec(0) is not 0; subtract the offset from y instead.")
    return operator


def dense(matrix: Float[Array, "outputs inputs"], event_shape: Sequence[int]) -> LinearOperator:
    """A given matrix, applied to the row-major vector of the sample.

    Parameters
    ----------
    matrix
        Array (number of measurements, number of entries of a sample).
    event_shape
        Shape of one sample.

    Raises
    ------
    ValueError
        If ``matrix`` is not a finite matrix with one column for each entry of the sample.
    """
    matrix, shape = as_real("matrix", matrix), checked_shape(event_shape, 0)
    size = math.prod(shape)
    if matrix.ndim != 2 or matrix.shape[1] != size:
        raise ValueError(f"matrix must have shape (any, {size}) for event_shape {shape}, got {matrix.shape}.")
    return _Dense(shape, matrix.shape[:1], matrix)


def identity(event_shape: Sequence[int]) -> LinearOperator:
    """Observe the whole sample: denoising.

    Parameters
    ----------
    event_shape
        Shape of one sample.
    """
    shape = checked_shape(event_shape, 0)
    return _Identity(shape, shape)


def require_one(name, array, shape):
    array = jnp.asarray(array)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}; use jax.vmap for batches.")
    return array


def checked_shape(shape, min_axes, name="event_shape"):
    """Return ``shape`` as a tuple of ints, or say why it is none."""
    try:
        sizes = tuple(int(size) for size in shape)
    except TypeError:
        raise ValueError(f"{name} must be a tuple of integers, got {shape!r}.") from None
    if len(sizes) < min_axes or any(size < 1 for size in sizes):
        raise ValueError(f"{name} must have at least {min_axes} axes, all of positive size, got {sizes}.")
    return sizes


def as_real(name, values):
    """Return ``values`` as a real floating-point array, finite wherever that is known."""
    values = jnp.asarray(values)
    if jnp.iscomplexobj(values):
        raise ValueError(f"{name} must be real, got dtype {values.dtype}; stack real and imaginary parts.")
    if not isinstance(values, jax.core.Tracer) and not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be finite, got NaN or infinite entries; replace them.")
    return values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(float)
