"""Which outputs of a function depend on its input: a walk along its program that knows no operation by name.

An output of an operation counts as dependent when any of its inputs is, so that the answer errs only towards "depends".
"""

from collections.abc import Callable

import jax
from jax.extend import core
from jaxtyping import PyTree

__all__ = ["depends_on_input"]


def depends_on_input(function: Callable[[PyTree], PyTree], value: PyTree) -> PyTree:
    """Whether each array of ``function(value)`` may depend on ``value``.

    Parameters
    ----------
    function
        Function of one pytree of arrays that JAX can trace.
    value
        Its input, of which only shapes and dtypes matter.

    Returns
    -------
    A pytree like the output of ``function``, of bools.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(value)
    dependent = _walk(program.jaxpr, [True] * len(program.jaxpr.invars))
    return jax.tree.unflatten(jax.tree.structure(shapes), dependent)


def _walk(program, inputs):
    """For each output of a program, whether it depends on those of its inputs that are marked."""
    marked = {variable for variable, mark in zip(program.invars, inputs, strict=True) if mark}

    def is_marked(atom):
        return not isinstance(atom, core.Literal) and atom in marked

    for equation in program.eqns:
        marks = [is_marked(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr")
        if (
            isinstance(inner, core.ClosedJaxpr)
            and len(inner.jaxpr.invars) == len(marks)
            and _is_call(equation)
        ):
            outputs = _walk(inner.jaxpr, marks)
        else:
            outputs = [any(marks)] * len(equation.outvars)
        marked.update(variable for variable, mark in zip(equation.outvars, outputs, strict=True) if mark)
    return [is_marked(atom) for atom in program.outvars]


def _is_call(equation):
    """Whether the operation runs its inner program once, on its own inputs: not a loop, whose outputs feed back."""
    return equation.primitive.name in ("pjit", "jit", "closed_call", "remat", "checkpoint")
