"""Two virtual CPU devices, and JAX as strict as it can be."""

import atexit
import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Several tests build the same run: each program is compiled once.
_cache = tempfile.TemporaryDirectory()
atexit.register(_cache.cleanup)
jax.config.update('jax_compilation_cache_dir', _cache.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """A tfds folder for the session; digits are prepared in it on first use."""
  return str(tmp_path_factory.mktemp('tfds'))


@pytest.fixture
def strict_dtypes():
  """Errors on implicit dtype promotion. Only around model calls: optax and bfloat16 LayerNorm promote on purpose."""
  with jax.numpy_dtype_promotion('strict'):
    yield
