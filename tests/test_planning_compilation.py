"""Figures of a compiled program, and what the compiler says when one does not fit."""

import jax
import jax.numpy as jnp
import pytest

from t2t_vit_jax.planning.compilation import DoesNotFit, compile_program, figures, shortage
from t2t_vit_jax.planning.tpu import CHIPS, Slice

CHIP = CHIPS['v5e']
MATRIX = jax.ShapeDtypeStruct((256, 256), jnp.float32)


@pytest.mark.parametrize(('flops', 'slower'), [(1, 'bandwidth'), (10**12, 'arithmetic')])
def test_work_and_transfers_overlap(flops, slower):
  """Compiles a sum of two matrices, which moves 3 of them, for the CPU; its work is made up."""
  compiled = jax.jit(jnp.add).lower(MATRIX, MATRIX).compile()
  parts = flops / compiled.cost_analysis()['flops']
  found = figures(compiled, CHIP, product_flops=0, parts=parts)
  moved = 3 * 4 * 256**2
  assert (found['hbm_bytes'], found['arguments'], found['outputs']) == (moved, moved * 2 / 3, moved / 3)
  assert found['bandwidth_ms'] == pytest.approx(1e3 * moved / 819e9)
  assert found['arithmetic_ms'] == pytest.approx(1e3 * flops / 197e12)
  assert found['roofline_ms'] == found[f'{slower}_ms']


def test_a_program_that_does_not_fit_is_refused_where_the_compiler_does_not():
  large = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)  # 8 GiB; two arguments and a result
  with pytest.raises(DoesNotFit, match=r'the program needs 24\.00 GiB of 16\.00 GiB'):
    compile_program(jax.jit(jnp.add), (large, large), Slice('v5e:1x1', CHIP, 'v5e:1x1'))


def test_shortage():
  """Texts of libtpu 0.0.42, the second shortened."""
  short = (
    'Ran out of memory on HBM, the total memory required for HLO temporaries (82.00G) exceeds available HBM (15.75G).'
  )
  assert shortage(f'RESOURCE_EXHAUSTED: {short}') == short
  long = (
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 22.10G of 15.75G '
    'hbm. Exceeded hbm capacity by 6.35G.\n\nTotal hbm usage >= 22.36G:\n    reserved        258.00M\n'
  )
  assert 'Used 22.10G of 15.75G' in shortage(long)
  assert 'reserved' not in shortage(long)
