"""The page of a report: one file that opens anywhere, with its pictures inside."""

import base64
import html
import json
from pathlib import Path
from typing import Any

from smcdiff.report.text import rows

__all__ = ["render"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62em; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1.15em; margin-top: 2em; }
img { max-width: 100%; height: auto; } figure { margin: 0; } figcaption { color: #555; font-size: .9em; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(17em, 1fr)); gap: 1em; }
.wide { margin: 1em 0; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: .3em .8em .3em 0;
       border-bottom: 1px solid #ddd; } th { font-weight: 600; white-space: pre; } td.note { color: #555; }
.status { border-left: .4em solid #0072B2; background: #eef5fa; padding: .6em 1em; }
.status.bad { border-color: #D55E00; background: #fdf1e8; }
pre { background: #f6f6f6; padding: .8em 1em; overflow-x: auto; font-size: .9em; }
"""

_CAPTIONS = {
    "overview": "All at a glance.",
    "truth": "The image that was measured. The sampler never sees it.",
    "measurement": "What the sampler sees. Pixels in light blue were hidden.",
    "posterior_mean": "Average over the weighted particles of all chains. An average of sharp images is blurred.",
    "posterior_std": "How uncertain each pixel is.",
    "interval_width": "From quantile to quantile of each pixel by itself.",
    "residual": "What the mean leaves unexplained of the measurement. It should look like noise, between −2 and 2.",
    "draws": "Eight draws by weight, not selected. Draws that are equal are one particle.",
    "ess": "Number of equally weighted particles that the weights are worth, by step, for each chain.",
}

_HOW_TO_READ = """
<p>The image is the unknown <i>x</i>, the measurement is <i>y = A x + noise</i> with Gaussian noise of known deviation,
and a pretrained diffusion model is the prior. Sequential Monte Carlo (the twisted diffusion sampler, arXiv 2306.17775)
moves weighted particles from noise to images so that at the end they stand for <i>p(x | y)</i>. Chains are independent
runs with the same settings.</p>
<ul>
<li><b>The draws are the result.</b> Each is an image that the prior finds plausible and that agrees with the
measurement. Where they differ, the measurement and the prior leave it open; the mean shows none of these images.</li>
<li><b>Means, deviations, intervals and the draws above</b> pool all chains, each weighed by its estimate of the
evidence. R-hat and bulk ESS compare the chains with equally weighted draws of each, as they are in the data file.</li>
<li><b>Do the chains agree?</b> Look at the spread of the log evidence and at R-hat before anything else. If they
disagree, the uncertainty shown is too small and the error of the evidence is unknown; a low effective sample size
says where the particles were lost. Bulk ESS counts draws as if they were independent within a chain; particles that
share an ancestor are not, so that it is an upper bound.</li>
<li><b>Coverage of one image is no test of calibration.</b> The pixels of an image depend on each other: on one image
90 % intervals may cover 70 % or 100 % of the pixels and be right. Repeat over many images to judge it. The truth
counts as covered within half a grey level, since it is known no better than that.</li>
<li><b>The posterior is that of this prior.</b> A truth that the model would hardly ever make is not found, however many
particles there are; and the reverse process runs in a finite number of steps, so that compare results at twice the
number of steps.</li>
<li><b>The log evidence</b> is a log density of the measurement. It compares models on the same measurement; its value
depends on the units and on the number of pixels measured.</li>
</ul>
"""


def render(
    title: str,
    summary: dict[str, Any],
    pictures: dict[str, Path],
    data_file: str,
    source: str | None = None,
) -> str:
    """The page.

    Parameters
    ----------
    title
        Heading.
    summary
        Figures, warnings, settings and versions, as `smcdiff.report.write_report` returns them.
    pictures
        PNG files by name.
    data_file
        Name of the file with the samples.
    source
        Python code that gives the same numbers.

    Returns
    -------
    HTML without any link to another file or address.
    """
    images = {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    single = [name for name in images if name not in ("overview", "draws", "ess")]
    code = f"<h2>The same from Python</h2>\n<pre>{html.escape(source)}</pre>" if source else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{_status(summary)}
<div class="wide">{_figure("overview", images)}</div>
<h2>Figures</h2>
{_summary_table(summary)}
<h2>Posterior draws</h2>
<div class="wide">{_figure("draws", images)}</div>
<h2>Pixel by pixel</h2>
<div class="pictures">
{chr(10).join(_figure(name, images) for name in single)}
</div>
<h2>The run</h2>
<div class="wide">{_figure("ess", images)}</div>
<h2>Chains compared</h2>
{_quantities_table(summary)}
<h2>How to read this</h2>
{_HOW_TO_READ}
<h2>Settings</h2>
{_pairs_table(summary.get("settings", {}))}
<h2>Versions</h2>
{_pairs_table(summary.get("versions", {}))}
{code}
<h2>Files</h2>
<p>Beside this page: the samples for ArviZ in <code>{html.escape(data_file)}</code> (groups posterior, sample_stats,
observed_data, constant_data and smc, the weighted history by step), the figures in <code>summary.json</code>, and each
picture as a PNG.</p>
</body>
</html>
"""


def _status(summary):
    warnings = summary.get("warnings", [])
    if not warnings:
        return (
            '<p class="status">Valid: all weights were finite, and no figure below calls for a warning.</p>'
        )
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in warnings)
    head = "The weights are valid, but:" if summary["valid"] else "This result is not valid."
    return f'<div class="status bad">{head}<ul>{items}</ul></div>'


def _figure(name, images):
    source, alternative = f"data:image/png;base64,{images[name]}", name.replace("_", " ")
    caption = html.escape(_CAPTIONS[name])
    return f'<figure><img src="{source}" alt="{alternative}"><figcaption>{caption}</figcaption></figure>'


def _summary_table(summary):
    body = "".join(
        f"<tr><th>{html.escape(row.label)}</th><td>{html.escape(row.value)}</td>"
        f'<td class="note">{html.escape(row.meaning)}</td></tr>'
        for row in rows(summary)
    )
    return f"<table>{body}</table>"


def _quantities_table(summary):
    head = "<tr><th>scalar</th><th>mean</th><th>sd</th><th>R-hat</th><th>bulk ESS</th></tr>"
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(
            f"<td>{'–' if entry[key] is None else format(entry[key], spec)}</td>"
            for key, spec in (("mean", ".3f"), ("sd", ".3f"), ("rhat", ".3f"), ("ess_bulk", ".0f"))
        )
        + "</tr>"
        for name, entry in summary["quantities"].items()
    )
    return f"<table>{head}{body}</table>"


def _pairs_table(pairs):
    def text(value):
        return value if isinstance(value, str) else json.dumps(value)

    body = "".join(
        f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(text(value))}</td></tr>"
        for key, value in pairs.items()
    )
    return f"<table>{body}</table>"
