"""How fast resampling is, against blackjax and particles, and how exact the numbers of offspring are.

A million particles by default, with log-normal weights of a given spread. Everything in one process on one core, in
turns; ours and blackjax compiled and in float32, particles (numba) in its own double precision. Compilation is not
counted. Exactness: the largest |offspring - N w| of one call, where w is normalised in double precision; it is less
than 1 for systematic resampling and SSP. Bars, for systematic resampling: 3 times as fast as blackjax, twice as fast
as particles; for the exactness, 1 and the rounding of N w to float32.

Command: ``python -m benchmarks resampling``. The peer: ``pip install particles``, optional; in an environment of its
own if it asks for an older NumPy.
"""

import functools
import importlib.metadata
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import bar
from benchmarks.reverse import one_core
from benchmarks.timing import in_turns, spread
from smcdiff.smc import resampling

OURS = ("systematic", "ssp", "stratified", "residual", "multinomial", "killing")
EXACT = ("systematic", "ssp")


def add_arguments(parser):
    parser.add_argument("--particles", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.3, 1.5])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))


def run(args) -> dict:
    if args.quick:
        args.particles, args.repeats, args.peers = [1000], 2, []
    rows, bars = [], []
    with one_core() as worker:
        for num_particles, deviation in itertools.product(args.particles, args.spreads):
            new_rows, new_bars = worker.submit(compare, args, num_particles, deviation).result()
            rows += new_rows
            bars += new_bars
    return {
        "title": "Resampling beside blackjax and particles",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")}
        | {"versions of peers": {name: _version(name) for name in (*PEERS, "numba")}},
        "seeds": [0],
        "rows": rows,
        "summary": rows,
        "bars": bars,
    }


def compare(args, num_particles, deviation):
    """Rows and bars of one number of particles and one spread of the log weights."""
    log_weights = deviation * np.random.default_rng(0).normal(size=num_particles)
    weights = jax.nn.softmax(jnp.asarray(log_weights, jnp.float32))
    case = {"N": num_particles, "sd of log weights": deviation}
    rows, samplers = [], {name: _compiled(getattr(resampling, name), weights) for name in OURS}
    for name in args.peers:
        try:
            samplers[name] = PEERS[name](weights)
        except ImportError as error:
            rows.append({**case, "function": name, "note": str(error)})
    seconds = in_turns(samplers, args.repeats)
    expected = np.asarray(weights, float)
    expected *= num_particles / expected.sum()
    for name, sampler in samplers.items():
        offspring = np.bincount(sampler(), minlength=num_particles)
        row = {
            **case,
            "function": name,
            **spread("ms", 1e3 * seconds[name]),
            "slower by": float(np.median(seconds[name] / seconds["systematic"])),
            "largest |offspring - N w|": float(np.abs(offspring - expected).max()),
        }
        rows.append(row)
    bars = [
        bar(
            f"{name}: largest |offspring - N w|, N={num_particles}, spread {deviation}",
            next(row["largest |offspring - N w|"] for row in rows if row["function"] == name),
            1 + 2.0**-22 * max(1, expected.max()),
        )
        for name in EXACT
    ]
    for row in rows:
        if row["function"] in PEERS and "note" not in row:
            title = f"faster than {row['function']}, N={num_particles}, spread {deviation}"
            bars.append(bar(title, row["slower by"], LIMITS[row["function"]], at_least=True))
    return rows, bars


def _compiled(resample, weights):
    program = jax.jit(functools.partial(resample, num_samples=weights.shape[0]))
    key = jax.random.key(0)
    return lambda: np.asarray(program(key, weights))


def _blackjax(weights):
    from blackjax.smc.resampling import systematic

    return _compiled(systematic, weights)


def _particles(weights):
    from particles.resampling import systematic

    doubles = np.asarray(weights, float)
    doubles /= doubles.sum()
    return lambda: systematic(doubles)


PEERS = {"blackjax": _blackjax, "particles": _particles}
LIMITS = {"blackjax": 3.0, "particles": 2.0}


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
