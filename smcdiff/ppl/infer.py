"""Joint posterior samples of a NumPyro model with a diffusion prior.

The latent sites are divided into blocks, each with a NumPyro kernel, and NumPyro's `Gibbs` visits them in turn: a site
with a `DiffusionPrior` goes to `smcdiff.ppl.ParticleGibbs`, which needs its scores only, and all others go together to
NUTS. Given x, the prior density of x is a constant for the other blocks, and they are told so
(`without_prior_density`).
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, PRNGKeyArray, PyTree
from numpyro import handlers
from numpyro.infer import NUTS, Gibbs
from numpyro.infer.hmc import HMCState

from smcdiff.checks import check_count
from smcdiff.ppl.call import ModelCall, model_call
from smcdiff.ppl.dependence import depends_on_input
from smcdiff.ppl.kernel import AlgorithmKernelState
from smcdiff.ppl.particle_gibbs import ParticleGibbs
from smcdiff.ppl.particle_marginal import ParticleMarginal, ParticleMarginalKernelState
from smcdiff.ppl.site_kernel import HasDerived, SiteState
from smcdiff.ppl.sites import prior_of, without_prior_density
from smcdiff.run import Trace, run

__all__ = ["SweepState", "gibbs_sweep", "infer"]

SiteNames = str | tuple[str, ...]
KernelBuilder = Callable[[Callable], Any]


class SweepState(NamedTuple):
    """State of the Gibbs sampler over the sites of a model.

    Attributes
    ----------
    position
        Values of all latent sites and of the deterministic ones, by name, and denoised samples of `SplitGibbs`.
    kernel
        NumPyro's own state.
    """

    position: dict[str, Array]
    kernel: PyTree


class _Sweep(eqx.Module):
    call: ModelCall
    blocks: tuple[tuple[tuple[str, ...], Callable, tuple, tuple], ...] = eqx.field(static=True)
    num_warmup: int = eqx.field(static=True)


def infer(
    rng_key: PRNGKeyArray,
    model: Callable,
    *args: Any,
    kernels: Mapping[SiteNames, KernelBuilder] | None = None,
    num_warmup: int = 500,
    num_samples: int = 500,
    num_chains: int = 4,
    thin: int = 1,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Trace:
    """Sample the joint posterior of all latent sites of a NumPyro model, of which some have a `DiffusionPrior`.

    Parameters
    ----------
    rng_key
        Key.
    model
        The NumPyro model. What it closes over is part of the compiled program: pass data and the diffusion as
        arguments, and other ones of the same shapes compile nothing anew.
    *args
        Its arguments.
    kernels
        Kernels by site name, or by a tuple of names that move together: functions of the model that return a NumPyro
        kernel, such as ``NUTS`` or ``functools.partial(ParticleGibbs, num_particles=32)``. Sites that are not named get
        `ParticleGibbs`, one each, if they have a `DiffusionPrior`, and otherwise share one NUTS.
    num_warmup
        Steps in which kernels may adapt; they are not returned.
    num_samples
        Steps after them, a multiple of ``thin``.
    num_chains
        Independent chains, run side by side.
    thin
        Keep every ``thin``-th of the samples.
    checkpoint
        See `smcdiff.run`.
    progress
        Whether to show a bar.
    **kwargs
        Keyword arguments of the model.

    Returns
    -------
    Trace
        ``samples`` by site name, deterministic sites included, of shape (num_chains, num_samples / thin, *site); a site
        "x" that `SplitGibbs` moves has its sample without noise, "x_denoised", beside it.
        ``info`` has ArviZ's statistics of the blocks; `smcdiff.to_arviz` takes it.

    Raises
    ------
    TypeError
        If a latent site is discrete and no kernel was named for it, if the model has a ``param`` site, or an argument
        is neither array nor hashable.
    ValueError
        If the model has no latent site or no observed one, if two sites share a name, if the prior of a diffusion
        depends on another site, if a value does not fit its site, or ``kernels`` names an unknown site or one twice.

    Source: Andrieu, Doucet and Holenstein, "Particle Markov chain Monte Carlo methods", JRSS-B 72 (2010); NumPyro,
    arXiv 1912.11554.
    """
    check_count("num_samples", num_samples)
    check_count("num_warmup", num_warmup, 0)
    check_count("thin", thin)
    if num_samples % thin or num_warmup % thin:
        raise ValueError(
            f"num_warmup and num_samples must be multiples of thin = {thin}, got {num_warmup}, {num_samples}."
        )
    sweep = gibbs_sweep(model, *args, kernels=kernels, num_warmup=num_warmup, **kwargs)
    trace = run(
        rng_key,
        sweep,
        num_warmup + num_samples,
        num_chains=num_chains,
        thin=thin,
        checkpoint=checkpoint,
        progress=progress,
    )
    samples, info = jax.tree.map(lambda leaf: leaf[:, num_warmup // thin :], (trace.samples, trace.info))
    return Trace(samples, info, trace.state)


def gibbs_sweep(
    model: Callable,
    *args: Any,
    kernels: Mapping[SiteNames, KernelBuilder] | None = None,
    num_warmup: int = 500,
    **kwargs: Any,
) -> SamplingAlgorithm:
    """The Gibbs sampler of `infer`, as an algorithm for `smcdiff.run`: one step is one visit of every block.

    Parameters and errors as in `infer`; ``init(None, rng_key)`` draws its own start.
    """
    call = model_call(_Flattened(model), args, kwargs)
    blocks = _blocks(model, args, kwargs, kernels or {})
    sweep = _Sweep(call, blocks, num_warmup)
    return SamplingAlgorithm(Partial(_init, sweep), Partial(_step, sweep))


class _Flattened:
    """The model without the densities of its diffusion priors; equal for equal models, so that programs serve again."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        with without_prior_density():
            return self.model(*args, **kwargs)

    def __eq__(self, other):
        return isinstance(other, _Flattened) and self.model == other.model

    def __hash__(self):
        return hash((_Flattened, self.model))


def _build(sweep):
    """NumPyro's kernel and its arguments, made where they are used: kernels keep what they were initialised with."""
    model, args, kwargs = sweep.call.unpack()
    blocks = [(build(model, *a, **dict(k)), names) for names, build, a, k in sweep.blocks]
    return Gibbs(blocks), args, kwargs


def _init(sweep, position, rng_key):
    """Start every block from a draw of its prior, or as its kernel does."""
    if position is not None:
        raise ValueError("the sweep draws its own start; give position=None.")
    kernel, args, kwargs = _build(sweep)
    state = kernel.init(rng_key, sweep.num_warmup, None, args, kwargs)
    return SweepState(_values(kernel, args, kwargs, state), state)


def _step(sweep, rng_key, state):
    """One visit of every block."""
    kernel, args, kwargs = _build(sweep)
    # Fixes what the kernels keep from their start, such as transforms; nothing of its numbers is used.
    kernel.init(rng_key, sweep.num_warmup, None, args, kwargs)
    inner = kernel.sample(state.kernel, args, kwargs)
    return SweepState(_values(kernel, args, kwargs, inner), inner), _statistics(inner)


def _values(kernel, args, kwargs, state):
    """Sites of the model, and what a block has beside its own."""
    values = dict(kernel.postprocess_fn(args, kwargs)(state.z))
    for block in state.block_states:
        if isinstance(block, HasDerived):
            values |= block.derived()
    return values


def _statistics(state):
    """Statistics of the blocks: ArviZ's names for NUTS and particle marginal, under their sites for other blocks."""
    found: dict[str, Array] = {}
    for block in state.block_states:
        if isinstance(block, HMCState):
            found |= {
                "lp": -block.potential_energy,
                "acceptance_rate": block.accept_prob,
                "diverging": block.diverging,
                "n_steps": block.num_steps,
                "step_size": block.adapt_state.step_size,
                "energy": block.energy,
            }
        elif isinstance(block, SiteState):
            (name,) = block.z
            found |= {f"{name}.{key}": value for key, value in block.statistics().items()}
        elif isinstance(block, ParticleMarginalKernelState):
            found |= {
                "acceptance_rate": block.acceptance_rate,
                "lp": block.chain.log_prior + block.chain.log_evidence,
            }
        elif isinstance(block, AlgorithmKernelState) and hasattr(block.info, "acceptance_rate"):
            found[f"{'.'.join(block.z)}.acceptance_rate"] = block.info.acceptance_rate
    return found


def _blocks(model, args, kwargs, kernels):
    """Blocks of sites, and how to build their kernels; checks the model."""
    trace = _checked_trace(model, args, kwargs)
    latent = [n for n, site in trace.items() if site["type"] == "sample" and not site["is_observed"]]
    named = {(names,) if isinstance(names, str) else tuple(names): build for names, build in kernels.items()}
    flat = [name for names in named for name in names]
    unknown = [name for name in flat if name not in latent]
    if unknown:
        raise ValueError(f"kernels names {unknown}, which are no latent sites of the model; it has {latent}.")
    if len(set(flat)) < len(flat):
        twice = sorted({name for name in flat if flat.count(name) > 1})
        raise ValueError(f"kernels names the sites {twice} more than once; a site belongs to one block.")
    others = [name for name in latent if name not in flat]
    discrete = [name for name in others if trace[name]["fn"].support.is_discrete]
    if discrete:
        kind = type(trace[discrete[0]]["fn"]).__name__
        raise TypeError(
            f"site {discrete[0]!r} of the model is latent and discrete ({kind}), which NUTS cannot move; sum it out of "
            f"the model, or give it a kernel: kernels={{{discrete[0]!r}: numpyro.infer.DiscreteGibbs}}."
        )
    named |= {(name,): ParticleGibbs for name in others if prior_of(trace[name]) is not None}
    rest = tuple(name for name in others if prior_of(trace[name]) is None)
    if rest:
        named[rest] = NUTS
    if ParticleMarginal in [_builder(build)[0] for build in named.values()]:
        if len(named) > 1:
            raise ValueError(
                f"ParticleMarginal moves all latent sites together, {latent}, and leaves none to other kernels; got "
                f"blocks for {list(named)}."
            )
    else:
        _check_priors_are_free(model, args, kwargs, latent, trace)
    return tuple((names, *_builder(build)) for names, build in named.items())


def _builder(build):
    """A builder as function, positional and keyword arguments: a `functools.partial` equals no other one."""
    if isinstance(build, functools.partial):
        return build.func, build.args, tuple(sorted(build.keywords.items()))
    return build, (), ()


def _checked_trace(model, args, kwargs):
    """A trace of the model, of shapes only, or an error that says what is wrong in its own names."""

    def shapes():
        try:
            trace = handlers.trace(handlers.seed(model, jax.random.key(0))).get_trace(*args, **kwargs)
        except AssertionError as error:
            raise ValueError(
                f"the model cannot be traced, a site's name must be used once: {error}"
            ) from error
        found.update(trace)

    found: dict[str, Any] = {}
    jax.eval_shape(shapes)
    for name, site in found.items():
        if site["type"] == "param":
            raise TypeError(
                f"site {name!r} of the model is a param, which has no prior; make it a sample site or an argument."
            )
        if site["type"] != "sample":
            continue
        expected, shape = site["fn"].shape(), jnp.shape(site["value"])
        if shape != expected:
            raise ValueError(f"site {name!r} of the model has the shape {expected}, and its value {shape}.")
    samples = [site for site in found.values() if site["type"] == "sample"]
    if all(site["is_observed"] for site in samples):
        raise ValueError("the model has no latent site: every sample site is observed.")
    if not any(site["is_observed"] for site in samples):
        raise ValueError(
            "the model has no observed site, so its posterior is its prior: give data to the obs argument of a sample "
            "site, condition the model by handlers.condition, or draw from the prior by numpyro.infer.Predictive."
        )
    return found


def _check_priors_are_free(model, args, kwargs, latent, trace):
    """A diffusion whose weights or condition depend on another site would give that site a factor nobody knows."""
    diffusions = [name for name in latent if prior_of(trace[name]) is not None]
    for name in diffusions:
        for other in latent:
            if other == name:
                continue

            def weights(value, name=name, other=other):
                filled = handlers.substitute(handlers.seed(model, jax.random.key(0)), data={other: value})
                site = handlers.trace(filled).get_trace(*args, **kwargs)[name]
                return [leaf for leaf in jax.tree.leaves(prior_of(site)) if eqx.is_array(leaf)]

            value = jax.ShapeDtypeStruct(
                jnp.shape(trace[other]["value"]), jnp.result_type(trace[other]["value"])
            )
            if any(depends_on_input(weights, value)):
                raise ValueError(
                    f"the diffusion prior of site {name!r} depends on site {other!r}, whose conditional density would "
                    f"need the normalised density of {name!r}; fix {other!r} as an argument of the model, or "
                    "let smcdiff.ppl.ParticleMarginal move both."
                )
