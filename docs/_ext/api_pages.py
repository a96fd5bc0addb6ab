"""Write the pages of the API reference from the package itself, so that a new module or name cannot be left out.

One page for every public module one level below `smcdiff`. It shows the module's docstring (the mathematics) and then
every public object, once, under the shortest name by which a user reaches it: `smcdiff.Diffusion`,
`smcdiff.schedules.vp`, `smcdiff.smc.systematic`. Modules inside a folder become sections of the folder's page.
"""

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import smcdiff

# Programs, not an interface to import.
SKIPPED = {"cli", "report"}


def public_modules(package: Any = smcdiff) -> list[str]:
    """Names of the package's public modules and folders, one level down."""
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if not name.startswith("_") and name not in SKIPPED)


def modules_of_page(page: str) -> list[Any]:
    """The module of a page, and those inside it if it is a folder."""
    top = importlib.import_module(f"smcdiff.{page}")
    return [top, *(importlib.import_module(f"{top.__name__}.{name}") for name in inner_modules(top))]


def inner_modules(top: Any) -> list[str]:
    """Public modules inside a folder, in the order of the alphabet."""
    return public_modules(top) if hasattr(top, "__path__") else []


def homes() -> dict[int, str]:
    """The name under which each public object is documented, by the object's id: the shortest there is."""
    found: dict[int, str] = {}
    pages = [modules_of_page(page) for page in public_modules()]
    levels = [[smcdiff], [page[0] for page in pages], [module for page in pages for module in page[1:]]]
    for modules in levels:
        for module in modules:
            for name in module.__all__:
                found.setdefault(id(getattr(module, name)), f"{module.__name__}.{name}")
    return found


def documented_names() -> dict[str, list[str]]:
    """Full names that each page documents."""
    home = homes()
    pages: dict[str, list[str]] = {page: [] for page in public_modules()}
    seen: set[str] = set()
    for page in pages:
        for module in reversed(modules_of_page(page)):
            for name in module.__all__:
                thing = getattr(module, name)
                if inspect.ismodule(thing) or not is_ours(thing, module):
                    continue
                full = home[id(thing)]
                if full not in seen:
                    seen.add(full)
                    pages[page].append(full)
    return pages


def is_ours(thing: Any, module: Any) -> bool:
    """Whether an object is defined in this very module, or is a constant or type alias of it."""
    if is_foreign(thing):
        return False
    if inspect.isclass(thing) or inspect.isfunction(thing):
        return thing.__module__ == module.__name__
    return not hasattr(module, "__path__")


def is_foreign(thing: Any) -> bool:
    """Whether an object is passed on from another project."""
    origin = str(getattr(thing, "__module__", None) or "smcdiff").partition(".")[0]
    return callable(thing) and origin not in {"smcdiff", "builtins", "collections", "typing", "types"}


def foreign(module: Any) -> list[tuple[str, str]]:
    """Names that a module passes on from another project, with their origin."""
    things = ((name, getattr(module, name)) for name in module.__all__)
    return [(name, thing.__module__) for name, thing in things if is_foreign(thing)]


def automodule(module: Any) -> list[str]:
    """The docstring of a module; without an entry where a function of the same name hides it, as with `smcdiff.run`."""
    hidden = inspect.ismodule(module) and not inspect.ismodule(eval_name(module.__name__))
    return [
        f".. automodule:: {module.__name__}",
        "   :no-members:",
        *(["   :no-index:"] if hidden else []),
        "",
    ]


def eval_name(full: str) -> Any:
    """What a user gets by the dotted name, after ``import smcdiff``."""
    thing: Any = smcdiff
    for part in full.split(".")[1:]:
        thing = getattr(thing, part)
    return thing


def directive(full: str) -> list[str]:
    """Autodoc's directive for one object."""
    owner, _, name = full.rpartition(".")
    thing = getattr(importlib.import_module(owner), name)
    if inspect.isclass(thing):
        lines = [f".. autoclass:: {full}", "   :members:"]
        if fields := getattr(thing, "_fields", ()):  # described in the docstring
            lines.append(f"   :exclude-members: {', '.join(fields)}")
        return [*lines, ""]
    if callable(thing) and inspect.isfunction(inspect.unwrap(thing)):
        return [f".. autofunction:: {full}", ""]
    return [f".. py:data:: {full}", "", "   A type alias or constant; see the source.", ""]


def heading(text: str, underline: str) -> list[str]:
    """A title or section."""
    return [text, underline * len(text), ""]


def page_text(page: str, names: list[str]) -> str:
    """The reStructuredText of one page."""
    top, *inner = modules_of_page(page)
    home = homes()
    lines = [*heading(top.__name__, "="), *automodule(top)]
    left = list(names)
    for module in (*inner, top):
        here = [
            home[id(getattr(module, name))]
            for name in module.__all__
            if home.get(id(getattr(module, name))) in left
        ]
        left = [name for name in left if name not in here]
        if not here:
            continue
        if module is not top:
            lines += [*heading(module.__name__.removeprefix("smcdiff."), "-"), *automodule(module)]
        for full in here:
            lines += directive(full)
    passed_on = {name: origin for module in (top, *inner) for name, origin in foreign(module)}
    if passed_on:
        lines += [*heading("Passed on unchanged", "-")]
        lines += [
            f"- ``{top.__name__}.{name}`` of ``{origin}``" for name, origin in sorted(passed_on.items())
        ]
    return "\n".join(lines).rstrip() + "\n"


def summary(thing: Any) -> str:
    """First sentence of a docstring's first line, as Markdown."""
    line = (inspect.getdoc(thing) or "").partition("\n")[0].rstrip(".").replace("``", "`")
    return line.replace("*", r"\*").replace("|", r"\|").replace("<", r"\<")


def names_table() -> str:
    """Markdown: every name of `smcdiff.__all__` with a link and a line, then every page."""
    lines = ["| name | what it is |", "| --- | --- |"]
    for name in smcdiff.__all__:
        thing = getattr(smcdiff, name)
        if not inspect.ismodule(thing):
            lines.append(f"| {{py:obj}}`smcdiff.{name}` | {summary(thing)} |")
    lines += ["", "| module | what is in it |", "| --- | --- |"]
    for page in public_modules():
        module = importlib.import_module(f"smcdiff.{page}")
        lines.append(f"| [`smcdiff.{page}`](../api/generated/smcdiff.{page}.rst) | {summary(module)} |")
    return "\n".join(lines) + "\n"


def write_if_changed(path: Path, text: str) -> None:
    """Write a file, leaving it alone if it has this text: a touched file is read anew by Sphinx."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def write_pages(folder: Path, table: Path) -> None:
    """Write all pages and the table of names, and remove the pages of modules that are gone."""
    write_if_changed(table, names_table())
    pages = documented_names()
    texts = {f"smcdiff.{page}.rst": page_text(page, names) for page, names in pages.items()}
    for name, text in texts.items():
        write_if_changed(folder / name, text)
    for path in folder.glob("smcdiff.*.rst"):
        if path.name not in texts:
            path.unlink()
