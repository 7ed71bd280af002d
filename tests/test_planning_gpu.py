"""GPUs that are described to the compiler: published figures, the text of a description, and refusals."""

import re
import sys

import pytest

from t2t_vit_jax import UserError
from t2t_vit_jax.planning import gpu, topology, tpu


def test_an_h100_is_described_as_its_data_sheet_does():
  """NVIDIA H100 SXM5: 132 multiprocessors, 80 GB with 3.35 TB/s, 989 TFLOP/s, 67 TFLOP/s in float32."""
  chip = gpu.GPUS['h100']
  assert chip.memory_bytes == pytest.approx(80 * 2**30, rel=0.02)
  assert chip.bandwidth == pytest.approx(3.35e12, rel=1e-3)
  assert 2 * chip.cores * chip.float32_units * chip.clock_ghz * 1e9 == pytest.approx(67e12, rel=2e-3)
  described = chip.description()
  assert re.findall('(core_count|memory_bandwidth|capability { major): (\\d+)', described) == [
    ('core_count', '132'),
    ('memory_bandwidth', '3352320000000'),
    ('capability { major', '9'),
  ]


def test_parse():
  where = topology.parse('h100:8/fsdp=2')
  assert (where.chip, where.count, where.fsdp) == (gpu.GPUS['h100'], 8, 2)
  assert topology.parse('b200') == gpu.Node('b200', gpu.GPUS['b200'], 1)
  assert isinstance(topology.parse('v5e:2x2'), tpu.Slice)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('h10:8', "unknown chip 'h10' in 'h10:8': did you mean 'h100'"),
    ('h100:0', "'h100:0' names no GPUs: write such as h100, h100:8"),
    ('h100:2x4', "'h100:2x4' names no GPUs"),
    ('', "unknown chip ''"),
    ('v6:16x16', "unknown chip 'v6' in 'v6:16x16': did you mean 'v6e'"),
  ],
)
def test_wrong_names_get_examples(text, message):
  with pytest.raises(UserError, match=message):
    topology.parse(text)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'jax_cuda13_plugin', None)
  with pytest.raises(UserError, match=r"^compiling for GPUs needs jax_cuda13_plugin: pip .*\[gpu-plan\]'"):
    topology.parse('h100').devices()
