"""Two virtual CPU devices, and JAX as strict as it can be."""

import atexit
import importlib.util
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

from tests.processes import end_all

jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """A tfds folder for the session; digits are prepared in it on first use."""
  return str(tmp_path_factory.mktemp('tfds'))


@pytest.fixture(autouse=True)
def no_process_left():
  """A test that fails leaves no process behind, and no open pipe."""
  yield
  end_all()


@pytest.fixture
def strict_dtypes():
  """Errors on implicit dtype promotion. Only around model calls: optax and bfloat16 LayerNorm promote on purpose."""
  with jax.numpy_dtype_promotion('strict'):
    yield


def misses_torch(error):
  """Whether an exception, or what led to it, is that torch is not installed."""
  if importlib.util.find_spec('torch') is not None or error is None:
    return False
  if isinstance(error, ModuleNotFoundError) and error.name == 'torch':
    return True
  return misses_torch(error.__cause__ or error.__context__)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
  """Without torch, files of tests that import it are skipped."""
  report = yield
  if report.failed and misses_torch(report.call.excinfo.value):
    skip(report, collector)
  return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Without torch, tests that come to need it are skipped."""
  report = yield
  if report.failed and misses_torch(call.excinfo.value):
    skip(report, item)
  return report


def skip(report, node):
  report.outcome, report.longrepr = 'skipped', (str(node.path), None, 'Skipped: torch is not installed')
