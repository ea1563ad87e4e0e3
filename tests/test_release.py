"""What would be published: one version, and packages that are whole without the repository."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import bwlens

ROOT = Path(bwlens.__file__).parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_place_names_one_version():
    (declared,) = re.findall(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)
    assert bwlens.__version__ == version("bwlens") == declared
    assert re.findall(r"^version: (.+)$", read("CITATION.cff"), re.MULTILINE) == [declared]
    assert re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[0] == declared


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A source distribution, and the wheel that is built out of it alone."""
    pytest.importorskip("hatchling", reason="the builder is not installed: pip install hatchling")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}
    env.pop("BWLENS_REPOSITORY", None)
    subprocess.run([*build, "sdist"], cwd=ROOT, check=True, capture_output=True, env=env)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    subprocess.run([*build, "wheel"], cwd=source, check=True, capture_output=True, env=env)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


def test_what_the_packages_hold(packages):
    source, wheel = packages
    assert {"bwlens", "tests", "tools", "docs", "LICENSE"} <= {p.name for p in source.iterdir()}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"bwlens"}
    here = {path for path in (ROOT / "bwlens").rglob("*") if path.is_file()}
    here = {str(path.relative_to(ROOT)) for path in here if "__pycache__" not in path.parts}
    assert {name for name in names if name.startswith("bwlens/")} == here
    assert wheel.stat().st_size < 17_000_000


def test_the_description_suits_an_index(packages):
    _, wheel = packages
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        text = email.message_from_bytes(archive.read(name)).get_payload()
    assert text.startswith("# bwlens")
    assert "<picture>" not in text
    assert 'pip install "bwlens[gguf]"' in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)


def test_where_the_repository_has_an_address_the_description_shows_its_picture(monkeypatch):
    pytest.importorskip("hatchling", reason="the builder is not installed: pip install hatchling")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("BWLENS_REPOSITORY", raising=False)
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://code.example")
    monkeypatch.setenv("GITHUB_REPOSITORY", "us/bwlens")
    monkeypatch.setenv("GITHUB_REF_NAME", "v1")
    from hatch_build import LongDescription

    metadata = {}
    LongDescription(str(ROOT), {}).update(metadata)
    assert metadata["urls"]["Source"] == "https://code.example/us/bwlens"
    text = metadata["readme"]["text"]
    assert 'src="https://code.example/us/bwlens/raw/v1/docs/smollm2.png"' in text
    assert "](https://code.example/us/bwlens/blob/v1/docs/" in text
    monkeypatch.setenv("BWLENS_REPOSITORY", "https://other.example/")
    LongDescription(str(ROOT), {}).update(metadata)
    assert metadata["urls"]["Issues"] == "https://other.example/issues"


def test_the_wheel_runs_without_the_repository(packages, tmp_path):
    _, wheel = packages
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    code = """
import bwlens, sys
print(bwlens.__file__, bwlens.__version__)
bwlens.load_model("backpack-demo"), bwlens.demo.facts()
bwlens.edit.rome(bwlens.load_model("demo"), bwlens.read_records("demo").edits[0], steps=1)
from bwlens.cli import main
sys.argv = ["bwlens", "demo"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'site' / 'bwlens'}")
    assert f" {bwlens.__version__}\n" in done.stdout
    assert "Lionel Messi" in done.stdout
