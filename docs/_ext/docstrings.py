"""Docstrings as reStructuredText.

Docstrings are written to be read in the source: formulas are indented lines with bare ``*`` and ``|``, and the papers
follow "Source:". Here formulas become literal blocks, stray markup is escaped and sources become a section, before
Napoleon sees the sections.
"""

import re

_CODE = re.compile(r"(``.+?``|`[^`]+`)")
_SECTION = re.compile(r"^Sources?:\s*")
_WITH_ITEMS = {"Attributes", "Parameters", "Raises"}
_LITERAL = re.compile(r"::\s*$")


def escape(line: str) -> str:
    """Escape markup outside of code spans."""
    parts = _CODE.split(line)
    for index in range(0, len(parts), 2):
        text = parts[index].replace("\\", r"\\").replace("|", r"\|")
        text = re.sub(r"(?<!^)\*|^(\s*)\*(?!\s)", lambda match: (match.group(1) or "") + r"\*", text)
        text = re.sub(r"(\w)_(?!\w)", r"\1\\_", text)
        # A code span must end at a word's end: `Partial`s.
        parts[index] = r"\ " + text if index and text[:1].isalnum() else text
    return "".join(parts)


def convert(lines: list[str], *, is_module: bool) -> list[str]:
    """Lines of one docstring, made ready for Napoleon."""
    out: list[str] = []
    literal_indent: int | None = None
    in_items = False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        blank = not line.strip()
        if literal_indent is not None and not blank and indent <= literal_indent:
            literal_indent = None
        if literal_indent is not None:
            out.append(line)
            continue
        starts = is_module and indent >= 4 and not blank and (number == 0 or not lines[number - 1].strip())
        if starts:
            out += ["::", ""]
            literal_indent = 0
            out.append(line)
            continue
        if match := _SECTION.match(line):
            # Napoleon ends the section before at a new heading; a plain line there would be taken for an item of it.
            out += ["", "References", "----------", escape(line[match.end() :])]
            continue
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if following and set(following) == {"-"}:
            in_items = line.strip() in _WITH_ITEMS
        elif (
            in_items
            and not blank
            and indent == 0
            and not lines[number - 1].strip()
            and not following.startswith(" ")
        ):
            # A paragraph after the last item.
            out += ["Notes", "-----"]
            in_items = False
        out.append(line if line.strip("-") == "" and line.strip() else escape(line))
        if _LITERAL.search(line):
            literal_indent = indent
    return out


def process(app, what, name, obj, options, lines):
    """Handler of ``autodoc-process-docstring``."""
    lines[:] = convert(list(lines), is_module=what == "module")


def setup(app):
    """Register before Napoleon, which listens to the same event at the usual priority."""
    app.connect("autodoc-process-docstring", process, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
