"""The tutorials, which are Python scripts in percent format, as notebooks for MyST-NB."""

from pathlib import Path

import jupytext


def write_pages(folder: Path, scripts: Path) -> None:
    """Convert every script, touching only the notebooks that changed: a touched notebook is executed again."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {script.stem: notebook(script) for script in sorted(scripts.glob("[0-9]*.py"))}
    for name, text in texts.items():
        path = folder / f"{name}.ipynb"
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
    for path in folder.glob("*.ipynb"):
        if path.stem not in texts:
            path.unlink()


def notebook(script: Path) -> str:
    """One script as the text of a notebook. Cells are numbered, so that the same script gives the same text."""
    book = jupytext.read(script)
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book.nbformat_minor = 5
    for index, cell in enumerate(book.cells):
        cell["id"] = f"cell-{index}"
    return jupytext.writes(book, fmt="ipynb")
