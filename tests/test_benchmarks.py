"""The benchmarks run, their records are complete, and their distance and closed forms are right."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import quick
from scipy.stats import norm, wasserstein_distance

import smcdiff
from benchmarks import annealing, digits, evidence, table, unnormalised
from benchmarks.__main__ import main, names
from benchmarks.common import bar, format_table, joined, sliced_wasserstein, total_variation
from smcdiff import guidance, schedules

# Third-party samplers and NumPy's double precision inside: strict promotion is the library's rule, not the benchmarks'.
pytestmark = pytest.mark.lenient_promotion

MINE = ("annealing", "digits", "evidence", "gmm25", "unnormalised")
FIELDS = {
    "benchmark",
    "title",
    "settings",
    "seeds",
    "rows",
    "summary",
    "bars",
    "passed",
    "wall_s",
    "date",
    "machine",
}


@pytest.mark.parametrize("name", quick(MINE))
def test_quick_run_writes_a_complete_record(name, tmp_path, capsys):
    if name == "digits":
        pytest.importorskip("sklearn")
    out = tmp_path / f"{name}.json"
    assert main([name, "--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert FIELDS | {"versions"} <= result.keys()
    assert result["rows"] and result["summary"] and result["bars"]
    assert {"total", "compile", "run", "cpu"} <= result["wall_s"].keys()
    assert result["wall_s"]["compile"] + result["wall_s"]["run"] == pytest.approx(
        result["wall_s"]["total"], rel=1e-3
    )
    assert {"jax", "blackjax", "numpyro", "arviz", "numpy", "python"} <= result["versions"].keys()
    assert str(tmp_path) not in json.dumps(result["settings"])
    text = table.render(result)
    assert text == table.render(result)
    assert result["title"] in text and result["bars"][0]["bar"] in text
    assert "compiling" in capsys.readouterr().out


def test_benchmarks_are_found_and_unknown_names_are_refused(capsys):
    assert set(MINE) <= set(names())
    assert main(["no-such-benchmark"]) == 2
    assert "gmm25" in capsys.readouterr().err


def test_in_many_dimensions_rivals_are_told_either_width_of_the_covering_gaussian():
    problem = unnormalised.PROBLEMS["two modes, d = 64"]()
    scales = {
        s: [told.scale for told in unnormalised.coverings(problem, s)]
        for s in ("rdsmc", "parallel tempering")
    }
    assert scales == {"rdsmc": [1.2], "parallel tempering": [1.2, pytest.approx(9.6)]}
    assert len(unnormalised.coverings(unnormalised.PROBLEMS["rings"](), "parallel tempering")) == 1


def test_a_part_that_is_measured_anew_replaces_its_own_records_only():
    def result(*values):
        rows = [{"part": part, "kind": kind, "value": value} for part, kind, value in values]
        bars = [bar(f"{part}, {kind}", value, 2.0) for part, kind, value in values]
        settings = {"parts": list(dict.fromkeys(part for part, _, _ in values)), "keep": True}
        return {"title": "parts", "settings": settings, "rows": rows, "summary": rows[:1], "bars": bars}

    old = result(("a", "x", 1.0), ("a", "y", 2.0), ("b", "x", 3.0))
    new = result(("a", "y", 5.0), ("a", "z", 1.0))
    both = joined(old, new, ("part", "kind"))
    found = [tuple(row.values()) for row in both["rows"]]
    assert found == [("a", "x", 1.0), ("a", "y", 5.0), ("a", "z", 1.0), ("b", "x", 3.0)]
    assert [tuple(row.values()) for row in both["summary"]] == [("a", "x", 1.0), ("a", "y", 5.0)]
    passed = {entry["bar"] for entry in both["bars"] if entry["passed"]}
    assert both["settings"] == {"parts": ["a", "b"]}
    assert len(both["bars"]) == 4 and passed == {"a, x", "a, z"}


def test_committed_results_render():
    assert table.render_all() == table.render_all()


@pytest.mark.parametrize("p", [1, 2])
def test_sliced_wasserstein_of_a_shift(p):
    # A shift by v costs |v . direction| along each direction, for any cloud and any weights.
    rng = np.random.default_rng(0)
    x, weights, shift = rng.normal(size=(50, 3)), rng.uniform(size=50), np.array([1.0, -2.0, 0.5])
    directions = np.random.default_rng(0).normal(size=(100, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    expected = np.mean(np.abs(directions @ shift) ** p) ** (1 / p)
    found = sliced_wasserstein(x, x + shift, x_weights=weights, y_weights=weights, p=p)
    assert found == pytest.approx(expected, rel=1e-9)


def test_sliced_wasserstein_against_scipy_and_a_closed_form():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(40, 1)), rng.normal(1.0, 2.0, size=(70, 1))
    x_weights, y_weights = rng.uniform(size=40), rng.uniform(size=70)
    expected = wasserstein_distance(x[:, 0], y[:, 0], x_weights, y_weights)
    assert sliced_wasserstein(x, y, x_weights=x_weights, y_weights=y_weights) == pytest.approx(
        expected, rel=1e-9
    )
    # W2 of two normal laws: sqrt((difference of means)^2 + (difference of deviations)^2).
    quantiles = norm.ppf((np.arange(20_000) + 0.5) / 20_000)[:, None]
    assert sliced_wasserstein(quantiles, 3 + 2 * quantiles, p=2) == pytest.approx(math.sqrt(10), rel=1e-3)


@pytest.mark.parametrize("p", [1, 2])
def test_weights_mean_what_copies_mean(p):
    rng = np.random.default_rng(2)
    x, y, counts = rng.normal(size=(30, 4)), rng.normal(size=(45, 4)) + 1, rng.integers(0, 5, size=30)
    weighted = sliced_wasserstein(x, y, x_weights=counts, p=p)
    assert weighted == pytest.approx(sliced_wasserstein(np.repeat(x, counts, axis=0), y, p=p), rel=1e-9)
    x[counts == 0] = np.nan  # a particle without weight may be anything
    assert sliced_wasserstein(x, y, x_weights=counts, p=p) == pytest.approx(weighted, rel=1e-9)
    assert sliced_wasserstein(y, y[::-1], p=p) == pytest.approx(0.0, abs=1e-12)


def test_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="weights must be"):
        sliced_wasserstein(np.zeros((3, 1)), np.zeros((3, 1)), x_weights=np.array([1.0, -1.0, 1.0]))


def test_bars_and_tables():
    assert bar("a", 1.0, 1.0)["passed"] and not bar("a", float("nan"), 1.0)["passed"]
    assert bar("a", 2.0, 1.0, at_least=True)["passed"]
    assert format_table([{"a": 1, "b": 0.12345}, {"a": None, "c": True}]).splitlines() == [
        "| a   | b     | c   |",
        "| --- | ----- | --- |",
        "| 1   | 0.123 | –   |",
        "| –   | –     | yes |",
    ]
    assert total_variation([0.5, 0.5], [1.0, 0.0]) == 0.5


def test_chain_evidence_tends_to_the_exact_evidence_at_second_order():
    schedule = schedules.cosine(-9.0)
    for model, problem in evidence.gaussian_cases(schedule).values():
        _, exact = model.posterior(
            problem.operator.matrix(), np.asarray(problem.y), np.asarray(problem.noise.std)
        )

        def error(num_steps, order, model=model, problem=problem, exact=exact):
            times = smcdiff.log_snr_times(schedule, num_steps)
            return abs(evidence.chain_log_evidence(model, problem, times, order) - exact)

        assert error(400, 1) < 0.35 * error(100, 1)
        assert error(400, 2) < 0.2 * error(100, 2)
        assert error(100, 2) < 0.2 * error(100, 1)


def test_prior_chain_agrees_with_the_closed_form():
    schedule = schedules.cosine(-9.0)
    model, problem = evidence.gaussian_cases(schedule)["full covariance"]
    wide = smcdiff.InverseProblem(problem.operator, problem.y, np.array([3.0, 2.0]))
    times = smcdiff.log_snr_times(schedule, 8)
    closed = {order: evidence.chain_log_evidence(model, wide, times, order) for order in (1, 2)}
    for order in (1, 2):
        found, error = evidence.prior_chain_evidence(jax.random.key(1), model, wide, times, order, 20_000)
        assert abs(found - closed[order]) < 4 * error  # false-fail rate 6e-5
        assert abs(closed[1] - closed[2]) > 4 * error  # and the two orders are told apart


def test_chain_evidence_is_for_gaussian_data_only():
    model, problem = evidence.mixture_cases(schedules.cosine(-9.0))["mixture"]
    with pytest.raises(ValueError, match="one component"):
        evidence.chain_log_evidence(model, problem, smcdiff.log_snr_times(model.schedule, 8))


@pytest.mark.parametrize("task", quick(digits.TASKS, "half the image"))
def test_closed_form_twist_is_the_librarys(task):
    key_data, key_problem, key_x = jax.random.split(jax.random.key(0), 3)
    data = jax.random.uniform(key_data, (40, 8, 8))
    model = smcdiff.EmpiricalDiffusion(data, digits.BANDWIDTH, schedules.cosine(-9.0))
    problem = digits.draw_problem(key_problem, task, data)

    @jax.jit
    def both(log_snr):
        t = model.schedule.time_from_log_snr(log_snr)
        x = model.schedule.alpha(t) * data[3] + model.schedule.sigma(t) * jax.random.normal(key_x, (8, 8))
        return digits.ClosedFormSaddlepoint(2)(model, problem, x, t), guidance.saddlepoint(2)(
            model, problem, x, t
        )

    for log_snr in (-2.0, 0.5, 2.0):
        for found, expected in zip(*both(log_snr), strict=True):
            assert jnp.allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_the_cube_of_the_mixture_is_a_mixture():
    exact, log_integral = annealing.exact_cube()
    cells, by_quadrature = annealing.mode_weights(0.2)
    assert log_integral == pytest.approx(by_quadrature, abs=1e-9)
    # The density is the cube over its integral, wherever that is not negligible.
    scale, width = annealing.SCALE, annealing.WIDTH
    prior = smcdiff.GaussianMixture.create(np.ones(40), annealing.mode_means() / scale, (width / scale) ** 2)
    x = exact.sample(jax.random.key(0), 2000)
    cube = 3 * jax.vmap(prior.logdensity)(x) - log_integral
    np.testing.assert_allclose(jax.vmap(exact.logdensity)(x), cube, atol=1e-3)
    # Its samples fall into the cells as often as quadrature says: 40 binomials, false-fail rate below 3e-4 in all.
    found = np.bincount(annealing.nearest_mean(scale * np.asarray(x)), minlength=40) / len(x)
    assert np.all(np.abs(found - cells) < 5 * np.sqrt(cells * (1 - cells) / len(x)) + 1 / len(x))


def test_wasserstein2_of_a_shift():
    x = np.random.default_rng(0).normal(size=(50, 2))
    assert annealing.wasserstein2(x[::-1], x + [3.0, -4.0]) == pytest.approx(5.0)
