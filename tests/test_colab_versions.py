"Check without Colab that installing this project replaces nothing of Colab's runtime."

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LINES = (Path(__file__).parent / "colab_versions.txt").read_text(encoding="utf8").splitlines()
COLAB = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", "\n".join(LINES), re.M)
}
# packages that pip installs on Colab in another version than the tested one, with what they require
INSTALLED = {
    canonicalize_name(line.split()[1].split("==")[0]): line.split()[2:]
    for line in LINES
    if line.startswith("install: ")
}
ENVIRONMENT = {"extra": "", "python_version": "3.12", "python_full_version": "3.12.11"}
ENVIRONMENT |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]


def conflicts(requirements, by="widedeep_nb", seen=None):
    "Yield the requirements that Colab's packages do not meet; follow those that pip installs there."
    seen = set() if seen is None else seen
    for text in requirements:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate(ENVIRONMENT):
            continue
        if name in COLAB:
            if not requirement.specifier.contains(COLAB[name], prereleases=True):
                yield f"{by} needs {requirement}, Colab has {COLAB[name]}"
            continue
        if name in seen:
            continue
        seen.add(name)
        try:
            further = INSTALLED[name] if name in INSTALLED else requires(name) or []
        except PackageNotFoundError:
            continue  # not needed on this machine, such as a back-port
        yield from conflicts(further, name, seen)


def test_no_package_of_colab_is_replaced():
    assert list(conflicts(PROJECT["dependencies"])) == []


def test_conflicts_are_found():
    assert list(conflicts(["ipykernel>=6.29", "tqdm"])) == [
        "widedeep_nb needs ipykernel>=6.29, Colab has 6.17.1"
    ]
    assert list(conflicts(["faiss-cpu", "numpy>=3"])) == [
        "widedeep_nb needs numpy>=3, Colab has 2.0.2"
    ]


@pytest.mark.parametrize("name", INSTALLED)
def test_older_versions_are_in_our_range(name):
    "Check that a version that fits Colab is one that the project accepts."
    line = next(x for x in LINES if x.startswith(f"install: {name}=="))
    version = line.split()[1].split("==")[1]
    ours = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == name)
    assert ours.specifier.contains(version)


def test_dev_has_every_extra():
    "Check that a developer's environment can run all tests: implicit is in [dev] too."
    extras = PROJECT["optional-dependencies"]
    dev = {Requirement(text).name for text in extras["dev"]}
    assert {Requirement(text).name for text in extras["baselines"]} <= dev


def test_progress_bars_have_their_widgets():
    names = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert {"ipywidgets", "jinja2", "ipykernel"} <= names
