"""How the outputs of a traced program depend on some of its inputs: not, affinely, smoothly, or in another way.

A walk over the equations of a jaxpr, from the inputs to the outputs. What an equation does with the inputs in question
is not looked up by its name: its derivative is traced, and the walk asks on what the derivative depends.

* An output is *affine* in the inputs if the derivative of every equation on the way does not depend on the point at
  which it is taken. A derivative that is zero by construction, as of a comparison, of rounding or of a stopped
  gradient, says nothing about the equation, which then counts as *other*. Affine functions of affine values are affine;
  one that is written as a difference of others, as (x + 1)^2 - x^2, goes unseen.
* It is *smooth* if no equation of its derivatives is such a step either: a composition of analytic functions. Two such
  functions that agree at random points agree everywhere, almost surely, so that `is_proportional` may test what it
  claims with numbers. Every number that is not written in the program is drawn at random for that.

Calls are inlined and loops of a fixed length are walked to their fixed point; other loops and branches are opaque.
"""

import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import PyTree

__all__ = ["Dependence", "depends_on_input", "inlined", "is_proportional", "reached", "walk"]

_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
)
_NUM_PROBES = 32
_WIDTH = 12.0  # logarithms of probes lie within it


class Dependence(enum.IntEnum):
    """In which way a value depends on the inputs in question; a greater one includes the smaller ones."""

    NONE = 0
    AFFINE = 1
    SMOOTH = 2
    OTHER = 3


def inlined(function: Callable, *inputs: Any) -> ClosedJaxpr:
    """The jaxpr of a function of flat ``inputs``, arrays or their shapes, without the calls in it."""
    closed = jax.make_jaxpr(function)(*inputs)
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    return jax.make_jaxpr(lambda *values: _evaluate(closed.jaxpr, closed.consts, values))(*avals)


def reached(closed: ClosedJaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs depend on those inputs at all."""
    return _reaches(closed, inputs)[0]


def depends_on_input(function: Callable[[PyTree], PyTree], value: PyTree) -> PyTree:
    """For each array of ``function(value)``, whether it may depend on ``value``: a pytree of bools like the output."""
    leaves, layout = jax.tree.flatten(value)
    structures = []

    def flat(*leaves):
        outputs, structure = jax.tree.flatten(function(jax.tree.unflatten(layout, leaves)))
        structures.append(structure)
        return outputs

    marks = reached(inlined(flat, *leaves), [True] * len(leaves))
    return jax.tree.unflatten(structures[0], marks)


def walk(closed: ClosedJaxpr, inputs: Sequence[Dependence], known: dict | None = None) -> list[Dependence]:
    """How the outputs depend on the inputs in question.

    Parameters
    ----------
    closed
        From `inlined`.
    inputs
        AFFINE for the inputs in question, which are taken jointly, NONE for the others.
    known
        What is known of the equations, kept between walks of one jaxpr.
    """
    known = {} if known is None else known
    env = dict.fromkeys(closed.jaxpr.constvars, Dependence.NONE)
    env |= dict(zip(closed.jaxpr.invars, inputs, strict=True))
    for eqn in closed.jaxpr.eqns:
        given = [Dependence.NONE if isinstance(v, Literal) else env[v] for v in eqn.invars]
        key = (id(eqn), *given)
        known[key] = known[key] if key in known else _through(eqn, given)
        env |= dict(zip(eqn.outvars, known[key], strict=True))
    return [Dependence.NONE if isinstance(v, Literal) else env[v] for v in closed.jaxpr.outvars]


def is_proportional(closed: ClosedJaxpr, source: int, output: int, *, factor_one: bool = False) -> bool:
    """Whether every element of a smooth output is a multiple of one element of a positive input.

    The factors may depend on the other inputs. For a function h of elementwise products, sums and 1, that is
    h(u) h(w) = h(u w) h(1) and h(u) + h(w) = h(u + w).

    Parameters
    ----------
    closed
        From `inlined`; its output number ``output`` depends at most smoothly on its input number ``source``.
    factor_one
        Whether h(1) = 1 is asked for too: the elements of the output are elements of the input.
    """
    aval = closed.jaxpr.invars[source].aval
    u, w = np.exp(np.random.default_rng(0).uniform(-_WIDTH, _WIDTH, (2, _NUM_PROBES, *aval.shape))).astype(
        aval.dtype
    )
    function = jax.jit(jax.vmap(lambda value, probe: _scrambled(closed, source, output, value, probe)))
    of_u, of_w, of_product, of_sum, of_one = (
        np.asarray(function(value, np.arange(_NUM_PROBES)), float)
        for value in (u, w, u * w, u + w, np.ones_like(u))
    )
    with np.errstate(all="ignore"):
        pairs = [(of_u * of_w, of_product * of_one), (of_u + of_w, of_sum)]
    if factor_one:
        pairs.append((of_one, np.ones_like(of_one)))
    return all(_agree(*pair) for pair in pairs)


# The walk -------------------------------------------------------------------------------------------------------------


def _evaluate(jaxpr, consts, inputs):
    """The outputs of a jaxpr, with calls replaced by what they call."""
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        callee = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in _CALLS and callee is not None:
            outputs = _evaluate(getattr(callee, "jaxpr", callee), getattr(callee, "consts", ()), values)
        else:
            outputs = _bind(eqn, values)
        env |= dict(zip(eqn.outvars, outputs, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def _bind(eqn, values):
    params = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = params if isinstance(params, tuple) else ((), params)  # a pair until JAX 0.9
    outputs = eqn.primitive.bind(*subfuns, *values, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def _through(eqn, given):
    """How the outputs of an equation depend on the inputs in question, given how its own inputs do."""
    worst = max(given, default=Dependence.NONE)
    if worst == Dependence.NONE or worst == Dependence.OTHER:
        return [worst] * len(eqn.outvars)
    if eqn.primitive.name == "scan":
        return _through_scan(eqn, given)
    rules = _derivative(eqn, [flow != Dependence.NONE for flow in given])
    return [max(rule, worst) for rule in rules]


def _scan_sizes(params):
    """Numbers of constants and of carried values of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # since JAX 0.12
    return len(list(consts)), len(list(carry))


def _through_scan(eqn, given):
    num_consts, num_carry = _scan_sizes(eqn.params)
    body = eqn.params["jaxpr"]
    body = inlined(lambda *values: _evaluate(body.jaxpr, body.consts, values), *body.in_avals)
    given = list(given)
    while True:
        outputs = walk(body, given)
        carry = slice(num_consts, num_consts + num_carry)
        joined = [max(pair) for pair in zip(given[carry], outputs[:num_carry], strict=True)]
        if joined == given[carry]:
            return joined + outputs[num_carry:]
        given[carry] = joined


def _derivative(eqn: Any, moving: Sequence[bool], order: int = 1) -> list[Dependence]:
    """Of an equation whose inputs ``moving`` move: AFFINE, SMOOTH or OTHER for each output."""
    avals = [
        v.val if isinstance(v, Literal) else jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
        for v in eqn.invars
    ]
    points = [aval for aval, moves in zip(avals, moving, strict=True) if moves]
    others = [aval for aval, moves in zip(avals, moving, strict=True) if not moves]

    def derivative(points, directions, others):
        def function(*points):
            sources = {True: iter(points), False: iter(others)}
            return _bind(eqn, [next(sources[moves]) for moves in moving])

        return jax.jvp(function, points, directions)[1]

    num = len(points)
    try:
        closed = inlined(
            lambda *flat: derivative(flat[:num], flat[num : 2 * num], flat[2 * num :]),
            *points,
            *points,
            *others,
        )
    except (NotImplementedError, ValueError, TypeError):  # no derivative
        return [Dependence.OTHER] * len(eqn.outvars)
    rest = [False] * len(others)
    along = _reaches(closed, [False] * num + [True] * num + rest)[0]
    at, used = _reaches(closed, [True] * num + [False] * num + rest)
    found = []
    for aval, is_along, is_at in zip(closed.out_avals, along, at, strict=True):
        if not jnp.issubdtype(aval.dtype, jnp.inexact) or not is_along:
            found.append(Dependence.OTHER)
        elif not is_at:
            found.append(Dependence.AFFINE)
        else:
            is_smooth = order == 0 or all(
                max(_derivative(step, moves, order - 1)) < Dependence.OTHER for step, moves in used
            )
            found.append(Dependence.SMOOTH if is_smooth else Dependence.OTHER)
    return found


def _reaches(closed, inputs):
    """Which outputs depend on the inputs at all; and the equations that do, with which of their inputs."""
    env = dict.fromkeys(closed.jaxpr.constvars, False) | dict(zip(closed.jaxpr.invars, inputs, strict=True))
    used = []
    for eqn in closed.jaxpr.eqns:
        moving = [not isinstance(v, Literal) and env[v] for v in eqn.invars]
        env |= dict.fromkeys(eqn.outvars, any(moving))
        if any(moving):
            used.append((eqn, moving))
    return [not isinstance(v, Literal) and env[v] for v in closed.jaxpr.outvars], used


# Tests with numbers ---------------------------------------------------------------------------------------------------


def _agree(left, right):
    """Whether all numbers agree. A NaN is what an index beyond its axis gives, as some of the random ones are."""
    is_nan = np.isnan(left) & np.isnan(right)
    return bool(np.all(is_nan | np.isclose(left, right, rtol=1e-3, atol=0.0)) and not np.all(is_nan))


def _scrambled(closed, source, output, value, probe):
    """An output as a function of one input, with random numbers for all that the program does not say.

    ``probe`` counts the draws of those numbers.
    """
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True)) | {
        closed.jaxpr.invars[source]: value
    }
    moving, drawn, rng = {closed.jaxpr.invars[source]}, {}, np.random.default_rng(1)

    def read(v):
        if isinstance(v, Literal):
            return v.val
        if v not in known and v not in drawn:
            drawn[v] = jnp.asarray(_any_values(rng, v.aval))[probe]
        return known[v] if v in known else drawn[v]

    for eqn in closed.jaxpr.eqns:
        names = [v for v in eqn.invars if not isinstance(v, Literal)]
        if moving.intersection(names):
            moving.update(eqn.outvars)
        elif not all(v in known for v in names):
            continue
        known |= dict(zip(eqn.outvars, _bind(eqn, [read(v) for v in eqn.invars]), strict=True))
    return read(closed.jaxpr.outvars[output])


def _any_values(rng, aval):
    shape = (_NUM_PROBES, *aval.shape)
    if jnp.issubdtype(aval.dtype, jnp.inexact):
        return rng.uniform(0.5, 1.5, shape).astype(aval.dtype)
    return rng.integers(0, 2 if aval.dtype == bool else 4, shape).astype(aval.dtype)
