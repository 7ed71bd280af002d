"""The list of deliberate faults follows the code."""

import ast

import pytest

from tests.deliberate_faults import FAULTS, ROOT


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.what)
def test_every_fault_changes_one_place_and_leaves_python(fault):
  text = (ROOT / 't2t_vit_jax' / fault.file).read_text()
  assert text.count(fault.old) == 1
  ast.parse(text.replace(fault.old, fault.new))
