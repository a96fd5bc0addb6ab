"""The operators of the algebra: ``a * b`` is `product`, ``a ** beta`` is `temper`."""

from typing import TYPE_CHECKING, Any

from smcdiff.density import ScheduledPath

if TYPE_CHECKING:
    from smcdiff.compose.weighted import Composition, Exponent

__all__ = ["Composable"]


class Composable:
    """Gives a density path the operators ``*`` and ``**``; derive from it and from `equinox.Module`."""

    def __mul__(self: ScheduledPath, other: Any) -> "Composition":
        """The product of two densities, as `smcdiff.compose.product`."""
        if not isinstance(other, ScheduledPath):
            return NotImplemented
        from smcdiff.compose.algebra import product  # a composition is itself Composable

        return product(self, other)

    def __pow__(self: ScheduledPath, beta: "Exponent") -> "Composition":
        """A power of the density, as `smcdiff.compose.temper`."""
        from smcdiff.compose.algebra import temper

        return temper(self, beta)
