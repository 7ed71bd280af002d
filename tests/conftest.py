"""Which tests run and side by side with which, two virtual CPU devices, and JAX as strict as it can be.

`pytest` runs the fast tests and says at the end what it left out; `pytest --all` runs everything. A test whose own name
is given on the command line runs, fast or not.
"""

import atexit
from collections import Counter
import dataclasses
import gc
import importlib.metadata
import importlib.util
import os
from pathlib import Path
import tempfile

# What libraries would leave in the home folder and elsewhere, in a folder that goes with the run; its workers share it.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  _scratch = tempfile.TemporaryDirectory(prefix='t2t_vit_jax-')
  atexit.register(_scratch.cleanup)
  os.environ.setdefault('PYTEST_DEBUG_TEMPROOT', tempfile.gettempdir())  # where `tmp_path` is kept for a while
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{_scratch.name}/programs')
  for _name in ('TMPDIR', 'TFDS_DATA_DIR', 'MPLCONFIGDIR', 'KERAS_HOME', 'T2T_VIT_JAX_CACHE', 'HF_HOME'):
    os.environ[_name] = f'{_scratch.name}/{_name.lower()}'
    os.mkdir(os.environ[_name])
else:
  # Not shared, though: JAX writes its cache so that another process may read half a program, and warns.
  os.environ['JAX_COMPILATION_CACHE_DIR'] += f'/{os.environ["PYTEST_XDIST_WORKER"]}'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['T2T_VIT_JAX_MIRROR'] = 'http://localhost:9'  # where nobody answers: tests fetch nothing
# Several tests build the same run: each program is compiled once, also in the processes that tests start.
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
# Tests compile more than they compute: this halves the time that takes, and where XLA has a simple way to emit fusions
# it takes a seventh, here and in the processes that tests start. XLA ends at once for a flag that it does not know.
os.environ['XLA_FLAGS'] = ' '.join([
  '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1',
  '--xla_cpu_use_fusion_emitters=false' if importlib.metadata.version('jaxlib') < '0.11' else '',
  os.environ.get('XLA_FLAGS', ''),
])  # fmt: skip

import jax
import pytest

from t2t_vit_jax.errors import MissingExtraError
from t2t_vit_jax.recipe import run as recipe_run
from t2t_vit_jax.recipe.build import build_recipe
from tests.processes import end_all

tempfile.tempdir = os.environ['TMPDIR']
jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_numpy_rank_promotion', 'raise')

# What tests may need beside the extra `test`: the library, and how to get it.
OPTIONAL = {
  'torch': '.[test]',
  'huggingface_hub': '.[test]',
  'simplejpeg': '.[test]',
  'cykooz': '.[test]',
  'tensorflow': '.[test-all]',
  'gcsfs': '.[test-all]',
  'gcp_storage_emulator': '.[test-all]',
  'build': '.[test-all]',
  'hatchling': '.[test-all]',
  'wandb': '.[wandb]',
  'mlflow': '.[mlflow]',
  'jupytext': '.[docs]',
  'nbclient': '.[docs]',
  'sphinx': '.[docs]',
  'jax2onnx': '.[test-all]',
  'onnxruntime': '.[test-all]',
  'starlette': '.[test-all]',
  'uvicorn': '.[test-all]',
  'libtpu': '.[tpu]',
  'jax_cuda13_plugin': '.[gpu-plan]',
  'nvidia.cudnn': '.[cuda13]',
}
# Files whose tests start processes that wait for each other within a time limit: one worker has them all.
SEVERAL_PROCESSES = ('test_training_processes.py', 'test_processes.py', 'test_workdir_folder.py')
SEVERAL_PROCESSES += ('test_recipe_evaluation.py', 'test_training_evaluate_only.py')
# Files that take long come first, so that no worker is left with one of them when the others are done.
LONG = (*SEVERAL_PROCESSES, 'test_parity_full_size.py', 'test_docs.py', 'test_train.py', 'test_speed_guard.py')
LONG += ('test_training_loop.py', 'test_workdir_checkpoints.py', 'test_benchmarks.py')
left_out: Counter[str] = Counter()  # what is missing, or 'slow' -> number of tests


def pytest_addoption(parser):
  parser.addoption('--all', action='store_true', help='run the slow tests too')


def pytest_configure(config):
  config.addinivalue_line('markers', 'slow: left out unless asked for, by --all or by its own name')
  config.addinivalue_line('markers', 'needs(library): left out where the library is not installed')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  """Leaves out the slow tests and those whose library is missing; files that take long come first."""
  named = [argument for argument in config.args if '::' in argument]
  kept, gone = [], []
  for item in items:
    missing = [mark.args[0] for mark in item.iter_markers('needs') if not is_installed(mark.args[0])]
    slow = item.get_closest_marker('slow') and not config.getoption('all')
    if missing:
      left_out[missing[0]] += 1
    elif slow and not any(item.nodeid.startswith(name) for name in named):
      left_out['slow'] += 1
    else:
      kept.append(item)
      continue
    gone.append(item)
  items[:] = sorted(kept, key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
  config.hook.pytest_deselected(items=gone)


def is_installed(library):
  package, _, _ = library.rpartition('.')
  return (not package or is_installed(package)) and importlib.util.find_spec(library) is not None


def missing_library(error):
  """The library of `OPTIONAL` whose absence led to an exception; None if it was something else."""
  if error is None:
    return None
  if isinstance(error, ModuleNotFoundError) and (error.name or '').split('.')[0] in OPTIONAL:
    return error.name.split('.')[0]
  if isinstance(error, MissingExtraError) and error.library in OPTIONAL and not is_installed(error.library):
    return error.library
  return missing_library(error.__cause__ or error.__context__)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
  """A file of tests that imports a missing library is skipped as a whole."""
  report = yield
  if report.failed:
    skip_without_library(report, collector, report.call.excinfo.value)
  return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """A test that comes to need a missing library is skipped."""
  report = yield
  if report.failed:
    skip_without_library(report, item, call.excinfo.value)
  return report


def skip_without_library(report, node, error):
  if library := missing_library(error):
    left_out[library] += 1
    report.outcome, report.longrepr = 'skipped', (str(node.path), None, f'Skipped: {library} is not installed')


def pytest_sessionfinish(session):
  """Tells the process that prints the summary what this worker left out."""
  if hasattr(session.config, 'workeroutput'):
    session.config.workeroutput['left_out'] = dict(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
  # Each worker leaves out the same tests before they are shared out, and others while it runs its own.
  for name, count in getattr(node, 'workeroutput', {}).get('left_out', {}).items():
    left_out[name] = max(left_out[name], count)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
  lines = [f'{left_out.pop("slow")} slow ones: pytest --all'] if left_out['slow'] else []
  lines += [
    f'{count} that need {library}: pip install -e {OPTIONAL[library]!r}'
    for library, count in sorted(left_out.items())
    if count
  ]
  if lines:
    terminalreporter.write_line(f'left out: {"; ".join(lines)}', yellow=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """A file's tests share what they build: one worker has them all."""
  from xdist.scheduler import LoadScopeScheduling

  class ByFile(LoadScopeScheduling):
    def _split_scope(self, nodeid):
      file = nodeid.split('::')[0]
      return 'several processes' if Path(file).name in SEVERAL_PROCESSES else file

  return ByFile(config, log)


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """A tfds folder for the session; digits are prepared in it on first use."""
  return str(tmp_path_factory.mktemp('tfds'))


@pytest.fixture(autouse=True)
def no_process_left():
  """A test that fails leaves no process behind, and no open pipe."""
  yield
  end_all()


@pytest.fixture(autouse=True, scope='module')
def no_program_left():
  """Compiled programs go with the file of tests that used them: all together would fill gigabytes."""
  gc.freeze()  # the modules' own objects, which each collection of garbage would go through
  yield
  jax.clear_caches()
  gc.unfreeze()
  gc.collect()


# Fields of a config that no compiled program depends on.
NOT_COMPUTED = {
  '': ('seed', 'log_images', 'init_from', 'checkpoint', 'logging', 'distributed'),
  'schedule': ('max_steps',),
  'data': (
    *('source', 'name', 'data_dir', 'path', 'train_split', 'eval_split', 'eval_fraction', 'allow_missing_classes'),
    *('num_workers', 'num_threads', 'fast_decode', 'max_bad_fraction', 'orientation'),
  ),
}


@pytest.fixture(scope='module')
def shared_programs():
  """Runs of a file whose configs differ in `NOT_COMPUTED` alone share their traced and compiled programs."""
  programs = {}

  def build_once(config, mesh, **facts):
    recipe = build_recipe(config, mesh, **facts)
    fields = config.copy_and_resolve_references().to_dict()
    for group, names in NOT_COMPUTED.items():
      for name in names:
        del (fields[group] if group else fields)[name]
    key = repr((fields, mesh.devices.tolist(), mesh.axis_names, facts['num_classes'], facts['num_train_images']))
    own = {name: getattr(recipe, name) for name in ('make_state', 'train_step', 'eval_step')}
    return dataclasses.replace(recipe, **programs.setdefault(key, own))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(recipe_run, 'build_recipe', build_once)
    yield


@pytest.fixture
def strict_dtypes():
  """Errors on implicit dtype promotion. Only around model calls: optax and bfloat16 LayerNorm promote on purpose."""
  with jax.numpy_dtype_promotion('strict'):
    yield
