"""Chips and slices: published figures, arithmetic done by hand, and refusals."""

import sys

import pytest

from t2t_vit_jax import UserError
from t2t_vit_jax.planning.tpu import CHIPS, Slice


@pytest.mark.parametrize(('chip', 'gigahertz'), [('v4', 1.05), ('v5e', 1.5), ('v5p', 1.75), ('v6e', 1.75)])
def test_clock(chip, gigahertz):
  """v4's is published (arXiv 2304.01433, table 4); the others are round, as clocks are."""
  assert CHIPS[chip].clock == pytest.approx(1e9 * gigahertz, rel=2e-3)


def test_parse():
  where = Slice.parse('v5e:16x16/fsdp=8')
  assert (where.topology, where.chip, where.fsdp) == ('v5e:16x16', CHIPS['v5e'], 8)
  assert Slice.parse('v4:4x4x4').fsdp is None


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('v5litepod-16', "'v5litepod-16' is no TPU slice: write one such as v4:4x4x4, v5e:2x2"),
    ('v5e:16x16/tensor=2', 'is no TPU slice'),
  ],
)
def test_wrong_slices_get_examples(text, message):
  with pytest.raises(UserError, match=message):
    Slice.parse(text)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  with pytest.raises(UserError, match=r"^compiling for TPUs needs libtpu: pip .*\[tpu\]' \(no TPU is needed\)"):
    Slice.parse('v5e:2x2').devices()
