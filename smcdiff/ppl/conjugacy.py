"""Which sites of a NumPyro model can be integrated out, and with which of the others.

The model is run once with the values of its latent sites as inputs, and `smcdiff.ppl.dependence` says how the
parameters of every site depend on them. A *group* is a set of sites that is integrated out at once, given its
*children*, the sites whose parameters depend on it:

gaussian  Normal and multivariate normal sites, whose children are such sites too, with a loc that is jointly affine in
          the group and a scale that does not depend on it. A child in the group makes a chain.
gamma     One Gamma or Exponential site, whose children are Poisson, Exponential, Gamma or Normal sites. Every element
          of their rates, and of the precisions 1/scale^2 of Normal ones, is a multiple of one element of the site.
beta      One Beta site, whose children are Bernoulli, Binomial or Geometric sites. Every element of their probs is
          an element of the site.

Nothing else may depend on a site of a group, and no site is a child of two groups; then all groups are independent
given the other sites. Sites join in the reverse order of the model, Gaussian ones first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from smcdiff.ppl.call import ModelCall
from smcdiff.ppl.dependence import Dependence, inlined, is_proportional, reached, walk
from smcdiff.ppl.families import EDGES, GAUSSIAN, KINDS, PARAMETERS, QuietRun, base, label, parameter

__all__ = ["Group", "Structure", "find_structure"]


class Group(NamedTuple):
    """Sites that are integrated out at once.

    Attributes
    ----------
    kind
        "gaussian", "gamma" or "beta".
    sites
        Their names, in the order of the model.
    children
        Names of the sites outside of the group that depend on it.
    """

    kind: str
    sites: tuple[str, ...]
    children: tuple[str, ...]


class Structure(NamedTuple):
    """What is integrated out of a model.

    Attributes
    ----------
    groups
        The groups.
    hidden
        Names of the sites that leave the model: those of the groups, their observed children, and the deterministic
        sites that depend on them.
    reasons
        Names of the latent sites that stay, and why.
    signature
        Names of all sample sites, and whether they are observed.
    retained
        Names of the latent sites that stay, and the numbers of axes of their values.
    """

    groups: tuple[Group, ...]
    hidden: tuple[str, ...]
    reasons: tuple[tuple[str, str], ...]
    signature: tuple[tuple[str, bool], ...]
    retained: tuple[tuple[str, int], ...]


# The search -----------------------------------------------------------------------------------------------------------


class _Site(NamedTuple):
    kind: str  # latent, observed, deterministic or other
    family: type
    obstacle: str | None  # what keeps it from being in a group or a child
    shape: tuple[int, ...]
    dtype: Any


def _summary(msg):
    if msg["type"] != "sample":
        return _Site("deterministic" if msg["type"] == "deterministic" else "other", object, None, (), None)
    family = type(base(msg["fn"]))
    obstacle = None
    if msg["scale"] is not None:
        obstacle = "is scaled"
    elif family is dist.MaskedDistribution:
        obstacle = "is masked"
    elif family not in PARAMETERS:
        obstacle = f"is {label(family)}"
    value = msg["value"]
    kind = "observed" if msg["is_observed"] else "latent"
    return _Site(kind, family, obstacle, jnp.shape(value), jnp.result_type(value))


def _outputs(msg):
    """Everything of a site that may depend on others, by name."""
    if msg["type"] == "deterministic":
        return {"value": msg["value"]}
    if msg["type"] != "sample":
        return {}
    found = {} if msg["scale"] is None else {"scale factor": msg["scale"]}
    if msg["is_observed"]:
        found["observed value"] = msg["value"]
    normal = base(msg["fn"])
    if type(normal) in PARAMETERS:
        return found | {name: parameter(normal, name) for name in PARAMETERS[type(normal)]}
    return found | {"log_prob": msg["fn"].log_prob(msg["value"])}


class _Model:
    """The sites of a model, and how what makes them depends on the latent ones."""

    def __init__(self, call: ModelCall):
        self.sites: dict[str, _Site] = {}

        def trace():
            self.sites |= {name: _summary(msg) for name, msg in QuietRun({})(*call.unpack()).items()}

        jax.eval_shape(trace)
        self.latents = [name for name, site in self.sites.items() if site.kind == "latent"]
        self.outputs: list[tuple[str, str]] = []
        num = len(self.latents)

        def outputs(*inputs):
            values = dict(zip(self.latents, inputs[:num], strict=True))
            sites = QuietRun(values)(*ModelCall(inputs[num:], call.constants, call.layout).unpack())
            found = [(name, _outputs(msg)) for name, msg in sites.items()]
            self.outputs[:] = [(name, part) for name, parts in found for part in parts]
            return [jnp.asarray(value) for _, parts in found for value in parts.values()]

        latents = [self.sites[name] for name in self.latents]
        shapes = [jax.ShapeDtypeStruct(site.shape, site.dtype) for site in latents]
        self.closed = inlined(outputs, *shapes, *call.arguments)
        self.inputs = [*self.latents, *(None for _ in call.arguments)]
        self.known: dict[Any, Any] = {}  # of equations

    def dependents(self, names) -> dict[tuple[str, str], Dependence]:
        """What depends on these latent sites, and how."""
        inputs = [Dependence.AFFINE if name in names else Dependence.NONE for name in self.inputs]
        found = zip(self.outputs, walk(self.closed, inputs, self.known), strict=True)
        return {output: flow for output, flow in found if flow != Dependence.NONE}

    def reached(self, names, *kinds) -> set[str]:
        """Which sites of these kinds depend on these latent sites."""
        flags = reached(self.closed, [name in names for name in self.inputs])
        found = {name for (name, _), is_reached in zip(self.outputs, flags, strict=True) if is_reached}
        return {name for name in found if self.sites[name].kind in kinds}

    def children(self, names) -> set[str]:
        return self.reached(names, "latent", "observed")


def find_structure(call: ModelCall, names: Sequence[str] | None) -> Structure:
    """What is integrated out of a model.

    Parameters
    ----------
    call
        The model and its arguments.
    names
        The sites to integrate out, or None for all that can be.

    Raises
    ------
    ValueError
        If one cannot be, or none can.
    """
    model = _Model(call)
    for name in names or ():
        if name not in model.latents:
            raise ValueError(f"the model has no latent site {name!r}; its latent sites are {model.latents}.")
    gaussian: list[str] = []
    others: list[Group] = []
    reasons: dict[str, str] = {}
    wanted = [name for name in reversed(model.latents) if names is None or name in names]
    for is_gaussian in (True, False):
        for name in wanted:
            kind = KINDS.get(model.sites[name].family)
            if (kind == "gaussian") != is_gaussian:
                continue
            why = _obstacle(model, name, kind, gaussian, others)
            if why is not None:
                reasons[name] = why
            elif is_gaussian:
                gaussian.append(name)
            else:
                others.append(Group(kind or "", (name,), tuple(sorted(model.children([name])))))
    if names is not None and reasons:
        name = next(name for name in names if name in reasons)
        raise ValueError(f"site {name!r} cannot be integrated out: {reasons[name]}.")
    reasons |= {name: "it is not among the sites asked for" for name in model.latents if name not in wanted}
    marginalized = {*gaussian, *(name for group in others for name in group.sites)}
    if not marginalized:
        why = "; ".join(f"{name!r}: {reasons[name]}" for name in model.latents)
        raise ValueError(f"no site of the model can be integrated out: {why or 'there is no latent one'}.")
    retained = [name for name in model.latents if name not in marginalized]
    groups = (*_components(model, gaussian), *others)
    hidden = model.reached(marginalized, "deterministic")
    hidden |= {child for group in groups for child in group.children if model.sites[child].kind == "observed"}
    samples = [item for item in model.sites.items() if item[1].kind in ("latent", "observed")]
    return Structure(
        groups,
        tuple(sorted(hidden | marginalized)),
        tuple((name, reasons[name]) for name in retained),
        tuple((name, site.kind == "observed") for name, site in samples),
        tuple((name, len(model.sites[name].shape)) for name in retained),
    )


def _components(model, names):
    """Groups of Gaussian sites that share no child and do not depend on each other."""
    parts: list[tuple[set, set]] = []
    for name in names:
        sites, touched = {name}, {name, *model.children([name])}
        apart = []
        for part in parts:
            if part[1] & touched:
                sites, touched = sites | part[0], touched | part[1]
            else:
                apart.append(part)
        parts = [*apart, (sites, touched)]
    order = list(model.sites)
    return [
        Group("gaussian", *(tuple(sorted(members, key=order.index)) for members in (sites, touched - sites)))
        for sites, touched in parts
    ]


def _obstacle(model, name, kind, gaussian, others):
    """Why a site cannot be integrated out along with those that are, or None."""
    site = model.sites[name]
    if kind is None or site.obstacle is not None:
        *kinds, last = (family.__name__ for family in KINDS)
        why = site.obstacle or f"is {label(site.family)}"
        return f"it {why}, and only {', '.join(kinds)} and {last} sites are integrated out"
    edges = GAUSSIAN if kind == "gaussian" else EDGES[kind]
    group = [*gaussian, name] if kind == "gaussian" else [name]
    taken = {found: other.sites[0] for other in others for found in (*other.sites, *other.children)}
    if kind != "gaussian":
        taken |= {child: site for site in gaussian for child in model.children([site])}
        taken |= {site: site for site in gaussian}
    for (child, part), flow in model.dependents(group).items():
        found = model.sites[child]
        if found.kind == "deterministic":
            continue
        if found.family is dist.distribution.Unit:
            return f"the factor {child!r} depends on it"
        if part in ("observed value", "scale factor"):
            return f"the {part} of {child!r} depends on it"
        if found.obstacle is not None:
            return f"its child {child!r} {found.obstacle}"
        if found.family not in edges:
            return f"its child {child!r} is {label(found.family)}"
        if taken.get(child) == child:
            return f"its child {child!r} is integrated out"
        if child in taken:
            return f"its child {child!r} is one of {taken[child]!r} too, which is integrated out"
        if kind == "gaussian":
            why = _gaussian_obstacle(model, name, child, part, flow, gaussian)
        else:
            why = _edge_obstacle(model, name, child, part, flow, kind)
        if why is not None:
            return why
    return None


def _gaussian_obstacle(model, name, child, part, flow, gaussian):
    if part != "loc":
        return f"the scale of {child!r} depends on it"
    if flow <= Dependence.AFFINE:
        return None
    if model.dependents([name]).get((child, "loc"), Dependence.NONE) <= Dependence.AFFINE:
        return f"the loc of {child!r} is not affine in it and {gaussian[::-1]} jointly"
    return f"the loc of {child!r} is not affine in it"


def _edge_obstacle(model, name, child, part, flow, kind):
    link = EDGES[kind][model.sites[child].family].link
    if link == "precision" and part == "scale":
        return None  # the precision says it
    if part != link:
        return f"the {part} of {child!r} depends on it"
    source, output = model.latents.index(name), model.outputs.index((child, part))
    is_edge = flow < Dependence.OTHER and is_proportional(
        model.closed, source, output, factor_one=kind == "beta"
    )
    if is_edge:
        return None
    if kind == "beta":
        return f"the {link} of {child!r} are not, element by element, elements of it"
    return f"the {link} of {child!r} is not, element by element, a multiple of an element of it"
