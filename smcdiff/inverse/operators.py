"""Linear measurement operators A: one real sample x -> its noiseless measurement A x, of the same dtype.

Each operator has its adjoint A*, defined by <A x, y> = <x, A* y> for all x and y:

    mask        (A x)_k = x[i_k], i_1 < i_2 < ... the observed entries in row-major order; A* y fills in zeros
    blur        A x = k * x, periodic: F(A x) = F(k) F(x), and F(A* y) = conj(F(k)) F(y)
    downsample  A x = means of the factor x factor blocks
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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

__all__ = [
    "LinearOperator",
    "blur",
    "crop_box",
    "dense",
    "downsample",
    "gaussian_blur",
    "identity",
    "linear",
    "mask",
    "random_mask",
]


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
        return self._apply(_require_one("x", x, self.input_shape))

    def adjoint(self, y: Float[Array, "*measurement"]) -> Float[Array, "*event"]:
        """A* y for one measurement ``y``; `ValueError` if its shape is not ``output_shape``."""
        return self._adjoint(_require_one("y", y, self.output_shape))

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


class _Mask(LinearOperator):
    indices: Int[Array, " observed"]  # into the flattened sample, increasing

    def _apply(self, x):
        return x.reshape(-1)[self.indices]

    def _adjoint(self, y):
        filled = jnp.zeros(math.prod(self.input_shape), y.dtype).at[self.indices].set(y)
        return filled.reshape(self.input_shape)


class _Blur(LinearOperator):
    # The kernel is kept and not its transform: it takes any dtype of x, and can be differentiated or learned;
    # under vmap over samples it is transformed once.
    kernel: Float[Array, "kh kw"]

    def _transfer(self, dtype):
        rows, cols = (
            (np.arange(size) - size // 2) % length
            for size, length in zip(self.kernel.shape, self.input_shape[-2:], strict=True)
        )
        image = jnp.zeros(self.input_shape[-2:], dtype)
        transfer = jnp.fft.rfft2(image.at[np.ix_(rows, cols)].add(self.kernel.astype(dtype)))
        return transfer.reshape((1,) * (len(self.input_shape) - 2) + transfer.shape)

    def _filter(self, x, transfer):
        return jnp.fft.irfft2(jnp.fft.rfft2(x) * transfer, s=self.input_shape[-2:])

    def _apply(self, x):
        return self._filter(x, self._transfer(x.dtype))

    def _adjoint(self, y):
        return self._filter(y, self._transfer(y.dtype).conj())


class _Downsample(LinearOperator):
    factor: int = eqx.field(static=True)

    def _apply(self, x):
        *lead, height, width = self.output_shape
        return x.reshape(*lead, height, self.factor, width, self.factor).mean(axis=(-3, -1))


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


def mask(observed: Bool[Array, "*event"] | Bool[np.ndarray, "*event"]) -> LinearOperator:
    """Observe some entries of the sample: inpainting.

    Parameters
    ----------
    observed
        Boolean array of the event shape, True where the entry is measured.

    Returns
    -------
    Operator whose measurement is the vector (num_observed,) of the observed entries, in row-major order.

    Raises
    ------
    ValueError
        If ``observed`` is not boolean, has no True, or is traced (the number of observed entries is a shape).
    """
    if isinstance(observed, jax.core.Tracer):
        raise ValueError(
            "observed is traced, but its number of True must be known; build the mask outside jit."
        )
    where = np.asarray(observed)
    if where.dtype != bool:
        raise ValueError(f"observed must be boolean, got dtype {where.dtype}; compare, e.g. `values > 0`.")
    if not where.any():
        raise ValueError(f"observed, of shape {where.shape}, has no True entry and needs at least one.")
    indices = np.flatnonzero(where).astype(np.int32)
    return _Mask(where.shape, indices.shape, jnp.asarray(indices))


def crop_box(event_shape: Sequence[int], top: int, left: int, height: int, width: int) -> LinearOperator:
    """Hide a box of the last two axes, in every channel, and observe everything outside: a `mask`.

    Parameters
    ----------
    event_shape
        Shape of one sample, (..., rows, columns).
    top, left
        Row and column, in pixels, of the first hidden pixel.
    height, width
        Size of the box in pixels.

    Raises
    ------
    ValueError
        If the box is empty, leaves the image, or hides all of it.
    """
    shape = _image_shape(event_shape, 2)
    for start_name, start, size_name, size, length in (
        ("top", top, "height", height, shape[-2]),
        ("left", left, "width", width, shape[-1]),
    ):
        if start < 0 or size < 1 or start + size > length:
            raise ValueError(
                f"{start_name}={start} and {size_name}={size} must give a box inside the image: "
                f"{start_name} >= 0, {size_name} >= 1, and their sum at most {length}, the size of this axis."
            )
    if (height, width) == shape[-2:]:
        raise ValueError(f"height={height} and width={width} hide the whole image; make the box smaller.")
    observed = np.ones(shape, bool)
    observed[..., top : top + height, left : left + width] = False
    return mask(observed)


def random_mask(rng_key: PRNGKeyArray, event_shape: Sequence[int], num_observed: int) -> LinearOperator:
    """Observe ``num_observed`` entries drawn uniformly without replacement: a `mask`.

    Parameters
    ----------
    rng_key
        Random key; it may be traced, so masks can be drawn inside compiled code.
    event_shape
        Shape of one sample; each entry of it (a channel of a pixel, too) is drawn by itself.
    num_observed
        Number of observed entries.

    Raises
    ------
    ValueError
        If ``num_observed`` is not between 1 and the number of entries.
    """
    shape = _image_shape(event_shape, 0)
    if not 1 <= num_observed <= math.prod(shape):
        raise ValueError(f"num_observed must lie between 1 and {math.prod(shape)}, got {num_observed}.")
    indices = jax.random.permutation(rng_key, jnp.arange(math.prod(shape), dtype=jnp.int32))[:num_observed]
    return _Mask(shape, indices.shape, jnp.sort(indices))


def blur(kernel: Float[Array, "kh kw"], event_shape: Sequence[int]) -> LinearOperator:
    """Convolve the last two axes with ``kernel``, periodically; the measurement has the event shape.

    Parameters
    ----------
    kernel
        Weights of odd size (kh, kw), centred:
        (A x)[i, j] = sum_ab kernel[a, b] x[i - a + kh//2, j - b + kw//2], indices modulo the image size.
    event_shape
        Shape of one sample, (..., rows, columns).

    Raises
    ------
    ValueError
        If ``kernel`` is not a finite matrix of odd sizes, or ``event_shape`` has fewer than two axes.
    """
    kernel = _as_real("kernel", kernel)
    if kernel.ndim != 2 or any(size % 2 == 0 for size in kernel.shape):
        raise ValueError(f"kernel must be a matrix of odd sizes, got shape {kernel.shape}; pad by zeros.")
    shape = _image_shape(event_shape, 2)
    return _Blur(shape, shape, kernel)


def gaussian_blur(event_shape: Sequence[int], width: float, size: int | None = None) -> LinearOperator:
    """Blur with a Gaussian kernel whose weights sum to 1: a `blur`.

    Parameters
    ----------
    event_shape
        Shape of one sample, (..., rows, columns).
    width
        Standard deviation of the kernel in pixels, positive.
    size
        Side of the square kernel in pixels, odd; by default it reaches out to 4 widths.

    Raises
    ------
    ValueError
        If ``width`` is not finite and positive, or ``size`` is not odd and positive, or is left out while
        ``width`` is traced.
    """
    traced = isinstance(width, jax.core.Tracer)
    if not traced and not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be finite and positive, in pixels, got {width}; no blur is `identity`.")
    if size is None:
        if traced:
            raise ValueError("size must be given when width is traced: it is a shape.")
        size = 2 * math.ceil(4.0 * width) + 1
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size must be an odd positive number of pixels, got {size}; use {abs(size) | 1}.")
    offsets = jnp.arange(-(size // 2), size // 2 + 1, dtype=float)
    profile = jax.nn.softmax(-0.5 * (offsets / jnp.asarray(width, float)) ** 2)
    return blur(jnp.outer(profile, profile), event_shape)


def downsample(event_shape: Sequence[int], factor: int) -> LinearOperator:
    """Average over square blocks of the last two axes: super-resolution.

    Parameters
    ----------
    event_shape
        Shape of one sample, (..., rows, columns).
    factor
        Side of a block in pixels; it must divide both axes.

    Raises
    ------
    ValueError
        If ``factor`` is not a positive integer that divides rows and columns.
    """
    *lead, height, width = shape = _image_shape(event_shape, 2)
    if not isinstance(factor, int | np.integer) or factor < 1 or height % factor or width % factor:
        raise ValueError(f"factor must be an integer that divides {height} and {width}, got {factor!r}.")
    return _Downsample(shape, (*lead, height // factor, width // factor), int(factor))


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
    shape = _image_shape(input_shape, 0, "input_shape")
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
    matrix, shape = _as_real("matrix", matrix), _image_shape(event_shape, 0)
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
    shape = _image_shape(event_shape, 0)
    return _Identity(shape, shape)


def _require_one(name, array, shape):
    array = jnp.asarray(array)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}; use jax.vmap for batches.")
    return array


def _image_shape(shape, min_axes, name="event_shape"):
    """Return ``shape`` as a tuple of ints, or say why it is none."""
    try:
        sizes = tuple(int(size) for size in shape)
    except TypeError:
        raise ValueError(f"{name} must be a tuple of integers, got {shape!r}.") from None
    if len(sizes) < min_axes or any(size < 1 for size in sizes):
        raise ValueError(f"{name} must have at least {min_axes} axes, all of positive size, got {sizes}.")
    return sizes


def _as_real(name, values):
    """Return ``values`` as a real floating-point array, finite wherever that is known."""
    values = jnp.asarray(values)
    if jnp.iscomplexobj(values):
        raise ValueError(f"{name} must be real, got dtype {values.dtype}; stack real and imaginary parts.")
    if not isinstance(values, jax.core.Tracer) and not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be finite, got NaN or infinite entries; replace them.")
    return values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(float)
