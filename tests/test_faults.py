"""The list of known faults still fits the code; `python -m tools.faults` sees that tests notice."""

import ast

import pytest

from tools.faults import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_code(fault):
    code = (ROOT / "bwlens" / fault.path).read_text(encoding="utf-8")
    assert code.count(fault.right) == 1
    assert fault.wrong != fault.right
    ast.parse(code.replace(fault.right, fault.wrong))
    assert all((ROOT / "tests" / path).exists() for path in fault.tests.split())
