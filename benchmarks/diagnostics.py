"""How fast chain diagnostics of large events are, against ArviZ.

Draws of an autoregression (rho = 0.5) in float32, by default 4 chains of 1000 draws of 12 288 numbers. ArviZ computes
the rank-normalised R-hat and the bulk ESS; `chain_diagnostics` these, tail and mean ESS, both Monte Carlo errors,
moments and quantiles; the streaming pass moments, plain split R-hat and batch-means errors. All in one process, in
turns, ArviZ in its own double precision. Compilation is not counted; processor time stands beside wall time. The
extra memory is by how much the process' peak rose at the first call, compilation included.

Truth: ArviZ's values, and the closed form of the effective sample size, S (1 - rho) / (1 + rho). Bars: everything 4
times as fast as ArviZ's two, streaming 50 times as fast as ArviZ's R-hat, values within 1e-4 (single precision).

Command: ``python -m benchmarks diagnostics``.
"""

import resource
import sys
import time

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
from scipy.signal import lfilter

from benchmarks.common import bar
from benchmarks.timing import spread
from smcdiff import diagnostics

RHO = 0.5
OURS, STREAMING = "smcdiff: everything", "smcdiff: streaming"
RHAT, ESS = "ArviZ: R-hat", "ArviZ: bulk ESS"


def add_arguments(parser):
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--dimensions", type=int, default=12288)
    parser.add_argument("--repeats", type=int, default=3)


def run(args) -> dict:
    if args.quick:
        args.draws, args.dimensions, args.repeats = 40, 16, 2
    x = draws(args.chains, args.draws, args.dimensions)
    on_device = jnp.asarray(x)
    dataset = az.convert_to_dataset({"x": x})
    start = diagnostics.streaming_init(np.zeros(args.dimensions, np.float32), args.chains, args.draws)

    def stream():
        return diagnostics.streaming_summary(diagnostics.streaming_update(start, on_device))

    functions = {
        OURS: lambda: jax.block_until_ready(diagnostics.chain_diagnostics(on_device)),
        STREAMING: lambda: jax.block_until_ready(stream()),
        RHAT: lambda: az.rhat(dataset),
        ESS: lambda: az.ess(dataset),
    }
    memory = {name: peak_rise(functions[name]) for name in (STREAMING, OURS)}
    az.rhat(az.convert_to_dataset({"x": x[..., :2]})), az.ess(az.convert_to_dataset({"x": x[..., :2]}))
    times = measured(functions, args.repeats)
    both = times[RHAT] + times[ESS]
    reference = {OURS: both, STREAMING: times[RHAT], RHAT: times[RHAT], ESS: times[ESS]}
    rows = [
        {
            "function": name,
            **spread("s", times[name][:, 0]),
            "CPU s": float(np.median(times[name][:, 1])),
            **spread("times as fast", reference[name][:, 0] / times[name][:, 0]),
            "CPU times as fast": float(np.median(reference[name][:, 1] / times[name][:, 1])),
            "extra MiB": memory.get(name),
        }
        for name in functions
    ]
    found, streamed = functions[OURS](), functions[STREAMING]()
    differences = {
        "R-hat": relative(found.rhat, functions[RHAT]()["x"].values),
        "bulk ESS": relative(found.ess_bulk, functions[ESS]()["x"].values),
    }
    exact = args.chains * args.draws * (1 - RHO) / (1 + RHO)
    by_name = {row["function"]: row for row in rows}
    return {
        "title": "Chain diagnostics beside ArviZ",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")},
        "seeds": [0],
        "rows": rows,
        "summary": rows,
        "exact": {
            "ESS": exact,
            "mean of ess_mean": float(np.mean(found.ess_mean)),
            "mean of streaming ess": float(np.mean(streamed.ess)),
            "largest relative difference from ArviZ": differences,
        },
        "bars": [
            bar(
                "everything, times as fast as ArviZ's two", by_name[OURS]["times as fast"], 4.0, at_least=True
            ),
            bar("the same in processor time", by_name[OURS]["CPU times as fast"], 4.0, at_least=True),
            bar(
                "streaming, times as fast as ArviZ's R-hat",
                by_name[STREAMING]["times as fast"],
                50.0,
                at_least=True,
            ),
            *(bar(f"{name}: relative difference", value, 1e-4) for name, value in differences.items()),
        ],
    }


def draws(num_chains, num_draws, size):
    """Stationary autoregressions (chain, draw, size) in float32."""
    rng, found = np.random.default_rng(0), np.empty((num_chains, num_draws, size), np.float32)
    for first in range(0, size, 256):  # so that the peak of memory is not here
        part = found[..., first : first + 256]
        noise = rng.normal(size=part.shape)
        noise[:, 0] /= np.sqrt(1 - RHO**2)
        part[:] = lfilter([1.0], [1.0, -RHO], noise, axis=1)
    return found


def measured(functions, repeats):
    """Wall and processor seconds of each function, (repeats, 2), called in turns."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            wall, processor = time.perf_counter(), time.process_time()
            function()
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: np.array(values) for name, values in times.items()}


def peak_rise(function):
    """By how many MiB the process' peak memory rises when ``function`` is called; it must be the first to be large."""
    before = _peak()
    function()
    return _peak() - before


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def relative(found, wanted):
    return float(np.max(np.abs(np.asarray(found, float) / wanted - 1)))
