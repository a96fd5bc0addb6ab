"""A model's card in a few lines."""

from typing import Any

__all__ = ["describe_card"]

NOISE_LEVELS = (0.135, 1.0)  # sigma/alpha at which the held-out loss is told


def describe_card(name: str, card: dict[str, Any]) -> str:
    """Name, description, event shape, parameters, held-out loss and licence of a model.

    Parameters
    ----------
    name
        Name of the model.
    card
        Its card, as in `smcdiff.models`. What it lacks is left out.
    """
    loss, data = card.get("denoising_loss", {}), card.get("data", {})
    low, high = card.get("pixel_range", ("?", "?"))
    entries = {
        "event shape": f"{tuple(card['event_shape'])}, pixels from {low} to {high}",
        "parameters": f"{card['num_parameters']:,}" if "num_parameters" in card else None,
        "held-out loss": _loss(loss),
        "trained on": data.get("source"),
        "licence": data.get("licence"),
    }
    lines = [f"  {key:<14} {value}" for key, value in entries.items() if value]
    return "\n".join([name, f"  {card.get('description', '')}".rstrip(), *lines])


def _loss(loss):
    """Mean squared error of the denoiser at a low and a high noise level."""
    levels = loss.get("sigma_over_alpha")
    if not levels:
        return None
    nearest = sorted(
        {min(range(len(levels)), key=lambda i: abs(levels[i] - wanted)) for wanted in NOISE_LEVELS}
    )
    return "denoising mse " + ", ".join(
        f"{loss['mse'][i]:.3g} ± {loss['standard_error'][i]:.1g} at noise {levels[i]:.2g}"
        for i in sorted(nearest, key=lambda i: levels[i])
    )
