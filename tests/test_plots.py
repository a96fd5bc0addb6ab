"""Pictures: what is drawn is what was computed, and nothing global changes."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import smcdiff
from smcdiff import plots
from smcdiff.calibration import Calibration, LocalCoverage, ecdf_bands, expected_coverage
from smcdiff.metrics import Distance
from smcdiff.plots.chains import CHAIN_PLOTS
from smcdiff.run import Trace
from smcdiff.smc import SMCInfo, SMCResult


def _result(num_chains=2, num_particles=16, num_steps=6, shape=(5, 4)):
    """Particles whose weights are far from even, with resampling at every other step."""
    rng = np.random.default_rng(0)
    log_weights = rng.normal(size=(num_chains, num_particles)) * 2
    log_weights -= np.logaddexp.reduce(log_weights, axis=1, keepdims=True)
    ancestors = np.sort(rng.integers(0, num_particles, size=(num_chains, num_steps, num_particles)), axis=-1)
    ancestors[:, ::2] = np.arange(num_particles)
    increments = rng.normal(size=(num_chains, num_steps))
    info = SMCInfo(
        ess=rng.uniform(1, num_particles, size=(num_chains, num_steps)),
        resampled=np.broadcast_to(np.arange(num_steps) % 2 == 1, (num_chains, num_steps)),
        ancestors=ancestors,
        log_evidence_increment=increments,
        num_invalid=np.zeros((num_chains, num_steps), int),
        move_info=None,
    )
    return SMCResult(
        particles=rng.uniform(size=(num_chains, num_particles, *shape)),
        log_weights=log_weights,
        log_evidence=increments.sum(axis=1) + 0.5,
        info=info,
        log_weights_by_step=np.zeros((num_chains, num_steps, num_particles)),
    )


def _trace():
    rng = np.random.default_rng(1)
    info = {"energy": rng.normal(size=(2, 50)), "acceptance_rate": rng.uniform(size=(2, 50))}
    return Trace(
        samples={"a": rng.normal(size=(2, 50)), "b": rng.normal(size=(2, 50))}, info=info, state=None
    )


def test_a_picture_of_a_weighted_posterior_shows_weighted_means():
    result = _result()
    figure = plots.plot_posterior(result, truth=result.particles[0, 0], num_draws=3)
    images = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    weights = np.exp(result.pooled_log_weights())[..., None, None]
    mean = np.sum(weights * result.particles, axis=(0, 1))
    assert np.abs(result.particles.mean((0, 1)) - mean).max() > 0.05  # else weights would not show
    np.testing.assert_allclose(images["posterior mean"], mean, rtol=1e-6)
    std = np.sqrt(np.sum(weights * (result.particles - mean) ** 2, axis=(0, 1)))
    np.testing.assert_allclose(images["posterior sd"], std, rtol=1e-6)
    np.testing.assert_allclose(images["truth"], result.particles[0, 0])
    assert sum(title.startswith("draw ") for title in images) == 3


def test_a_picture_of_draws_shows_their_quantiles():
    draws = np.random.default_rng(2).normal(size=(2, 300, 3, 3))
    figure = plots.plot_posterior(draws, level=0.5, num_draws=2)
    images = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    low, high = np.quantile(draws, [0.25, 0.75], axis=(0, 1))
    np.testing.assert_allclose(images["width of the 50 % intervals"], high - low, rtol=1e-6)


def test_the_evidence_ends_at_the_estimate():
    result = _result()
    whole, spread = plots.plot_log_evidence(result).axes
    ends = [line.get_ydata()[-1] for line in whole.lines]
    np.testing.assert_allclose(ends, result.log_evidence)
    np.testing.assert_allclose(
        [line.get_ydata()[-1] for line in spread.lines[:2]], result.log_evidence - result.log_evidence.mean()
    )


def test_lines_of_descent_are_the_ancestors():
    result = _result()
    tree, count = plots.plot_genealogy(result, chain=1).axes
    drawn = np.stack([line.get_ydata() for line in tree.lines], axis=1)
    np.testing.assert_array_equal(drawn, result.ancestor_lines()[1])
    np.testing.assert_array_equal(count.lines[0].get_ydata(), [len(set(row)) for row in drawn])
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        plots.plot_genealogy(result, chain=2)


def _calibration(pit):
    names = tuple(f"f{i}" for i in range(pit.shape[1]))
    rest = dict.fromkeys(set(Calibration._fields) - {"names", "pit"})
    return Calibration(names=names, pit=pit, **rest)


def test_ranks_that_leave_the_bands_are_named():
    """A right function leaves bands of .999 with probability .001; truths as wide as twice the posterior must."""
    rng = np.random.default_rng(3)
    narrow = np.clip(0.5 + 1.6 * (rng.uniform(size=300) - 0.5), 0, 1)
    figure = plots.plot_ranks(_calibration(np.stack([rng.uniform(size=300), narrow], axis=1)), prob=0.999)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["f0", "f1: outside"]
    line, bands = figure.axes[1].lines[0], ecdf_bands(100, 300, 0.999)
    expected = np.array([np.mean(narrow <= z) for z in bands.points[1:-1]])
    np.testing.assert_allclose(line.get_ydata()[1:-1], expected - bands.points[1:-1], atol=1e-12)


@pytest.mark.parametrize("num_functions", [2, 20])
def test_coverage_is_drawn_at_its_levels(num_functions):
    pit = np.random.default_rng(4).uniform(size=(100, num_functions))
    coverage = expected_coverage(_calibration(pit))
    (axes,) = plots.plot_coverage(coverage).axes
    lines = [line.get_ydata() for line in axes.lines[1 : 1 + num_functions]]
    np.testing.assert_allclose(np.stack(lines, axis=1), coverage.coverage)


def test_local_coverage_is_a_map():
    z = np.random.default_rng(5).normal(size=(6, 7))
    bins = np.array([0.85, 0.9, 0.95])
    local = LocalCoverage(
        0.9, 0.9 + 0.01 * z, 0.01, z, np.linspace(0.1, 0.4, 4), bins, 0.01 * np.ones(3), np.ones(3, int)
    )
    figure = plots.plot_local_coverage(local)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), z)
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), bins)


def test_distances_are_in_floors():
    distances = {"ours": Distance(0.3, 0.01, 0.2), "theirs": Distance(1.0, 0.05, 0.2)}
    (axes,) = plots.plot_distances(distances).axes
    points = axes.lines[1].get_xdata()
    np.testing.assert_allclose(points, [1.5, 5.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "theirs"]
    with pytest.raises(ValueError, match="at least one"):
        plots.plot_distances({})


@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")  # within ArviZ 0.23
@pytest.mark.parametrize("kind", list(CHAIN_PLOTS))
def test_pictures_of_arviz_in_either_line(kind):
    before = dict(matplotlib.rcParams)
    data = _trace()
    if kind == "posterior predictive":
        replicas = np.random.default_rng(6).normal(size=(2, 50, 20))
        data = smcdiff.to_arviz(
            data, posterior_predictive={"y": replicas}, observed_data={"y": replicas[0, 0]}
        )
    figure = plots.plot_chains(data, kind)
    assert isinstance(figure, Figure)
    assert any(axes.lines or axes.collections or axes.patches for axes in figure.axes)
    assert dict(matplotlib.rcParams) == before
    matplotlib.pyplot.close("all")


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'corner'"):
        plots.plot_chains(_trace(), "corner")
