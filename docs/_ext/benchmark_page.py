"""The tables of the benchmarks page, from the committed results; a sentence where there are none."""

import sys
from pathlib import Path

NOTHING = "No results are stored in this checkout. `make bench` runs the benchmarks and writes them.\n"


def tables(root: Path) -> str:
    """Markdown of all results, as ``python -m benchmarks table`` prints them."""
    if not any((root / "benchmarks" / "results").glob("*.json")):
        return NOTHING
    sys.path.insert(0, str(root))
    try:
        from benchmarks.table import render_all
    finally:
        sys.path.pop(0)
    return render_all(root / "benchmarks" / "results")


def write_page(path: Path, root: Path) -> None:
    """Write the include file, if it changed."""
    text = tables(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
