"""Versions of the packages that a constraint file names: those installed, or those pip would take.

`versions.py installed FILE`: a line for each package that is installed.
`versions.py differing FILE REPORT`: a line for each whose version in a report of
`pip install --dry-run --report` is another than the file's.
"""

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def named(path: str) -> dict[str, str]:
    """The versions in a constraint file, by normalised name."""
    lines = (line.partition("#")[0].strip() for line in Path(path).read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {normal(name): number for name, number in pairs}


def normal(name: str) -> str:
    """A package's name as indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def public(number: str) -> str:
    """A version without its build, as in 2.13.0+cpu."""
    return number.partition("+")[0]


def installed(path: str) -> list[str]:
    """`name==version` of what is installed of a file's packages."""
    found = []
    for name in named(path):
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return found


def differing(path: str, report: str) -> list[str]:
    """Which versions of a file's packages pip would not take, and which it would."""
    taken = {
        normal(one["metadata"]["name"]): one["metadata"]["version"]
        for one in json.loads(Path(report).read_text())["install"]
    }
    return [
        f"{name}: known {known}, today {taken[name]}"
        for name, known in named(path).items()
        if name in taken and public(taken[name]) != public(known)
    ]


if __name__ == "__main__":
    for line in {"installed": installed, "differing": differing}[sys.argv[1]](*sys.argv[2:]):
        print(line)
