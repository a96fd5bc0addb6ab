"""Run benchmarks: ``python -m benchmarks NAME [options]``, or all of them without a name.

``python -m benchmarks table`` prints the tables of the committed results.

``--quick`` makes a run of a few seconds that checks the machinery and not the bars; it writes a result only if
``--out`` says where.
"""

import argparse
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import benchmarks
from benchmarks.common import RESULTS, Clock, finish, format_table, joined

_NOT_BENCHMARKS = {"__main__", "bare_samplers", "common", "distances", "table", "timing"}


def names() -> list[str]:
    """The benchmarks of this folder."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules(benchmarks.__path__)
        if module.name not in _NOT_BENCHMARKS
    )


def run_one(name: str, options: list[str]) -> dict:
    """Run the benchmark ``name`` with command line ``options``; returns the complete result."""
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, for tests; not a measurement")
    parser.add_argument("--out", type=Path, help=f"result file, by default benchmarks/results/{name}.json")
    keys = getattr(module, "KEYS", ())
    if keys:
        parser.add_argument(
            "--keep", action="store_true", help="the records of the result file that this run lacks"
        )
    module.add_arguments(parser)
    args = parser.parse_args(options)
    out = args.out or (None if args.quick else RESULTS / f"{name}.json")
    with Clock() as clock:
        result = module.run(args)
    if keys and args.keep and out is not None and out.exists():
        result = joined(json.loads(out.read_text()), result, keys)
    return finish(name, result, clock, out)


def main(arguments: list[str]) -> int:
    """Entry point; the exit status is 0 whether or not bars are met, since a missed bar is a result too."""
    name, *options = arguments or ["all"]
    if name.startswith("-"):
        name, options = ("all", arguments) if name not in ("-h", "--help") else ("help", [])
    if name == "help":
        print(__doc__)
        print("benchmarks:", ", ".join(names()))
    elif name == "table":
        importlib.import_module("benchmarks.table").main()
    elif name != "all" and name not in names():
        print(f"no benchmark {name!r}; there are: {', '.join(names())}", file=sys.stderr)
        return 2
    elif name == "all":
        # A process each: what one leaves behind must not slow the next.
        return max(
            subprocess.run([sys.executable, "-m", "benchmarks", each, *options]).returncode
            for each in names()
        )
    else:
        result = run_one(name, options)
        wall = result["wall_s"]
        print(
            f"\n{name}: {wall['total']:.0f} s, {wall['compile']:.0f} s of it compiling, {wall['cpu']:.0f} s of CPU"
        )
        if result["bars"]:
            print(format_table(result["bars"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
