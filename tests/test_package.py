"""What importing costs, and what it must not load."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
  'module',
  [
    't2t_vit_jax',
    't2t_vit_jax.export',
    't2t_vit_jax.visualize',
    't2t_vit_jax.training.loop',
    't2t_vit_jax.data.loader',
    't2t_vit_jax.data.prepare',
  ],
)
def test_import_loads_neither_torch_nor_tensorflow(module):
  code = f'import sys, {module}; print([name for name in ("torch", "tensorflow") if name in sys.modules])'
  output = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout
  assert output.strip() == '[]'
