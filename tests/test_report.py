"""The report: each figure against an independent computation, each file against a reader of its format."""

import json
import os
import re
import time
from pathlib import Path

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray
from PIL import Image
from rows import quick

import smcdiff
from smcdiff import inverse, plots, report
from smcdiff.diagnostics import estimates
from smcdiff.inverse import InverseProblem, dense, identity, simulate_problem
from smcdiff.report import data as report_data
from smcdiff.smc import SMCInfo, SMCResult

SHAPE = (8, 8)


def _images(count, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(count, *shape)).astype(np.float32)


def _result(particles, log_weights, log_evidence, num_steps=3, num_invalid=0):
    """A result whose history is made up: only the particles and the weights count."""
    chains, num_particles = log_weights.shape
    history = np.broadcast_to(np.asarray(log_evidence)[:, None] / num_steps, (chains, num_steps))
    info = SMCInfo(
        ess=np.linspace(num_particles, 2.0, chains * num_steps).reshape(chains, num_steps),
        resampled=np.arange(chains * num_steps).reshape(chains, num_steps) % 2 == 1,
        ancestors=np.broadcast_to(np.arange(num_particles), (chains, num_steps, num_particles)),
        log_evidence_increment=history.astype(np.float32),
        num_invalid=np.full((chains, num_steps), num_invalid),
    )
    by_step = np.broadcast_to(log_weights[:, None], (chains, num_steps, num_particles))
    return SMCResult(particles, log_weights.astype(np.float32), np.asarray(log_evidence), info, by_step)


def _random_result(chains=3, num_particles=20, shape=SHAPE, seed=1):
    rng = np.random.default_rng(seed)
    log_weights = rng.normal(size=(chains, num_particles))
    log_weights -= np.logaddexp.reduce(log_weights, axis=1, keepdims=True)
    particles = _images(chains * num_particles, shape, seed).reshape(chains, num_particles, *shape)
    return _result(particles, log_weights, rng.normal(size=chains) - 40.0)


def _problem(name="inpaint", shape=SHAPE, **options):
    return report.make_problem(jax.random.key(0), name, _images(1, shape)[0], 0.1, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of a real run with an exact model: (folder, summary, result, problem, truth)."""
    truth, *data = _images(13)
    model = smcdiff.EmpiricalDiffusion(jnp.asarray(np.stack(data)), 0.3, smcdiff.schedules.vp())
    problem = report.make_problem(jax.random.key(1), "inpaint", truth, 0.5)
    with report.stopwatch() as watch:
        result = smcdiff.posterior(
            jax.random.key(2),
            model,
            problem,
            num_particles=16,
            num_chains=3,
            num_steps=6,
            twist=smcdiff.guidance.pigdm,
            progress=False,
        )
    folder = tmp_path_factory.mktemp("report") / "new" / "demo"
    summary = report.write_report(
        folder,
        result,
        problem,
        truth,
        rng_key=jax.random.key(3),
        title="A <title>",
        settings={"noise": 0.5, "mask": "center"},
        watch=watch,
        source="print('<code>')",
        ess_threshold=0.5,
    )
    return folder, summary, result, problem, truth


def _read(folder):
    """The data of a report, through ArviZ: netCDF, or zarr where h5py is missing."""
    netcdf = folder / "posterior.nc"
    return arviz.from_netcdf(netcdf) if netcdf.exists() else arviz.from_zarr(folder / "posterior.zarr")


# The folder and its files


def test_folder_holds_the_report_and_nothing_else(written):
    folder, summary, *_ = written
    expected = set(report.REPORT_FILES) - set(report_data.DATA_FILES) | {summary["data_file"]}
    assert {path.name for path in folder.iterdir()} == expected
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]
    assert oct(folder.stat().st_mode & 0o700) == "0o700"


def test_summary_file_is_what_was_returned(written):
    folder, summary, *_ = written
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert set(summary["versions"]) >= {"smcdiff", "jax", "arviz", "numpy", "python"}
    assert summary["versions"]["smcdiff"] == smcdiff.__version__
    time = summary["time"]
    assert time["total"] == pytest.approx(time["compile"] + time["run"])
    assert 0 < time["compile"] < time["total"]


def test_pictures_open_and_show_something(written):
    folder, *_ = written
    names = [name for name in report.REPORT_FILES if name.endswith(".png")]
    assert len(names) == 9
    for name in names:
        with Image.open(folder / name) as picture:
            picture.load()
            assert min(picture.size) > 200
            assert picture.convert("L").getextrema()[0] < 100, name


def test_data_reads_back_through_arviz(written):
    folder, _, result, problem, truth = written
    data = _read(folder)
    for group in ("posterior", "sample_stats", "observed_data", "constant_data", "smc"):
        assert group in (
            data.groups() if callable(data.groups) else [name.strip("/") for name in data.groups]
        )
    posterior = data["posterior"]["x"]
    assert posterior.dims == ("chain", "draw", "row", "col")
    assert posterior.shape == (3, 16, *SHAPE)
    # Each draw is one of its chain's particles: the one that sample_stats names.
    chosen = data["sample_stats"]["particle"].values
    for chain in range(3):
        np.testing.assert_array_equal(posterior.values[chain], result.particles[chain][chosen[chain]])
    np.testing.assert_array_equal(data["observed_data"]["y"].values, problem.y)
    np.testing.assert_array_equal(data["constant_data"]["truth"].values, truth)
    np.testing.assert_array_equal(data["constant_data"]["unobserved"].values, inverse.unobserved(problem))
    np.testing.assert_allclose(data["constant_data"]["noise_std"].values, 0.5, rtol=1e-6)
    np.testing.assert_array_equal(data["smc"]["ess"].values, result.ess)
    assert json.loads(data.attrs["settings"]) == {"noise": 0.5, "mask": "center"}


def test_data_are_netcdf_where_that_can_be_written(tmp_path):
    pytest.importorskip("h5netcdf")
    pytest.importorskip("h5py")
    data = smcdiff.to_arviz(_random_result(), problem=_problem())
    assert report_data.save_data(data, tmp_path) == "posterior.nc"
    again = arviz.from_netcdf(tmp_path / "posterior.nc")
    np.testing.assert_array_equal(again["posterior"]["x"].values, data["posterior"]["x"].values)


def test_data_without_h5netcdf(tmp_path, monkeypatch):
    result, problem = _random_result(), _problem()
    data = smcdiff.to_arviz(result, problem=problem)
    monkeypatch.setattr(report_data, "_installed", lambda package: package == "zarr")
    assert report_data.save_data(data, tmp_path) == "posterior.zarr"
    with xarray.open_datatree(tmp_path / "posterior.zarr", engine="zarr") as tree:
        np.testing.assert_array_equal(tree["posterior/x"].values, data["posterior"]["x"].values)
    monkeypatch.setattr(report_data, "_installed", lambda package: False)
    assert report_data.save_data(data, tmp_path) == "posterior.npz"
    with np.load(tmp_path / "posterior.npz") as arrays:
        np.testing.assert_array_equal(arrays["posterior/x"], data["posterior"]["x"].values)
        np.testing.assert_array_equal(arrays["smc/ess"], result.ess)


def test_page_is_self_contained(written):
    folder, summary, *_ = written
    page = (folder / "report.html").read_text()
    sources = re.findall(r'\bsrc="([^"]*)"', page)
    page = re.sub(r"base64,[\w+/=]*", "", page)  # in which any short word may occur
    assert not re.search(r"https?:|//cdn|<script|<link|@import|url\(", page)
    assert len(sources) == 9
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert "href" not in page
    assert "A &lt;title&gt;" in page and "print(&#x27;&lt;code&gt;&#x27;)" in page
    assert f"{summary['log_evidence']['pooled']:.2f} nats" in page
    for sentence in summary["warnings"]:
        assert re.split("[<>&']", sentence)[0] in page
    assert not re.search(r"/home/|/root/|/tmp/|/work/", page)


# Figures


def test_summary_equals_an_independent_computation():
    result, problem, truth = _random_result(), _problem(), _images(1)[0]
    result.particles[:, :, 3, 3] = 0.99  # a pixel that is certain, and wrong
    samples = result.resample(jax.random.key(5))
    summary = report.summarise(result, problem, truth, samples, tolerance=0.01, peak=1.0)
    # Means and quantiles by plain loops over the pooled particles.
    evidence = np.exp(result.log_evidence)
    weights = (np.exp(result.log_weights.astype(float)) * evidence[:, None] / evidence.sum()).ravel()
    flat = result.particles.reshape(-1, 64).astype(float)
    mean = np.array([sum(w * x for w, x in zip(weights, flat[:, i], strict=True)) for i in range(64)])
    lower, upper = np.empty(64), np.empty(64)
    for i in range(64):
        pairs = sorted(zip(flat[:, i], weights, strict=True))
        total = np.cumsum([w for _, w in pairs])
        lower[i] = pairs[int(np.argmax(total >= 0.05 * total[-1]))][0]
        upper[i] = pairs[int(np.argmax(total >= 0.95 * total[-1]))][0]
    hidden = np.zeros(SHAPE, bool)
    hidden[2:6, 2:6] = True
    hidden, t = hidden.ravel(), truth.ravel().astype(float)
    inside = [(lo - 0.01 <= v <= up + 0.01) for lo, v, up in zip(lower, t, upper, strict=True)]
    assert summary["coverage"]["fraction"] == pytest.approx(np.mean(np.array(inside)[hidden]))
    assert summary["coverage"]["num_pixels"] == summary["num_unobserved"] == 16
    uncertain = hidden & (upper - lower > 0.05)
    assert summary["coverage"]["num_uncertain"] == uncertain.sum()
    assert summary["coverage"]["fraction_uncertain"] == pytest.approx(np.mean(np.array(inside)[uncertain]))
    assert summary["psnr"]["image"] == pytest.approx(-10 * np.log10(np.mean((mean - t) ** 2)))
    assert summary["psnr"]["unobserved"] == pytest.approx(-10 * np.log10(np.mean((mean - t)[hidden] ** 2)))
    misfit = (np.asarray(problem.y) - mean[~hidden]) / 0.1
    assert summary["residual_rms"] == pytest.approx(np.sqrt(np.mean(misfit**2)), rel=1e-5)
    assert summary["log_evidence"]["pooled"] == pytest.approx(np.log(evidence.mean()))
    assert summary["log_evidence"]["mean"] == pytest.approx(np.mean(result.log_evidence))
    assert summary["log_evidence"]["sd"] == pytest.approx(np.std(result.log_evidence, ddof=1))
    assert summary["log_evidence"]["standard_error"] == pytest.approx(
        np.std(result.log_evidence, ddof=1) / np.sqrt(3)
    )
    assert summary["log_evidence"]["effective_chains"] == pytest.approx(
        evidence.sum() ** 2 / np.sum(evidence**2)
    )
    assert summary["ess"]["minimum"] == result.ess.min() == 2.0
    assert (summary["ess"]["minimum_in_chain"], summary["ess"]["minimum_at_step"]) == (2, 3)
    assert summary["ess"]["pooled"] == pytest.approx(1 / np.sum(weights**2))
    assert summary["ess"]["num_resamplings"] == [1, 2, 1]


def test_rhat_and_bulk_ess_are_those_of_arviz_on_the_saved_draws(written):
    folder, summary, *_ = written
    saved = _read(folder)["posterior"]["x"].values
    where = inverse.unobserved(written[3])
    assert len(summary["quantities"]) == 6
    for name, entry in summary["quantities"].items():
        if name.startswith("pixel"):
            index = tuple(int(i) for i in re.findall(r"\d+", name))
            assert where[index]
            values = saved[(..., *index)]
        else:
            values = saved[:, :, where].mean(axis=-1)
        dataset = xarray.Dataset({"v": (("chain", "draw"), values.astype(float))})
        assert entry["rhat"] == pytest.approx(float(arviz.rhat(dataset)["v"]), rel=1e-6)
        assert entry["ess_bulk"] == pytest.approx(float(arviz.ess(dataset, method="bulk")["v"]), rel=1e-6)
        assert entry["mean"] == pytest.approx(values.mean(), rel=1e-5)
    assert summary["max_rhat"] == max(entry["rhat"] for entry in summary["quantities"].values())
    assert summary["min_ess_bulk"] == min(entry["ess_bulk"] for entry in summary["quantities"].values())


def test_coverage_of_exact_posterior_draws_is_the_level():
    # Truth and draws from one law: 90 % intervals of 400 draws hold it for 90 % of 10 000 pixels. The standard error,
    # of the truth (.003) and of the ends of the intervals together, is below .004; five of it fail once in 10^6.
    rng = np.random.default_rng(3)
    shape = (100, 100)
    scale = rng.uniform(0.5, 2.0, size=shape)
    truth = scale * rng.normal(size=shape)
    particles = scale * rng.normal(size=(1, 400, *shape))
    result = _result(particles, np.full((1, 400), -np.log(400)), np.array([0.0]))
    everywhere = np.ones(shape, bool)
    assert report.coverage(estimates.estimate(result), truth, everywhere) == pytest.approx(0.9, abs=0.02)
    assert report.coverage(estimates.estimate(result, 0.5), truth, everywhere) == pytest.approx(0.5, abs=0.03)


def test_coverage_counts_only_the_pixels_asked_for_and_the_ends():
    lower, upper = np.zeros(SHAPE), np.ones(SHAPE)
    found = estimates.Estimates(lower, lower, lower, upper, 0.9)
    truth = np.full(SHAPE, 1.1)
    truth[0, :6] = [0.0, 1.0, 0.5, -0.01, 1.01, 3.0]
    where = np.zeros(SHAPE, bool)
    where[0, :6] = True
    assert report.coverage(found, truth, where) == pytest.approx(3 / 6)
    assert report.coverage(found, truth, where, tolerance=0.011) == pytest.approx(5 / 6)


def test_psnr_in_closed_form():
    image = np.full(SHAPE, 0.25)
    assert report.psnr(image, image + 0.1) == pytest.approx(20.0)
    assert report.psnr(image, image - 0.1, peak=2.0) == pytest.approx(20.0 + 20.0 * np.log10(2.0))
    assert report.psnr(image, image) == np.inf


def test_draws_are_pooled_by_evidence():
    # Chain 1 has a hundred times the evidence, and its particle 2 three quarters of its weight.
    particles = np.arange(6.0).reshape(2, 3, 1, 1) * np.ones((1, 1, *SHAPE))
    log_weights = np.log(np.array([[1.0, 1.0, 1.0], [1e-6, 0.25, 0.75]]) / [[3.0], [1.000001]])
    result = _result(particles, log_weights, np.log([1.0, 100.0]))
    draws = estimates.pooled_draws(jax.random.key(0), result, 400)[:, 0, 0]
    share = {value: np.mean(draws == value) for value in range(6)}
    assert share[5] == pytest.approx(0.75 * 100 / 101, abs=1 / 400)  # systematic resampling: to one draw
    assert share[4] == pytest.approx(0.25 * 100 / 101, abs=1 / 400)
    assert share[3] == 0.0
    assert sum(share[value] for value in range(3)) == pytest.approx(1 / 101, abs=3 / 400)
    assert not np.all(np.diff(draws) >= 0), "sorted draws would show one mode first"


def test_scalars_compare_pixels_that_lie_apart():
    std, where = np.zeros(SHAPE), np.zeros(SHAPE, bool)
    where[4:] = True
    std[5, 5], std[5, 6], std[7, 1], std[0, 0] = 1.0, 0.9, 0.8, 5.0
    found = list(plots_free_scalars(std, where))
    assert found[:3] == ["mean of the unobserved", "pixel (5, 5)", "pixel (7, 1)"]
    assert "pixel (5, 6)" not in found and "pixel (0, 0)" not in found


def plots_free_scalars(std, where):
    from smcdiff.report.summary import scalar_quantities

    return scalar_quantities(_random_result().particles, std, where).data_vars


# What is wrong


def test_one_chain_has_no_rhat_and_no_spread(tmp_path):
    result = _random_result(chains=1)
    summary = report.write_report(
        tmp_path / "out", result, _problem(), _images(1)[0], rng_key=jax.random.key(0)
    )
    assert summary["max_rhat"] is None and summary["log_evidence"]["sd"] is None
    assert any("R-hat could not be computed" in sentence for sentence in summary["warnings"])
    assert "not available" in report.as_text(summary)


@pytest.mark.parametrize("dead", [(0,), (0, 1, 2)], ids=["one chain", "all chains"])
def test_invalid_result_is_reported_and_told(tmp_path, dead):
    result = _random_result()
    evidence, increments = result.log_evidence.copy(), result.info.log_evidence_increment.copy()
    evidence[list(dead)] = -np.inf
    increments[list(dead), 1:] = -np.inf
    info = result.info._replace(log_evidence_increment=increments)
    result = result._replace(log_evidence=evidence, info=info)
    summary = report.write_report(
        tmp_path / "out", result, _problem(), _images(1)[0], rng_key=jax.random.key(0)
    )
    assert summary["valid"] is False
    told = [sentence for sentence in summary["warnings"] if sentence.startswith("NOT VALID")]
    assert len(told) == len(dead) and "in chain 0" in told[0] and "at step 2" in told[0]
    assert "This result is not valid" in (tmp_path / "out" / "report.html").read_text()
    assert (summary["psnr"]["image"] is None) == (len(dead) == 3)
    assert (summary["coverage"]["fraction"] is None) == (len(dead) == 3)
    assert "NOT VALID" in report.as_text(summary)


def test_invalid_weights_are_counted():
    result = _random_result()
    counts = np.zeros((3, 3), int)
    counts[1, 2] = 4
    result = result._replace(info=result.info._replace(num_invalid=counts))
    summary = report.summarise(result, _problem(), _images(1)[0], result.resample(jax.random.key(0)))
    assert summary["valid"] is False and summary["num_invalid_weights"] == 4
    (told,) = [s for s in report.advise(result, summary) if "NOT VALID" in s]
    assert "4 of 180 weights" in told and "step 3" in told


def test_advice_names_what_is_out_of_bounds():
    result, problem = _random_result(chains=4, num_particles=60), _problem()
    rng = np.random.default_rng(0)
    good = rng.normal(0.5, 0.1, size=result.particles.shape)
    measured = np.asarray(problem.adjoint(problem.y))
    good = np.where(inverse.unobserved(problem), good, measured).astype(np.float32)
    calm = result._replace(
        particles=good,
        log_weights=np.full((4, 60), -np.log(60.0), np.float32),
        log_evidence=np.array([-3.0, -3.1, -2.9, -3.0]),
        info=result.info._replace(ess=np.full((4, 3), 40.0)),
    )

    def advice(result):
        summary = report.summarise(result, problem, _images(1)[0], result.resample(jax.random.key(0)))
        return report.advise(result, summary)

    assert advice(calm) == []
    (told,) = advice(calm._replace(log_evidence=np.array([-3.0, -9.0, -2.0, -3.0])))
    assert told.startswith("The log evidence differs between chains by 3.2 nats")
    (told,) = advice(calm._replace(info=calm.info._replace(ess=np.full((4, 3), 1.2))))
    assert told.startswith("The effective sample size fell to 1.2 of 60")
    apart = good + np.array([0.0, 0.5, 0.0, 0.0], np.float32)[:, None, None, None] * inverse.unobserved(
        problem
    )
    (told,) = advice(calm._replace(particles=apart.astype(np.float32)))
    assert told.startswith("R-hat reaches")
    (told,) = advice(calm._replace(particles=(good + 0.3).astype(np.float32)))
    assert told.startswith("The posterior mean misses the measurement by 3.0")


# Problems


@pytest.mark.parametrize(
    ("mask", "hidden"),
    [
        ("center", (slice(2, 6), slice(2, 6))),
        ("left", (slice(None), slice(0, 4))),
        ("right", (slice(None), slice(4, 8))),
        ("top", (slice(0, 4), slice(None))),
        ("bottom", (slice(4, 8), slice(None))),
    ],
)
def test_masks_hide_what_they_say(mask, hidden):
    expected = np.zeros(SHAPE, bool)
    expected[hidden] = True
    np.testing.assert_array_equal(inverse.unobserved(_problem(mask=mask)), expected)


@pytest.mark.parametrize("shape", quick([(8, 8), (1, 8, 8), (3, 12, 8)], (3, 12, 8)))
@pytest.mark.parametrize("name", ["inpaint", "deblur", "superres"])
def test_problems_measure_the_image_with_the_noise(name, shape):
    truth = _images(1, shape)[0]
    problem = report.make_problem(jax.random.key(0), name, truth, 1e-6)
    np.testing.assert_allclose(problem.y, problem.operator(truth), atol=1e-4)
    assert inverse.unobserved(problem).all() == (name != "inpaint")
    panels = plots.image_panels(problem, truth, estimates.estimate(_random_result(shape=shape)))
    assert {panel.image.shape[:2] for panel in panels if panel.name == "truth"} == {shape[-2:]}
    for panel in panels:
        plots.plot_panel(panel)


def test_default_sizes_of_blocks_and_blur():
    assert _problem("superres").y.shape == (4, 4)
    assert _problem("superres", (28, 28)).y.shape == (7, 7)
    assert _problem("superres", (30, 30)).y.shape == (15, 15)
    assert _problem("superres", factor=4).y.shape == (2, 2)
    assert _problem("deblur", (28, 28)).operator.kernel.shape == (17, 17)  # width 2, out to 4 widths


def test_unobserved_is_everything_for_operators_that_mix_or_keep_all_pixels():
    rng = np.random.default_rng(0)
    for operator in (identity(SHAPE), dense(rng.normal(size=(5, 64)).astype(np.float32), SHAPE)):
        assert inverse.unobserved(InverseProblem(operator, jnp.zeros(operator.output_shape), 0.1)).all()


def test_measurement_of_a_general_operator_is_drawn_by_its_adjoint():
    matrix = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    problem = simulate_problem(jax.random.key(0), dense(matrix, SHAPE), jnp.asarray(_images(1)[0]), 0.1)
    panels = {
        p.name: p for p in plots.image_panels(problem, _images(1)[0], estimates.estimate(_random_result()))
    }
    np.testing.assert_allclose(
        panels["measurement"].image, (matrix.T @ np.asarray(problem.y)).reshape(SHAPE), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: _problem("outpaint"), "problem must be one of"),
        (lambda: _problem(mask="middle"), "mask must be one of"),
        (lambda: _problem("superres", factor=3), "factor"),
        (lambda: _problem("deblur", blur_width=-1.0), "width"),
        (lambda: report.make_problem(jax.random.key(0), "deblur", np.zeros((4, 4)), np.nan), "noise"),
        (lambda: report.make_problem(jax.random.key(0), "deblur", np.zeros((4, 4)), 0.0), "noise"),
        (
            lambda: report.make_problem(jax.random.key(0), "deblur", np.zeros(4), 0.1),
            "truth must be an image",
        ),
        (lambda: plots.as_picture(np.zeros((2, 4, 4))), "are of images"),
        (lambda: report.Settings(model="m", problem="inpaint", image=1).missing, None),
    ],
)
def test_wrong_arguments_are_told(call, told):
    with pytest.raises(ValueError if told else AttributeError, match=told):
        call()


# Images


def test_pictures_are_read_grey_or_in_colour(tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, size=(4, 6, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    grey = np.asarray(Image.fromarray(colour).convert("L")) / np.float32(255)
    np.testing.assert_array_equal(report.read_image(tmp_path / "colour.png", (4, 6)), grey)
    np.testing.assert_array_equal(report.read_image(tmp_path / "colour.png", (1, 4, 6)), grey[None])
    read = report.read_image(tmp_path / "colour.png", (3, 4, 6), (-1.0, 1.0))
    np.testing.assert_allclose(read, np.moveaxis(colour, -1, 0) / 127.5 - 1.0, atol=1e-6)
    assert read.dtype == np.float32
    deep = rng.integers(0, 65536, size=(4, 6)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_allclose(report.read_image(tmp_path / "deep.png", (4, 6)), deep / 65535, rtol=1e-6)


def test_pictures_that_do_not_fit_are_refused(tmp_path):
    Image.new("L", (6, 4)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"6 pixels wide and 4 high, the model needs 28 wide and 28 high"):
        report.read_image(tmp_path / "small.png", (28, 28))
    with pytest.raises(ValueError, match="there is no file"):
        report.read_image(tmp_path / "none.png", (28, 28))
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        report.read_image(tmp_path / "text.png", (28, 28))
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        report.read_image(tmp_path, (28, 28))
    with pytest.raises(ValueError, match="no grey or colour images"):
        report.read_image(tmp_path / "small.png", (24,))


# The folder that is complete or not there


def test_crash_leaves_nothing(tmp_path, monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("in the middle")

    monkeypatch.setattr("smcdiff.report.write.render", crash)  # after data, figures and pictures were written
    with pytest.raises(RuntimeError, match="in the middle"):
        report.write_report(
            tmp_path / "above" / "out", _random_result(), _problem(), _images(1)[0], rng_key=jax.random.key(0)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_crash_keeps_the_old_report(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").write_text("old")
    with pytest.raises(error), report.new_folder(out, force=True, replaceable=["summary.json"]) as partial:
        (partial / "summary.json").write_text("new")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "summary.json").read_text() == "old"


def test_folder_is_replaced_only_if_told_to_and_only_a_report(tmp_path):
    out = tmp_path / "out"

    def fill(text, **options):
        with report.new_folder(out, replaceable=["summary.json"], **options) as partial:
            (partial / "summary.json").write_text(text)

    fill("first")
    with pytest.raises(report.FolderError, match="not empty: add --force"):
        fill("second")
    assert (out / "summary.json").read_text() == "first"
    fill("third", force=True)
    assert (out / "summary.json").read_text() == "third"
    (out / "thesis.tex").write_text("years")
    with pytest.raises(report.FolderError, match=r"thesis\.tex"):
        fill("fourth", force=True)
    assert (out / "thesis.tex").read_text() == "years"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_old_report_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").write_text("old")
    rename = os.rename

    def fail_at_the_last_move(source, target):
        if ".partial-" in Path(source).name and not Path(source).name.endswith(".old"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_the_last_move)
    with pytest.raises(OSError, match="no"), report.new_folder(out, force=True, replaceable=["summary.json"]):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "summary.json").read_text() == "old"


def test_folder_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for path, told in (("file", "is no folder"), ("file/below", "cannot write"), (".", "working directory")):
        with pytest.raises(report.FolderError, match=told), report.new_folder(path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_empty_folder_is_used_and_one_filled_meanwhile_is_not(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with report.new_folder(out) as partial:
        (partial / "a").write_text("mine")
    assert (out / "a").read_text() == "mine"
    other = tmp_path / "other"
    with pytest.raises(report.FolderError, match="not empty"), report.new_folder(other) as partial:
        (partial / "a").write_text("mine")
        other.mkdir()
        (other / "a").write_text("theirs")
    assert (other / "a").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


# The stopwatch, the look, the card


def test_stopwatch_counts_overlapping_stretches_once():
    watch = report.Stopwatch(10.0, [(0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (5.0, 6.0)])
    assert watch.compile == pytest.approx(4.0)
    assert watch.run == pytest.approx(6.0)


def test_stopwatch_sees_compilation_and_nothing_else():
    @jax.jit
    def function(x):
        return jnp.sin(x) @ jnp.cos(x)

    x = jnp.ones((3, 3))
    with report.stopwatch() as first:
        function(x).block_until_ready()
    with report.stopwatch() as second:
        function(x).block_until_ready()
        time.sleep(0.05)
    assert 0 < first.compile <= first.total
    assert second.compile == 0.0 and second.run >= 0.05
    with report.stopwatch() as third:
        pass
    jax.jit(lambda x: x + 1)(x)
    assert third.stretches == [], "the listener outlived its block"


def test_style_changes_nothing_outside():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with plots.style():
        assert matplotlib.rcParams["image.interpolation"] == "nearest"
    assert dict(matplotlib.rcParams) == before


def test_hidden_pixels_are_marked_and_grey_images_are_not_smoothed():
    problem, truth = _problem(), _images(1)[0]
    panels = {p.name: p for p in plots.image_panels(problem, truth, estimates.estimate(_random_result()))}
    np.testing.assert_array_equal(np.isnan(panels["measurement"].image), inverse.unobserved(problem))
    figure = plots.plot_panel(panels["measurement"])
    (drawn,) = figure.axes[0].images
    assert drawn.get_interpolation() == "nearest" and drawn.get_clim() == (0.0, 1.0)
    assert figure.axes[0].get_title() == "measurement"


def test_card_is_described_with_what_it_has():
    card = {"event_shape": [8, 8], "description": "Small things.", "num_parameters": 1234567}
    text = report.describe_card("tiny", card)
    assert text.splitlines()[0] == "tiny"
    assert "1,234,567" in text and "(8, 8)" in text and "loss" not in text
    for name, card in smcdiff.models().items():
        text = report.describe_card(name, card)
        assert card["data"]["licence"] in text and card["description"] in text and "denoising mse" in text
