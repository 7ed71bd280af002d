"""What the compiler says when a program does not fit."""

from t2t_vit_jax.planning.compilation import shortage


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
