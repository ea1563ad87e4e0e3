"""What is released: one version, a page that PyPI shows, and in the wheel the package alone."""

import re
import zipfile
from pathlib import Path

import pytest

import bwlens

ROOT = Path(bwlens.__file__).parents[1]
ADDRESS = "https://code.example/bwlens"


@pytest.fixture
def hatch_build(monkeypatch):
    pytest.importorskip("hatchling")
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("BWLENS_REPOSITORY", "GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_REF_NAME"):
        monkeypatch.delenv(name, raising=False)
    import hatch_build

    return hatch_build


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [bwlens.__version__]


def test_the_changelog_begins_with_this_version():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\S+)", changes, re.MULTILINE)
    assert headings[0] in (bwlens.__version__, "Unreleased")
    assert bwlens.__version__ in headings


def test_a_page_without_an_address_has_no_dead_links(hatch_build):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = hatch_build.long_description(readme, hatch_build.repository(), "main")
    assert "<picture>" in readme
    assert not re.search(r"<(picture|img|source)", page)
    assert all(link.startswith("https:") for link in re.findall(r"\]\((.*?)\)", page))
    assert "[Start]" in readme
    assert "| Start, " in page
    assert 'pip install "bwlens[gguf]"' in page


def test_a_page_with_one_shows_its_picture(hatch_build, monkeypatch):
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://code.example")
    monkeypatch.setenv("GITHUB_REPOSITORY", "us/bwlens")
    assert hatch_build.repository() == "https://code.example/us/bwlens"
    monkeypatch.setenv("BWLENS_REPOSITORY", ADDRESS + "/")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = hatch_build.long_description(readme, hatch_build.repository(), "v1")
    assert f'src="{ADDRESS}/raw/v1/docs/smollm2.png"' in page
    assert f"[Start]({ADDRESS}/blob/v1/docs/start.md)" in page
    assert "https://arxiv.org/abs/2402.12865" in page
    metadata = {}
    hatch_build.AddressesAndDescription(str(ROOT), {}).update(metadata)
    assert metadata["urls"]["Issues"] == f"{ADDRESS}/issues"


def test_the_wheel_holds_the_package_alone(hatch_build, tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    wheel = next(iter(WheelBuilder(str(ROOT)).build(directory=str(tmp_path))))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"bwlens-{bwlens.__version__}.dist-info/METADATA").decode()
    package = {name for name in names if ".dist-info/" not in name}
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "bwlens").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert package == here
    for needed in ("py.typed", "demo/model/model.safetensors", "demo/facts.csv"):
        assert f"bwlens/{needed}" in package
    assert f"\nVersion: {bwlens.__version__}\n" in metadata
    assert Path(wheel).stat().st_size < 20e6
