"""What is built from this checkout, and the versions it is built against."""

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _normalise(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def _pins(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


CONSTRAINTS = sorted((ROOT / "constraints").glob("py*.txt"))


def test_each_supported_python_has_constraints():
    lines = re.findall(r"Python :: 3\.(\d+)", "\n".join(_project()["classifiers"]))
    assert [path.stem for path in CONSTRAINTS] == [f"py3{minor}" for minor in lines]


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_are_plain_pins_without_an_address(path):
    text = path.read_text()
    assert "://" not in text and "@" not in text and not re.search(r"^\s*-", text, re.MULTILINE)
    for line in text.splitlines():
        assert re.fullmatch(r"#.*|[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.!]*", line), line


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_pin_every_requirement(path):
    project = _project()
    wanted = list(project["dependencies"])
    for extra in ("io", "test", "dev", "docs"):
        wanted += project["optional-dependencies"][extra]
    assert {_normalise(requirement) for requirement in wanted} <= set(_pins(path))


def test_constraints_cover_both_sides_of_arviz():
    major = {path.stem: int(_pins(path)["arviz"].split(".")[0]) for path in CONSTRAINTS}
    assert set(major.values()) == {0, 1}, major


def _build(kind, folder):
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return _build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(path))
        scripts = archive.read(path.replace("METADATA", "entry_points.txt")).decode()
        assert path.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    project = _project()
    assert metadata["Name"] == "smcdiff"
    assert metadata["Version"] == project["version"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert "smcdiff = smcdiff.cli:main" in scripts
    runtime = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    assert {_normalise(text) for text in runtime} == {_normalise(text) for text in project["dependencies"]}


@pytest.mark.slow
def test_wheel_holds_the_package_and_every_model(wheel):
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in shipped} == {"smcdiff"}
    for source in (ROOT / "smcdiff").rglob("*.py"):
        assert str(source.relative_to(ROOT)) in shipped
    assert not [name for name in shipped if name.startswith("smcdiff/_models/") and name.endswith(".py")]
    cards = sorted((ROOT / "models").glob("*/card.json"))
    for card in cards:
        assert list(card.parent.glob("*.safetensors")), f"{card.parent.name} has a card and no weights"
        for path in (card, *card.parent.glob("*.safetensors")):
            name = "smcdiff/_models/" + path.relative_to(ROOT / "models").as_posix()
            assert shipped.get(name) == path.read_bytes(), name


@pytest.mark.slow
def test_wheel_runs_away_from_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    # Only the unpacked wheel and the dependencies: PYTHONPATH comes before the editable install.
    code = (
        "import json, pathlib, smcdiff\n"
        "home = pathlib.Path(smcdiff.__file__).parent\n"
        "print(json.dumps([str(home), sorted(p.parent.name for p in home.glob('_models/*/card.json'))]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    home, models = json.loads(result.stdout.splitlines()[-1])
    assert Path(home) == tmp_path / "site" / "smcdiff"
    assert models == sorted(card.parent.name for card in (ROOT / "models").glob("*/card.json"))


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    with tarfile.open(_build("sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
        (root,) = {name.split("/")[0] for name in archive.getnames()}
    again = tmp_path / "again"
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(again)]
    subprocess.run(command, cwd=tmp_path / root, check=True, capture_output=True)
    (rebuilt,) = again.iterdir()
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        assert {i.filename: i.CRC for i in first.infolist()} == {i.filename: i.CRC for i in second.infolist()}
