"""The figures of a report in words: one row each, for the terminal and for the page."""

from typing import Any, NamedTuple

__all__ = ["Row", "as_text", "rows"]


class Row(NamedTuple):
    """One figure.

    Attributes
    ----------
    label
        What it is.
    value
        The figure with its units.
    meaning
        How to read it.
    """

    label: str
    value: str
    meaning: str


def rows(summary: dict[str, Any]) -> list[Row]:
    """The figures of a summary, most important first.

    Parameters
    ----------
    summary
        From `smcdiff.report.write_report` or `smcdiff.report.summarise`.
    """
    evidence, ess, cover = summary["log_evidence"], summary["ess"], summary["coverage"]
    chains, particles = len(evidence["chains"]), ess["num_particles"]
    spread = f", standard error {_number(evidence['standard_error'], '.2g')}" if chains > 1 else ""
    found = [
        Row(
            "result",
            "valid" if summary["valid"] else "NOT VALID",
            "whether all weights were finite in every chain",
        ),
        Row(
            "log evidence",
            f"{_number(evidence['pooled'], '.2f')} nats",
            "log p(y | model), from the mean of the chains' unbiased estimates of p(y | model)",
        ),
        Row(
            "  over chains",
            f"mean {_number(evidence['mean'], '.2f')}, sd {_number(evidence['sd'], '.2f')}{spread} ({chains} chains)",
            "chains that differ by more than about one nat have not converged, and one of them outweighs the others",
        ),
        Row(
            "min ESS",
            f"{_number(ess['minimum'], '.1f')} of {particles} particles (step {ess['minimum_at_step']})",
            "smallest effective sample size at any step in any chain",
        ),
        Row(
            "pooled ESS",
            f"{_number(ess['pooled'], '.1f')} of {particles * chains} particles",
            "of the final weights over all chains; an upper bound for averages, as particles share ancestors",
        ),
        Row(
            "R-hat",
            _range(summary, "rhat", ".3f"),
            "agreement of the chains, 1 is best; worst of the scalars below",
        ),
        Row(
            "bulk ESS",
            _range(summary, "ess_bulk", ".0f"),
            f"of {particles * chains} equally weighted draws; smallest of the scalars below",
        ),
        Row(
            "PSNR of the mean",
            f"{_number(summary['psnr']['image'], '.1f')} dB, on unobserved pixels "
            f"{_number(summary['psnr']['unobserved'], '.1f')} dB",
            "closeness of the posterior mean to the truth; higher is closer",
        ),
        Row(
            f"coverage of {100 * cover['level']:.0f} %",
            f"{_number(cover['fraction'], '.1%')} of {cover['num_pixels']} unobserved pixels, "
            f"{_number(cover['fraction_uncertain'], '.1%')} of the {cover['num_uncertain']} that are uncertain",
            "share of pixels whose truth lies in its interval, of all and of those whose interval is wider than 5 % of "
            "the range; of one image, whose pixels are not independent",
        ),
        Row(
            "residual",
            f"{_number(summary['residual_rms'], '.2f')} noise deviations ({summary['num_measurements']} measurements)",
            "root mean square of y - A mean; much above 1 the posterior does not explain the measurement",
        ),
    ]
    if "time" in summary:
        time = summary["time"]
        found.append(
            Row(
                "sampling time",
                f"{time['total']:.1f} s = {time['compile']:.1f} s compiling + {time['run']:.1f} s running",
                "wall time; compilation is saved when the same shapes are run again in one process",
            )
        )
    return found


def as_text(summary: dict[str, Any]) -> str:
    """The figures and the warnings of a summary as lines for a terminal.

    Parameters
    ----------
    summary
        From `smcdiff.report.write_report`.
    """
    table = rows(summary)
    width = max(len(row.label) for row in table)
    lines = [f"{row.label:<{width}}  {row.value}" for row in table]
    return "\n".join([*lines, *(f"warning: {sentence}" for sentence in summary.get("warnings", []))])


def _number(value, format_spec):
    return "not available" if value is None else format(value, format_spec)


def _range(summary, name, format_spec):
    """The worst of the scalars, and which one it is."""
    choose = max if name == "rhat" else min
    known = {label: entry[name] for label, entry in summary["quantities"].items() if entry[name] is not None}
    if not known:
        return "not available"
    worst = choose(known, key=known.__getitem__)
    return f"{known[worst]:{format_spec}} ({worst})"
