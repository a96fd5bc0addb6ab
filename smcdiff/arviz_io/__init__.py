"""The parts of `smcdiff.to_arviz` and `smcdiff.from_arviz`."""

__all__: list[str] = []
