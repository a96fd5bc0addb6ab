"""The tables of the documentation, from the committed results.

Command: ``python -m benchmarks table > docs/benchmarks_table.md``. The same results give the same text, byte by byte.
"""

import json
from pathlib import Path

from benchmarks.common import RESULTS, format_table

__all__ = ["main", "render", "render_all"]


def render(result: dict) -> str:
    """Markdown of one result: title, circumstances, summary, bars."""
    machine, versions, wall = result["machine"], result["versions"], result["wall_s"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    parts = [
        f"## {result.get('title', result['benchmark'])}",
        f"`python -m benchmarks {result['benchmark']}` on {result['date']}: {machine['cpu_count']} CPU cores, "
        f"device {machine['device']}; {wall['total']:.0f} s, of which {wall['compile']:.0f} s compiling; "
        f"{wall['cpu']:.0f} s of processor time. {packages}.",
    ]
    if result.get("note"):
        parts.append(result["note"])
    if result["summary"]:
        parts.append(format_table(result["summary"]))
    if result["bars"]:
        records = [
            {
                "bar": entry["bar"],
                "value": entry["value"],
                "required": f"{'≥' if entry.get('at_least') else '≤'} {entry['limit']:g}",
                "met": entry["passed"],
            }
            for entry in result["bars"]
        ]
        parts.append(format_table(records))
    return "\n\n".join(parts) + "\n"


def render_all(folder: Path = RESULTS) -> str:
    """Markdown of all results in ``folder``, by file name."""
    return "\n".join(render(json.loads(path.read_text())) for path in sorted(folder.glob("*.json")))


def main() -> None:
    """Print the tables."""
    print(render_all(), end="")
