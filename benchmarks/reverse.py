"""How fast plain sampling is, against azula and deepinv, on a score that costs next to nothing.

Ancestral sampling of the 25-mode mixture with its closed-form denoiser, against azula's DDPM sampler and deepinv's
DDPM solver of its variance-preserving SDE, each on its own grid of as many steps. All in float32, in one process on
one core, in turns; torch runs eagerly, as both libraries do. Compilation is not counted. That each samples the right
law is checked by the mean and the deviations of the samples. Bar: 1.5 times as fast as each.

Command: ``python -m benchmarks reverse``. The peers: ``pip install azula deepinv torch``, optional.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import numpy as np

import smcdiff
from benchmarks.common import bar
from benchmarks.speed import mixture_and_problem
from benchmarks.timing import in_turns, spread


def add_arguments(parser):
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=18)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[8, 80])
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))


def run(args) -> dict:
    if args.quick:
        args.steps, args.repeats, args.dimensions, args.samples, args.peers = 6, 2, [8], [50], []
    rows, bars = [], []
    cases = itertools.product(args.dimensions, args.samples)
    with one_core() as worker:
        for dimension, num_samples in cases:
            new_rows, new_bars = worker.submit(compare, args, dimension, num_samples).result()
            rows += new_rows
            bars += new_bars
    return {
        "title": "Plain sampling beside azula and deepinv",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")}
        | {"versions of peers": {name: _version(name) for name in (*PEERS, "torch")}},
        "seeds": [0],
        "rows": rows,
        "summary": rows,
        "bars": bars,
    }


@contextlib.contextmanager
def one_core():
    """A fresh process that is kept on one core before JAX and torch count them."""
    pin = {}
    if hasattr(os, "sched_setaffinity"):
        pin = {"initializer": os.sched_setaffinity, "initargs": (0, {max(os.sched_getaffinity(0))})}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **pin) as worker:
        yield worker


def compare(args, dimension, num_samples):
    """Rows and bars of one dimension and number of samples."""
    model, _ = mixture_and_problem(dimension)
    times = smcdiff.log_snr_times(model.schedule, args.steps)
    samplers = {"smcdiff": functools.partial(_ours, model, times, num_samples)}
    rows, bars = [], []
    for name in args.peers:
        try:
            samplers[name] = PEERS[name](model, num_samples, args.steps)
        except ImportError as error:
            rows.append({"d": dimension, "samples": num_samples, "sampler": name, "note": str(error)})
    seconds = in_turns(samplers, args.repeats)
    for name, sampler in samplers.items():
        row = {
            "d": dimension,
            "samples": num_samples,
            "sampler": name,
            "ns a particle and step": 1e9 * np.median(seconds[name]) / (num_samples * args.steps),
            **spread("slower by", seconds[name] / seconds["smcdiff"]),
            **agreement(model, sampler()),
        }
        rows.append(row)
        if name != "smcdiff":
            case = f"faster than {name}, d={dimension}, {num_samples} samples"
            bars.append(bar(case, row["slower by"], 1.5, at_least=True))
    return rows, bars


def _ours(model, times, num_samples):
    return np.asarray(smcdiff.reverse_sample(jax.random.key(0), model, times, num_samples))


def agreement(model, cloud) -> dict:
    """How well samples fit: their mean in standard errors, their deviation, and their deviation within a mode."""
    mean, variance = np.asarray(model.mixture.mean()), np.diag(np.asarray(model.mixture.covariance()))
    centres = np.asarray(model.mixture.component_means())
    nearest = centres[np.argmin(((cloud[:, None] - centres) ** 2).sum(-1), axis=1)]
    return {
        "mean error / standard error": float(
            np.abs((cloud.mean(0) - mean) / np.sqrt(variance / len(cloud))).max()
        ),
        "sd / exact": float(np.mean(cloud.std(0) / np.sqrt(variance))),
        "sd within a mode (1)": float(np.sqrt(np.mean((cloud - nearest) ** 2))),
    }


def _torch_denoiser(model):
    """The closed-form denoiser E[x_0 | x_t] in torch, as a function of x_t, alpha and sigma."""
    import torch

    torch.set_num_threads(1)
    means = torch.tensor(np.asarray(model.mixture.component_means()))
    log_weights = torch.tensor(np.asarray(model.mixture.log_weights))
    half_norms = 0.5 * (means**2).sum(1)

    def denoise(x, alpha, sigma):
        variance = alpha**2 + sigma**2
        logits = log_weights + (alpha / variance) * (x @ means.T) - (alpha**2 / variance) * half_norms
        return (alpha / variance) * x + (sigma**2 / variance) * (torch.softmax(logits, 1) @ means)

    return denoise


def _azula(model, num_samples: int, num_steps: int):
    """azula's DDPM sampler on its default variance-preserving schedule."""
    import torch
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import VPSchedule
    from azula.sample import DDPMSampler

    denoise = _torch_denoiser(model)

    class Exact(Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule = VPSchedule()

        def forward(self, x_t, t):
            return DiracPosterior(denoise(x_t, *self.schedule(t)))

    sampler = DDPMSampler(Exact(), steps=num_steps, silent=True)
    torch.manual_seed(0)
    return lambda: sampler(sampler.init((num_samples, *model.event_shape))).numpy()


def _deepinv(model, num_samples: int, num_steps: int):
    """deepinv's DDPM solver of its variance-preserving SDE."""
    import torch

    try:
        _declare_torchvision_operators()
        from deepinv.sampling import DDPMSolver, VariancePreservingDiffusion
    except RuntimeError as error:
        raise ImportError(str(error)) from error
    denoise = _torch_denoiser(model)

    class Exact(torch.nn.Module):
        def forward(self, x, sigma):
            return denoise(x, torch.ones_like(sigma), sigma)

    solver = DDPMSolver(
        timesteps=torch.linspace(1.0, 0.0, num_steps + 1), rng=torch.Generator().manual_seed(0)
    )
    sde = VariancePreservingDiffusion(
        denoiser=Exact(), solver=solver, minus_one_one=False, dtype=torch.float32
    )
    return lambda: sde.sample((num_samples, *model.event_shape)).numpy()


def _declare_torchvision_operators():
    """Let deepinv import torchvision, which its samplers do not use, where the compiled operators do not load."""
    import re
    from importlib.util import find_spec

    import torch

    if find_spec("torchvision") is None or find_spec("deepinv") is None:
        raise ImportError("torchvision and deepinv")
    folder = Path(find_spec("torchvision").origin).parent
    with contextlib.suppress(OSError):
        torch.ops.load_library(next(folder.glob("_C*.so"), folder / "_C.so"))
    if hasattr(torch.ops.torchvision, "nms"):
        return
    source = (folder / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "DEF")
    for name in dict.fromkeys(re.findall(r'register_meta\("(\w+)"', source)):
        library.define(f"{name}(Tensor x) -> Tensor")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)  # its operators vanish with it


_KEPT: list = []
PEERS = {"azula": _azula, "deepinv": _deepinv}


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
