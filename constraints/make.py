"""Write the constraints file of one Python line: `python3.13 constraints/make.py` writes `constraints/py313.txt`.

pip finds the newest versions that fit together, for everything that `pyproject.toml` names under the extras of the
line; nothing is installed. Run it with each supported Python (`make constraints PYTHONS="..."`), then run the tests
on each: the files are what users and the CI install from.

A file holds plain `name==version` lines, because where a package comes from is the installing machine's affair.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("io", "test", "dev", "docs")

# The benchmarks and the torch readers run on one line only. PyTorch is held at a release: its wheels come in
# CPU and CUDA builds of the same version, and a newer one is several gigabytes for nothing where there is no GPU.
EXTRAS_OF_LINE = {(3, 11): ("bench", "torch")}
HELD_OF_LINE = {(3, 11): ("torch==2.13.0",)}


def requirements(line: tuple[int, int]) -> list[str]:
    """Everything that the extras of a Python line ask for, by name and lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = list(project["dependencies"])
    for extra in EXTRAS + EXTRAS_OF_LINE.get(line, ()):
        found += project["optional-dependencies"][extra]
    return found + list(HELD_OF_LINE.get(line, ()))


def resolve(wanted: list[str]) -> dict[str, str]:
    """Versions that satisfy all requirements at once for the running Python, by normalised name."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "env")
        venv.create(environment, with_pip=True)
        report = Path(folder, "report.json")
        command = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--report",
            str(report),
        ]
        subprocess.run([environment / "bin" / "python", *command, *wanted], check=True)
        packages = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    # "2.13.0+cpu" names a build of 2.13.0, and which build fits is not ours to say.
    return {normalise(p["name"]): p["version"].partition("+")[0] for p in packages}


def normalise(name: str) -> str:
    """The name of a distribution as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Resolve for the running Python and write its file."""
    line = sys.version_info[:2]
    path = ROOT / "constraints" / f"py{line[0]}{line[1]}.txt"
    pins = resolve(requirements(line))
    extras = ", ".join(EXTRAS + EXTRAS_OF_LINE.get(line, ()))
    header = f"# Python {line[0]}.{line[1]}: runtime and extras {extras}. Written by constraints/make.py.\n"
    path.write_text(header + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items())))
    print(f"{path.relative_to(ROOT)}: {len(pins)} pins")


if __name__ == "__main__":
    main()
