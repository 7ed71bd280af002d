"""Two virtual CPU devices, and JAX as strict as it can be."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """A tfds folder for the session; digits are prepared in it on first use."""
  return str(tmp_path_factory.mktemp('tfds'))


@pytest.fixture
def strict_dtypes():
  """Errors on implicit dtype promotion. Only around model calls: optax and bfloat16 LayerNorm promote on purpose."""
  with jax.numpy_dtype_promotion('strict'):
    yield
