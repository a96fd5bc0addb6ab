"""The command: what it writes, what it refuses, and that it leaves nothing half-written."""

import contextlib
import dataclasses
import html
import io
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray
from PIL import Image

import smcdiff
from smcdiff import checkpoints, cli, inverse, report
from smcdiff.report import experiment
from smcdiff.report.data import DATA_FILES

NUM_HELD_OUT = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a model with random weights, which compiles in a moment."""
    card = {
        "description": "Nothing in particular.",
        "event_shape": [8, 8],
        "pixel_range": [0, 1],
        "schedule": {"name": "vp", "arguments": {}},
        "prediction": "edm",
        "sigma_data": 0.5,
        "network": {"class": "MLP", "arguments": {"width": 8, "blocks": 1, "embedding": 8}},
    }
    folder = tmp_path_factory.mktemp("models") / "tiny"
    checkpoints.save_model(folder, checkpoints.build_model(card, jax.random.key(0)), card)
    images = np.random.default_rng(0).integers(0, 17, size=(NUM_HELD_OUT, 8, 8)).astype(np.uint8)
    np.savez(folder / "heldout.npz", images=images, labels=np.arange(NUM_HELD_OUT), scale=16)
    return folder


def _arguments(model, out, /, **changes):
    """A command line that works, with some options changed (None leaves one out)."""
    options = {"model": model, "problem": "inpaint", "image": 2, "twist": "pigdm", "out": out}
    options |= {"particles": 6, "chains": 2, "steps": 4} | changes
    given = {key: value for key, value in options.items() if value is not None}
    return ["posterior", "--no-progress", *(f"--{k.replace('_', '-')}={v}" for k, v in given.items())]


def _status(arguments):
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code


# What it does


@pytest.fixture(scope="module")
def demo(tiny, tmp_path_factory):
    """One run from the command line to the report: (folder, what was printed, summary)."""
    out = tmp_path_factory.mktemp("cli") / "runs" / "demo"
    printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed[0]), contextlib.redirect_stderr(printed[1]):
        assert _status(_arguments(tiny, out, mask="center", noise=0.3, seed=4)) == 0
    assert printed[1].getvalue() == ""
    return out, printed[0].getvalue(), json.loads((out / "summary.json").read_text())


def test_posterior_writes_a_report(demo, tiny):
    out, printed, summary = demo
    data_file = summary["data_file"]
    for label in ("log evidence", "min ESS", "R-hat", "bulk ESS", "PSNR", "coverage of 90 %", "compiling"):
        assert label in printed
    assert printed.endswith(f"report: {out / 'report.html'}\n")
    assert {path.name for path in out.iterdir()} == set(report.REPORT_FILES) - set(DATA_FILES) | {data_file}
    assert [path.name for path in out.parent.iterdir()] == ["demo"]
    assert summary["num_measurements"] == 48
    settings = summary["settings"]
    assert settings == {
        "model": str(tiny),
        "problem": "inpaint",
        "image": "2",
        "noise": 0.3,
        "mask": "center",
        "method": "tds",
        "twist": "pigdm",
        "twist_used": "pigdm",
        "particles": 6,
        "chains": 2,
        "steps": 4,
        "seed": 4,
        "ess_threshold": 0.5,
        "batch_size": None,
    }
    data = xarray.open_datatree(out / data_file)
    assert data["posterior"]["x"].shape == (2, 6, 8, 8)
    truth = checkpoints.held_out(str(tiny))[0][2]
    np.testing.assert_array_equal(data["constant_data"]["truth"].values, truth)
    assert summary["coverage"]["tolerance"] == pytest.approx(1 / 32)  # half of one of 17 grey levels


def test_the_code_on_the_page_gives_the_same_numbers(demo, tmp_path, monkeypatch):
    out, _, summary = demo
    code = report.python_source(summary["settings"])
    assert html.escape(code) in (out / "report.html").read_text()
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    again = json.loads((tmp_path / "my_report" / "summary.json").read_text())
    for key in ("log_evidence", "ess", "quantities", "psnr", "residual_rms"):
        assert again[key] == summary[key], key


class _Call(Exception):
    """Raised in the place of the sampler, with its arguments."""


def _called(tiny, tmp_path, monkeypatch, **changes):
    """Arguments of the sampler that a command line leads to."""

    def call(*args, **kwargs):
        raise _Call(args, kwargs)

    monkeypatch.setattr(experiment, "posterior", call)
    with pytest.raises(_Call) as caught:
        _status(_arguments(tiny, tmp_path / "out", **changes))
    return caught.value.args


@pytest.mark.parametrize(
    ("problem", "option", "shape"),
    [
        ("inpaint", {"mask": "left"}, (32,)),
        ("inpaint", {}, (48,)),
        ("deblur", {"blur_width": 1.5}, (8, 8)),
        ("superres", {}, (4, 4)),
        ("superres", {"factor": 4}, (2, 2)),
    ],
)
def test_problem_and_settings_reach_the_sampler(tiny, tmp_path, monkeypatch, problem, option, shape):
    changes = {"batch_size": 3, "ess_threshold": 0.25, "noise": 0.2, **option}
    (_, model, measured), kwargs = _called(tiny, tmp_path, monkeypatch, problem=problem, **changes)
    assert measured.y.shape == shape and float(measured.noise.std) == pytest.approx(0.2)
    assert model.event_shape == (8, 8)
    assert kwargs == {
        "method": "tds",
        "num_particles": 6,
        "num_chains": 2,
        "num_steps": 4,
        "twist": smcdiff.guidance.pigdm,
        "ess_threshold": 0.25,
        "batch_size": 3,
        "progress": False,
    }


def test_twist_and_rank_reach_the_sampler(tiny, tmp_path, monkeypatch):
    assert _called(tiny, tmp_path, monkeypatch, twist="dps")[1]["twist"] is smcdiff.guidance.dps
    assert _called(tiny, tmp_path, monkeypatch, twist="moments", rank=3)[1]["twist"].rank == 3
    every = _called(tiny, tmp_path, monkeypatch, twist="moments")[1]["twist"]
    assert every.rank is None
    assert _called(tiny, tmp_path, monkeypatch, twist="default")[1]["twist"] is None


def test_code_names_twist_option_and_picture():
    settings = dataclasses.asdict(
        experiment.Settings("digits", "superres", image="a.png", twist="moments", rank=2)
    )
    code = report.python_source(settings | {"factor": 2})
    assert (
        "moment_matching(2)" in code
        and "factor=2" in code
        and "report.read_image('a.png', model.event_shape)" in code
    )
    assert "moment_matching()" in report.python_source(settings | {"rank": None})
    compile(code, "page", "exec")


def test_a_picture_is_an_image_too(tiny, tmp_path, monkeypatch):
    values = np.random.default_rng(1).integers(0, 256, size=(8, 8)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    (_, _, problem), _ = _called(tiny, tmp_path, monkeypatch, image=tmp_path / "picture.png", noise=1e-6)
    hidden = inverse.unobserved(problem)
    np.testing.assert_allclose(problem.adjoint(problem.y), np.where(hidden, 0, values / 255), atol=1e-4)


def test_seed_decides_the_noise(tiny, tmp_path, monkeypatch):
    first, again, other = (
        np.asarray(_called(tiny, tmp_path, monkeypatch, seed=seed)[0][2].y) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_progress_is_shown_on_stderr(tiny, tmp_path, capsys):
    arguments = _arguments(tiny, tmp_path / "out")
    arguments.remove("--no-progress")
    assert _status(arguments) == 0
    printed = capsys.readouterr()
    assert "compiled" in printed.err and "/4 [" in printed.err
    assert "/4 [" not in printed.out


def test_defaults_in_the_help_are_those_of_the_settings(capsys):
    assert _status(["posterior", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    told = {entry.split()[0]: entry for entry in re.split(r" (?=--)", text)}
    for field in dataclasses.fields(experiment.Settings):
        entry = told[f"--{field.name.replace('_', '-')}"]
        if field.default is not dataclasses.MISSING and field.default is not None:
            assert f"({field.default})" in entry
    assert "exit status" in text


def test_models_are_listed(capsys):
    assert _status(["models"]) == 0
    printed = capsys.readouterr().out
    for name, card in smcdiff.models().items():
        assert re.search(rf"^{name}$", printed, re.MULTILINE)
        for entry in (card["description"], f"{card['num_parameters']:,}", card["data"]["licence"]):
            assert entry in printed


def test_version(capsys):
    assert _status(["--version"]) == 0
    assert capsys.readouterr().out == f"smcdiff {smcdiff.__version__}\n"


def test_reading_the_command_line_imports_nothing_heavy():
    path = Path(cli.__file__)
    code = f"import runpy, sys; runpy.run_path({str(path)!r}, run_name='cli'); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "arviz", "matplotlib", "smcdiff"} & set(found.stdout.split())


# What it refuses

BAD = {
    "unknown model": ({"model": "nosuchmodel"}, "--model", "digits"),
    "unknown problem": ({"problem": "outpaint"}, "--problem", "inpaint, deblur, superres"),
    "unknown method": ({"method": "nuts"}, "--method", "tds"),
    "unknown twist": ({"twist": "guess"}, "--twist", "pigdm"),
    "unknown mask": ({"mask": "middle"}, "--mask", "center, left, right, top, bottom"),
    "mask of another problem": ({"problem": "deblur", "mask": "left"}, "--mask", "inpaint"),
    "factor of another problem": ({"factor": "2"}, "--factor", "superres"),
    "factor that does not divide": ({"problem": "superres", "factor": "3"}, "--factor", "8"),
    "rank without moments": ({"rank": "2"}, "--rank", "moments"),
    "image beyond the last": ({"image": str(NUM_HELD_OUT)}, "--image", f"0 to {NUM_HELD_OUT - 1}"),
    "image below the first": ({"image": "-1"}, "--image", f"0 to {NUM_HELD_OUT - 1}"),
    "image that is not there": ({"image": "none.png"}, "--image", "none.png"),
    "image of another size": ({"image": "small.png"}, "--image", "5 pixels wide and 3 high"),
    "image that is none": ({"image": "text.png"}, "--image", "cannot be read"),
    "noise of zero": ({"noise": "0"}, "--noise", "positive"),
    "noise below zero": ({"noise": "-0.1"}, "--noise", "positive"),
    "noise that is not a number": ({"noise": "nan"}, "--noise", "positive"),
    "noise without end": ({"noise": "inf"}, "--noise", "positive"),
    "noise that is a word": ({"noise": "loud"}, "--noise", "positive"),
    "no particles": ({"particles": "0"}, "--particles", "at least 1"),
    "half a particle": ({"particles": "2.5"}, "--particles", "at least 1"),
    "particles in words": ({"particles": "many"}, "--particles", "at least 1"),
    "one step": ({"steps": "1"}, "--steps", "at least 2"),
    "no chain": ({"chains": "0"}, "--chains", "at least 1"),
    "rank of zero": ({"rank": "0"}, "--rank", "at least 1"),
    "batches of nothing": ({"batch_size": "0"}, "--batch-size", "at least 1"),
    "threshold above one": ({"ess_threshold": "1.5"}, "--ess-threshold", "between 0 and 1"),
    "threshold that is not a number": ({"ess_threshold": "nan"}, "--ess-threshold", "between 0 and 1"),
    "seed below zero": ({"seed": "-1"}, "--seed", "at least 0"),
    "seed too large": ({"seed": str(2**32)}, "--seed", "2**32"),
    "blur of no width": ({"problem": "deblur", "blur_width": "0"}, "--blur-width", "positive"),
    "no model": ({"model": None}, "--model", "required"),
    "no problem": ({"problem": None}, "--problem", "required"),
    "no folder": ({"out": None}, "--out", "required"),
    "unknown option": ({"particle": "3"}, "--particle", "unrecognized"),
}


@pytest.mark.parametrize(("changes", "named", "told"), BAD.values(), ids=BAD)
def test_bad_input_is_told_in_one_line(tiny, tmp_path, monkeypatch, capsys, changes, named, told):
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.chdir(files)
    Image.new("L", (5, 3)).save("small.png")
    Path("text.png").write_text("no picture")
    assert _status(_arguments(tiny, tmp_path / "new" / "out", **changes)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("smcdiff")
    assert named in printed.err and told in printed.err
    assert "Traceback" not in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["files"]
    assert {path.name for path in files.iterdir()} == {"small.png", "text.png"}


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["models", "--verbose"]])
def test_bad_command_is_told_in_one_line(capsys, arguments):
    assert _status(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "error" in printed.err


def test_damaged_model_is_told(tiny, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(weights)
    assert _status(_arguments(folder, tmp_path / "out")) == 2
    printed = capsys.readouterr().err
    assert "--model" in printed and "sha256" in printed and printed.count("\n") == 1
    (folder / "card.json").unlink()
    assert _status(_arguments(folder, tmp_path / "out")) == 2
    assert "card.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The folder


def test_a_report_is_replaced_only_with_force(tiny, demo, tmp_path, monkeypatch, capsys):
    _, _, summary = demo
    out = tmp_path / "out"

    def write(folder, *_, settings, **__):
        (folder / "summary.json").write_text(json.dumps(settings))
        return summary

    monkeypatch.setattr(experiment, "posterior", lambda *args, **kwargs: None)
    monkeypatch.setattr(experiment, "write_files", write)
    assert _status(_arguments(tiny, out)) == 0
    before = (out / "summary.json").read_bytes()
    capsys.readouterr()
    assert _status(_arguments(tiny, out, seed=1)) == 2
    printed = capsys.readouterr().err
    assert "--out" in printed and "--force" in printed and printed.count("\n") == 1
    assert (out / "summary.json").read_bytes() == before
    assert _status([*_arguments(tiny, out, seed=1), "--force"]) == 0
    assert json.loads((out / "summary.json").read_text())["seed"] == 1
    (out / "notes.txt").write_text("mine")
    assert _status([*_arguments(tiny, out), "--force"]) == 2
    assert "notes.txt" in capsys.readouterr().err
    assert (out / "notes.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_folder_is_refused_before_anything_is_computed(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(experiment, "posterior", _never)
    assert _status(_arguments(tiny, tmp_path)) == 2
    assert _status(_arguments(tiny, tmp_path / "file")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _never(*args, **kwargs):
    raise AssertionError("nothing was to be computed")


@pytest.mark.parametrize("where", ["posterior", "write_files"])
def test_a_crash_leaves_nothing(tiny, tmp_path, monkeypatch, where):
    def crash(*args, **kwargs):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(experiment, where, crash)
    with pytest.raises(RuntimeError, match="in the middle"):
        _status(_arguments(tiny, tmp_path / "above" / "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_library_is_no_wrong_argument(tiny, tmp_path, monkeypatch):
    def crash(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(experiment, "posterior", crash)
    with pytest.raises(ValueError, match="a bug"):
        _status(_arguments(tiny, tmp_path / "out"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(tiny, tmp_path, monkeypatch, capsys, number, status):
    assert threading.current_thread() is threading.main_thread()

    def interrupted(*args, **kwargs):
        assert list(tmp_path.iterdir()) != []
        signal.raise_signal(number)
        raise AssertionError("the signal did not come")

    monkeypatch.setattr(experiment, "posterior", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    inherited = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it
    try:
        assert _status(_arguments(tiny, tmp_path / "out")) == status
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capsys.readouterr().err


def test_an_invalid_result_is_told_by_the_exit_status(tiny, tmp_path, monkeypatch, capsys):
    def dead(*args, **kwargs):
        return smcdiff.posterior(*args, **kwargs)._replace(log_evidence=np.array([-np.inf, -3.0]))

    monkeypatch.setattr(experiment, "posterior", dead)
    assert _status(_arguments(tiny, tmp_path / "out")) == 1
    printed = capsys.readouterr().out
    assert "NOT VALID" in printed and "chain 0" in printed
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["valid"] is False


@pytest.mark.slow
@pytest.mark.skipif("digits" not in smcdiff.models(), reason="no model digits in this checkout")
def test_a_digit_is_inpainted(tmp_path):
    # The posterior mean is closer to the truth than the prior is: hidden pixels of these images vary by .3 to .45.
    out = tmp_path / "out"
    command = _arguments("digits", out, image=7, twist=None, particles=16, steps=40, noise=0.1)
    assert _status(command) == 0
    summary = json.loads((out / "summary.json").read_text())
    images, _ = smcdiff.held_out("digits")
    prior = report.psnr(images.mean(axis=0)[2:6, 2:6], images[7][2:6, 2:6])
    assert summary["psnr"]["unobserved"] > prior
    assert summary["residual_rms"] < 1.5
