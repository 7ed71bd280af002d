"""Two virtual CPU devices, and JAX as strict as it can be."""

import atexit
import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Several tests build the same run: each program is compiled once, also in the processes that tests start.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _cache = tempfile.TemporaryDirectory()
  atexit.register(_cache.cleanup)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _cache.name
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')

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
