"""Measurement operators, noise and inverse problems: one row in OPERATORS brings every property test."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from smcdiff.inverse import (
    GaussianNoise,
    InverseProblem,
    LinearOperator,
    blur,
    crop_box,
    dense,
    downsample,
    gaussian_blur,
    identity,
    linear,
    mask,
    random_mask,
    simulate_problem,
)

IMAGE = (2, 6, 8)  # all sizes differ, so that exchanged axes fail


def _normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _mask(seed):
    observed = np.zeros(math.prod(IMAGE), bool)
    observed[np.random.default_rng(seed).permutation(observed.size)[:17]] = True
    return mask(observed.reshape(IMAGE))


def _cumulative(weights, x):
    return jnp.cumsum(weights.astype(x.dtype) * x, axis=-1)[:, 1:]


def _linear(seed):
    return linear(jax.tree_util.Partial(_cumulative, jnp.asarray(_normal(seed, (3, 4)))), (3, 4), (3, 3))


# name -> function of a seed that builds an operator: same kind and shapes for every seed, other leaves.
OPERATORS = {
    "mask": _mask,
    "crop_box": lambda seed: crop_box(IMAGE, 1 + seed, 2 + seed, 3, 4),
    "random_mask": lambda seed: random_mask(jax.random.key(seed), IMAGE, 20),
    "blur": lambda seed: blur(_normal(seed, (3, 5)), IMAGE),
    "blur_larger_than_image": lambda seed: blur(_normal(seed, (9, 7)), (4, 5)),
    "gaussian_blur": lambda seed: gaussian_blur(IMAGE, 0.8 + 0.1 * seed, size=5),
    "downsample": lambda seed: downsample((2, 6, 9), 3),
    "dense": lambda seed: dense(_normal(seed, (7, 12)), (3, 4)),
    "linear": _linear,
    "linear_of_a_function": lambda seed: linear(jnp.transpose, (3, 4)),
    "identity": lambda seed: identity(IMAGE),
    "identity_scalar": lambda seed: identity(()),
}


@pytest.fixture(params=OPERATORS)
def make(request):
    return functools.cache(OPERATORS[request.param])


def _pair(operator, seed=3):
    """An input and an array like a measurement, of normal entries."""
    return _normal(seed, operator.input_shape), _normal(seed + 1, operator.output_shape)


# Compiled once for all tests of an operator; that they agree with the uncompiled calls is a test of its own.
_apply = jax.jit(lambda operator, x: operator.apply(x))
_adjoint = jax.jit(lambda operator, y: operator.adjoint(y))
_matrix = jax.jit(lambda operator: operator.matrix())
_vjp = jax.jit(lambda operator, x, y: jax.vjp(operator.apply, x)[1](y)[0])
_adjoint_vjp = jax.jit(lambda operator, y, x: jax.vjp(operator.adjoint, y)[1](x)[0])

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def test_operator_adjointness(make):
    operator = make(0)
    x, y = _pair(operator)
    close(np.vdot(_apply(operator, x), y), np.vdot(x, _adjoint(operator, y)))


def test_operator_adjoint_is_the_transpose_of_autodiff(make):
    operator = make(0)
    x, y = _pair(operator)
    close(_vjp(operator, x, y), _adjoint(operator, y))
    close(_adjoint_vjp(operator, y, x), _apply(operator, x))  # the adjoint can be differentiated in its turn


def test_operator_matrix(make):
    operator = make(0)
    x, y = _pair(operator)
    matrix = np.asarray(_matrix(operator))
    assert matrix.shape == (math.prod(operator.output_shape), math.prod(operator.input_shape))
    close(matrix @ np.ravel(x), np.ravel(_apply(operator, x)))
    close(matrix.T @ np.ravel(y), np.ravel(_adjoint(operator, y)))


def test_operator_linearity(make):
    operator = make(0)
    (x, _), (z, _) = _pair(operator), _pair(operator, seed=8)
    expected = np.float32(2.5) * _apply(operator, x) - _apply(operator, z)
    close(_apply(operator, np.float32(2.5) * x - z), expected)


@pytest.mark.parametrize(
    ("built_in", "dtype"), [("float32", "float32"), ("float32", "float64"), ("float64", "float32")]
)
def test_operator_keeps_shape_and_dtype(make, built_in, dtype):
    with jax.enable_x64(built_in == "float64"):
        operator = make(0)
    with jax.enable_x64("float64" in (built_in, dtype)):
        x, y = (array.astype(dtype) for array in _pair(operator))
        if dtype == "float32":  # the shapes and types that tracing finds are those of the results
            measured, back = jax.eval_shape(operator, x), jax.eval_shape(operator.adjoint, y)
        else:
            measured, back = _apply(operator, x), _adjoint(operator, y)
            # no hidden step in single precision
            np.testing.assert_allclose(np.vdot(measured, y), np.vdot(x, back), rtol=1e-12, atol=1e-12)
    assert (measured.shape, measured.dtype) == (operator.output_shape, dtype)
    assert (back.shape, back.dtype) == (operator.input_shape, dtype)


def test_operator_compiled_is_uncompiled(make):
    operator = make(0)
    x, y = _pair(operator)
    close(_apply(operator, x), operator(x))
    close(_adjoint(operator, y), operator.adjoint(y))


def test_operator_vmap(make):
    operators = [make(0), make(1)]
    pairs = [_pair(operator, seed) for operator, seed in zip(operators, (3, 5), strict=True)]
    xs, ys = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    one = operators[0]
    close(jax.vmap(_apply, (None, 0))(one, xs), np.stack([_apply(one, x) for x in xs]))
    close(jax.vmap(_adjoint, (None, 0))(one, ys), np.stack([_adjoint(one, y) for y in ys]))
    if jax.tree.leaves(one):  # a batch of operators, too
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *operators)
        close(jax.vmap(_apply, (0, None))(stacked, xs[0]), np.stack([_apply(a, xs[0]) for a in operators]))


def test_operator_pytree_round_trip(make):
    operator = make(0)
    x, _ = _pair(operator)
    leaves, treedef = jax.tree.flatten(operator)
    assert all(eqx.is_array(leaf) for leaf in leaves)
    again = jax.tree.unflatten(treedef, leaves)
    assert isinstance(again, LinearOperator)
    close(_apply(again, x), _apply(operator, x))
    jax.tree.unflatten(treedef, [object()] * len(leaves))  # JAX does this; no check may run


def test_operator_new_leaves_do_not_retrace(make):
    traces = []

    @jax.jit
    def project(operator, x):
        traces.append(None)
        return operator.adjoint(operator.apply(x))

    outputs = [project(operator, _pair(operator)[0]) for operator in (make(0), make(1))]
    assert len(traces) == 1
    has_leaves = bool(jax.tree.leaves(make(0)))
    assert has_leaves != np.array_equal(*outputs)  # and the leaves, where there are any, do matter


def test_operator_refuses_another_shape(make):
    operator = make(0)
    operator.check(operator.input_shape)
    with pytest.raises(ValueError, match="event_shape"):
        operator.check((*operator.input_shape, 3))
    with pytest.raises(ValueError, match=r"x must have shape .*vmap"):
        operator.apply(np.zeros((2, *operator.input_shape), np.float32))
    with pytest.raises(ValueError, match=r"y must have shape .*vmap"):
        operator.adjoint(np.zeros((2, *operator.output_shape), np.float32))


def test_mask_is_boolean_indexing():
    observed = np.random.default_rng(0).random(IMAGE) < 0.3
    x = _normal(1, IMAGE)
    np.testing.assert_array_equal(mask(observed).apply(x), x[observed])
    np.testing.assert_array_equal(mask(jnp.asarray(observed)).adjoint(x[observed]), np.where(observed, x, 0))


def test_crop_box_hides_the_box_in_every_channel():
    x = _normal(0, IMAGE)
    operator = crop_box(IMAGE, 1, 3, 2, 4)
    expected = x.copy()
    expected[:, 1:3, 3:7] = 0.0
    np.testing.assert_array_equal(operator.adjoint(operator.apply(x)), expected)


def test_random_mask_draws_without_replacement_also_when_traced():
    masks = jax.vmap(lambda key: random_mask(key, IMAGE, 30))(jax.random.split(jax.random.key(0), 4))
    indices = np.asarray(masks.indices)
    assert indices.shape == (4, 30) and indices.max() < math.prod(IMAGE)
    assert np.all(np.diff(indices, axis=1) > 0)
    assert len({row.tobytes() for row in indices}) == 4


@pytest.mark.parametrize(("kernel_shape", "image"), [((3, 5), IMAGE), ((5, 1), (7, 5)), ((1, 9), (3, 4))])
def test_blur_is_periodic_convolution(kernel_shape, image):
    kernel, x = _normal(0, kernel_shape), _normal(1, image)  # asymmetric: a flipped kernel fails
    expected = [
        scipy.ndimage.convolve(channel, kernel, mode="wrap") for channel in x.reshape(-1, *image[-2:])
    ]
    close(_apply(blur(kernel, image), x), np.reshape(expected, image))


def test_gaussian_blur_is_the_gaussian_filter():
    x = _normal(0, (20, 24))
    expected = scipy.ndimage.gaussian_filter(x.astype(float), 1.3, mode="wrap", radius=6)
    close(_apply(gaussian_blur(x.shape, 1.3), x), expected)  # ceil(4 * 1.3) = 6
    close(_apply(gaussian_blur(x.shape, np.float64(1.3), size=13), x), expected)
    close(jax.jit(lambda width: gaussian_blur(x.shape, width, size=13).apply(x))(1.3), expected)


def test_downsample_is_the_block_mean():
    x = _normal(0, (2, 6, 9))
    close(downsample(x.shape, 3).apply(x), x.reshape(2, 2, 3, 3, 3).mean(axis=(2, 4)))


def test_dense_and_linear_against_numpy():
    matrix, x = _normal(0, (7, 12)), _normal(1, (3, 4))
    close(dense(matrix, (3, 4)).apply(x), matrix @ x.ravel())
    close(dense(matrix, (3, 4)).matrix(), matrix)
    assert dense(np.eye(3, dtype=int), (3,)).apply(jnp.ones(3)).dtype == jnp.float32
    found = linear(lambda x: x[:, ::2], (3, 4))
    assert found.output_shape == (3, 2)
    close(found.apply(x), x[:, ::2])


BAD_OPERATORS = {
    "mask_not_boolean": (lambda: mask(np.ones(3)), "observed must be boolean"),
    "mask_empty": (lambda: mask(np.zeros((2, 2), bool)), "observed"),
    "mask_traced": (
        lambda: jax.jit(lambda o: mask(o).apply(jnp.ones(2)))(np.ones(2, bool)),
        "observed is traced",
    ),
    "crop_outside": (lambda: crop_box(IMAGE, 4, 0, 3, 2), "top=4 and height=3"),
    "crop_negative": (lambda: crop_box(IMAGE, 0, -1, 3, 2), "left=-1"),
    "crop_empty": (lambda: crop_box(IMAGE, 0, 0, 3, 0), "width=0"),
    "crop_all": (lambda: crop_box(IMAGE, 0, 0, 6, 8), "height=6 and width=8"),
    "crop_vector": (lambda: crop_box((5,), 0, 0, 1, 1), "event_shape"),
    "random_none": (lambda: random_mask(jax.random.key(0), IMAGE, 0), "num_observed"),
    "random_too_many": (lambda: random_mask(jax.random.key(0), (3,), 4), "num_observed"),
    "blur_even": (lambda: blur(np.ones((2, 3)), IMAGE), "kernel"),
    "blur_vector": (lambda: blur(np.ones(3), IMAGE), "kernel"),
    "blur_nan": (lambda: blur(np.full((3, 3), np.nan), IMAGE), "kernel must be finite"),
    "blur_complex": (lambda: blur(1j * np.ones((3, 3)), IMAGE), "kernel must be real"),
    "blur_event": (lambda: blur(np.ones((3, 3)), (5,)), "event_shape"),
    "gaussian_width": (lambda: gaussian_blur(IMAGE, 0.0), "width"),
    "gaussian_width_nan": (lambda: gaussian_blur(IMAGE, np.nan), "width"),
    "gaussian_size": (lambda: gaussian_blur(IMAGE, 1.0, size=4), "size must be an odd"),
    "gaussian_traced": (lambda: jax.jit(lambda w: gaussian_blur(IMAGE, w).kernel)(1.0), "size must be given"),
    "downsample_factor": (lambda: downsample(IMAGE, 4), "factor"),
    "downsample_zero": (lambda: downsample(IMAGE, 0), "factor"),
    "downsample_float": (lambda: downsample(IMAGE, 2.0), "factor"),
    "linear_nonlinear": (lambda: linear(jnp.square, (3,)), "matvec must be linear"),
    "linear_affine": (lambda: linear(lambda x: x + 1.0, (3,)), r"matvec\(0\) is not 0"),
    "linear_shape": (lambda: linear(jnp.sum, (3,), (3,)), "output_shape"),
    "dense_columns": (lambda: dense(np.ones((2, 5)), (2, 2)), "matrix must have shape"),
    "dense_infinite": (lambda: dense(np.full((2, 2), np.inf), (2,)), "matrix must be finite"),
    "event_int": (lambda: identity(3), "event_shape"),
    "event_zero": (lambda: identity((3, 0)), "event_shape"),
}


@pytest.mark.parametrize("case", BAD_OPERATORS)
def test_bad_operator_input_raises(case):
    build, message = BAD_OPERATORS[case]
    with pytest.raises(ValueError, match=message):
        build()


STDS = {"scalar": np.float32(0.7), "entrywise": np.linspace(0.2, 1.5, 6, dtype=np.float32).reshape(2, 3)}


@pytest.fixture(params=STDS)
def std(request):
    return STDS[request.param]


def test_log_likelihood_is_the_normal_density(std):
    y, mean = _normal(0, (2, 3)), _normal(1, (2, 3))
    expected = scipy.stats.norm.logpdf(y, mean, std).sum()
    value = GaussianNoise(std).log_likelihood(y, mean)
    assert value.shape == () and value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(
        GaussianNoise(std).variance((2, 3)), np.broadcast_to(std**2, (2, 3)), rtol=1e-6
    )


def test_gradient_of_the_log_likelihood(std):
    operator = dense(_normal(0, (6, 4)), (2, 2))
    problem = InverseProblem(operator, _normal(1, (6,)), np.ravel(std) if np.ndim(std) else std)
    x = _normal(2, (2, 2))
    expected = problem.adjoint(problem.residual(x) / problem.noise.variance((6,)))
    np.testing.assert_allclose(jax.jit(jax.grad(problem.log_likelihood))(x), expected, rtol=1e-4, atol=1e-4)
    close(problem.residual(x), problem.y - np.asarray(operator.entries) @ x.ravel())


def test_simulated_noise_has_the_stated_mean_and_std(std):
    """z-tests of 6 means and chi-square tests of 6 variances; false-fail rate 1e-6 in all for a new key."""
    num = 20_000
    problem = InverseProblem(identity((2, 3)), np.zeros((2, 3)), std)
    x = 10.0 * jnp.asarray(_normal(0, (2, 3)))
    draws = np.asarray(
        jax.vmap(lambda key: problem.simulate(key, x))(jax.random.split(jax.random.key(1), num))
    )
    z = (draws - np.asarray(x)).astype(float) / std
    p_mean = 2 * scipy.stats.norm.sf(np.abs(z.mean(axis=0)) * math.sqrt(num))
    law = scipy.stats.chi2(num)
    total = (z**2).sum(axis=0)
    p_variance = 2 * np.minimum(law.sf(total), law.cdf(total))
    assert min(p_mean.min(), p_variance.min()) > 1e-6 / 12
    correlations = np.corrcoef(z.reshape(num, 6).T)[np.triu_indices(6, 1)]
    assert (2 * scipy.stats.norm.sf(np.abs(correlations) * math.sqrt(num))).min() > 1e-6 / 15


def test_simulate_problem_measures_the_sample():
    x, operator, key = jnp.asarray(_normal(0, IMAGE)), downsample(IMAGE, 2), jax.random.key(2)
    problem = simulate_problem(key, operator, x, 0.1)
    np.testing.assert_array_equal(problem.y, problem.simulate(key, x))
    assert np.abs(problem.residual(x)).max() > 0
    close(simulate_problem(key, operator, x, 1e-6).y, operator.apply(x))
    np.testing.assert_array_equal(problem.with_measurement(2.0 * problem.y).y, 2.0 * problem.y)


def test_noise_from_a_number_or_an_array_shares_a_program():
    traces = []

    @jax.jit
    def likelihood(problem, x):
        traces.append(None)
        return problem.log_likelihood(x)

    y = _normal(0, (4,))
    for noise in (0.1, 2, np.float32(0.3), jnp.float32(0.4), GaussianNoise(0.5)):
        likelihood(InverseProblem(identity((4,)), y, noise), jnp.zeros(4))
    likelihood(InverseProblem(identity((4,)), 2 * y, 0.1), jnp.zeros(4))
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_problem_keeps_the_dtype_of_y(dtype):
    with jax.enable_x64(True):
        y, x = np.ones((4, 5), dtype), np.zeros((4, 5), dtype)
        problem = InverseProblem(blur(_normal(0, (3, 3)), y.shape), y, 0.1)
        given = InverseProblem(identity(y.shape), y, GaussianNoise(0.1))  # whose std is float64 here
        assert problem.y.dtype == problem.noise.std.dtype == given.y.dtype == dtype

        def use(problem, x):
            sample = problem.simulate(jax.random.key(0), x)
            return sample, problem.log_likelihood(x), problem.residual(x), problem.adjoint(problem.y)

        for built in (problem, given):
            assert {array.dtype.name for array in jax.eval_shape(use, built, x)} == {dtype}


def test_problems_can_be_built_and_used_under_vmap():
    operator, xs = identity((3,)), _normal(0, (4, 3))
    keys, stds = jax.random.split(jax.random.key(0), 4), np.asarray([0.1, 0.2, 0.3, 0.4], np.float32)
    problems = jax.jit(jax.vmap(lambda key, x, std: simulate_problem(key, operator, x, std)))(keys, xs, stds)
    values = jax.jit(jax.vmap(lambda problem, x: problem.log_likelihood(x)))(problems, xs)
    for i in range(2):
        alone = simulate_problem(keys[i], operator, xs[i], stds[i])
        close(problems.y[i], alone.y)
        close(values[i], alone.log_likelihood(xs[i]))


BAD_PROBLEMS = {
    "std_zero": (lambda: GaussianNoise(0.0), "std must be .* small positive std"),
    "std_negative": (lambda: GaussianNoise(-1.0), "std must be"),
    "std_nan": (lambda: GaussianNoise(np.nan), "std must be"),
    "std_infinite": (lambda: GaussianNoise(np.inf), "std must be"),
    "std_one_entry_zero": (lambda: GaussianNoise(np.asarray([1.0, 0.0])), "std must be"),
    "std_complex": (lambda: GaussianNoise(1j), "std must be real"),
    "std_shape": (lambda: GaussianNoise(np.ones(2)).sample(jax.random.key(0), jnp.zeros(3)), "std must be"),
    "variance_shape": (lambda: GaussianNoise(np.ones(2)).variance((3,)), "std must be"),
    "mean_shape": (
        lambda: GaussianNoise(1.0).log_likelihood(jnp.zeros(3), jnp.zeros((3, 1))),
        "mean must have",
    ),
    "y_shape": (lambda: InverseProblem(identity((3,)), np.ones(4), 0.1), "y must have"),
    "y_batch": (lambda: InverseProblem(identity((3,)), np.ones((2, 3)), 0.1), "y must have .*vmap"),
    "y_nan": (lambda: InverseProblem(identity((1,)), np.asarray([np.nan]), 0.1), "y must be finite"),
    "y_complex": (lambda: InverseProblem(identity((1,)), np.asarray([1j]), 0.1), "y must be real"),
    "noise_shape": (lambda: InverseProblem(identity((3,)), np.ones(3), np.ones(2)), "noise must have"),
    "noise_zero": (lambda: InverseProblem(identity((3,)), np.ones(3), 0), "std must be"),
    "with_measurement": (
        lambda: InverseProblem(identity((3,)), np.ones(3), 1.0).with_measurement(np.ones(2)),
        "y must have",
    ),
    "x_shape": (lambda: simulate_problem(jax.random.key(0), identity((3,)), jnp.ones(2), 0.1), "x must have"),
}


@pytest.mark.parametrize("case", BAD_PROBLEMS)
def test_bad_problem_input_raises(case):
    build, message = BAD_PROBLEMS[case]
    with pytest.raises(ValueError, match=message):
        build()


def test_a_function_is_no_operator():
    with pytest.raises(TypeError, match="operator must be a LinearOperator"):
        InverseProblem(jnp.sum, np.asarray(1.0), 0.1)
