"""What importing costs, and what it must not load; the wheel."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile

import pytest

import t2t_vit_jax
from tests import golden
from tests.image_folder import write_image_folder
from tests.processes import start_command

ROOT = Path(__file__).parents[1]


def test_neither_torch_nor_tensorflow_is_loaded(tmp_path):
  """By imports, by PyTorch's files, and by a run's report, whose library for event files imports torch where it can."""
  modules = ['t2t_vit_jax', 't2t_vit_jax.export', 't2t_vit_jax.visualize', 't2t_vit_jax.training.loop']
  modules += ['t2t_vit_jax.data.loader', 't2t_vit_jax.data.prepare']
  report = f"""
from t2t_vit_jax.workdir.metrics import Reporter
from t2t_vit_jax.workdir.folder import open_workdir
with open_workdir({str(tmp_path)!r}) as workdir:
  with Reporter(workdir, total_steps=1, first_step=0, steps_per_epoch=1, batch_size=1):
    pass
"""
  checkpoint = f"""
from t2t_vit_jax import load_pretrained
load_pretrained({str(golden.DATA / 'official_tiny_performer.pth.tar')!r}, settings={{'num_heads': 4}})
"""
  code = 'import sys\n'
  for step in [*(f'import {module}' for module in modules), checkpoint, report]:
    code += f'{step}\nassert not {{"torch", "tensorflow"}} & sys.modules.keys(), {step!r}\n'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 1


def run(*command, cwd):
  environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  done = subprocess.run(
    list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """A folder with the sdist, and the wheel that was built from it."""
  folder = tmp_path_factory.mktemp('dist')
  run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, ROOT, cwd=folder)
  return folder


@pytest.fixture(scope='module')
def installed(built, tmp_path_factory):
  """The Python of an environment with the wheel, and with the other packages of this one."""
  environment = tmp_path_factory.mktemp('wheel') / 'venv'
  run(sys.executable, '-m', 'venv', '--without-pip', environment, cwd=built)
  python = environment / 'bin' / 'python'
  (wheel,) = built.glob('*.whl')
  run(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', wheel, cwd=built)
  packages = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=built).strip())
  # As a path it brings no link to the checkout.
  (packages / 'others.pth').write_text(sysconfig.get_path('purelib') + '\n')
  return python


@pytest.mark.slow
@pytest.mark.needs('build')
def test_what_is_released(built):
  version = t2t_vit_jax.__version__
  with zipfile.ZipFile(built / f't2t_vit_jax-{version}-py3-none-any.whl') as wheel:
    names = wheel.namelist()
    assert f'\nVersion: {version}\n' in wheel.read(f't2t_vit_jax-{version}.dist-info/METADATA').decode()
  assert {name.split('/')[0] for name in names} == {'t2t_vit_jax', f't2t_vit_jax-{version}.dist-info'}
  data = {f't2t_vit_jax/data/{name}.tsv' for name in ('imagenet_names', 'imagenet_subsets')}
  assert {'t2t_vit_jax/py.typed', 't2t_vit_jax/evaluate/report.css', *data} <= set(names)
  with tarfile.open(built / f't2t_vit_jax-{version}.tar.gz') as sdist:
    files = {name.split('/', 1)[1] for name in sdist.getnames()}
  assert {'train.py', 'configs/default.py', 'docs/training.md', 'LICENSE', 'CHANGELOG.md'} <= files
  assert not [name for name in files if name.startswith('tests/')]


@pytest.mark.slow
@pytest.mark.needs('build')
def test_the_wheel_computes_the_references_logits(installed, tmp_path):
  """From a converted checkpoint, in a folder without the checkout."""
  checkpoint = golden.DATA / 'official_tiny_performer.pth.tar'
  run(
    installed, '-m', 't2t_vit_jax.conversion', checkpoint, '--output=w.safetensors', '--set=num_heads=4', cwd=tmp_path
  )
  code = f"""if True:
    import jax, numpy as np, t2t_vit_jax
    print(t2t_vit_jax.__file__)
    numbers = np.load({str(golden.DATA / 'official_tiny_performer.npz')!r})
    model, variables = t2t_vit_jax.load_pretrained('w.safetensors')
    print(abs(model.apply(variables, numbers['images_nhwc']) - numbers['logits']).max())
    fresh = t2t_vit_jax.create_model('t2t_vit_7', num_classes=5, depth=1)
    images = np.zeros((2, 64, 64, 3), np.float32)
    print(fresh.apply(fresh.init(jax.random.key(0), images), images).shape)
  """
  file, difference, shape = run(installed, '-c', code, cwd=tmp_path).splitlines()
  assert Path(file).is_relative_to(installed.parents[1])
  assert float(difference) <= 1e-5
  assert shape == '(2, 5)'
  run(installed, '-m', 't2t_vit_jax.export', 'w.safetensors', '--output=model.npz', cwd=tmp_path)
  assert (tmp_path / 'model.npz').stat().st_size > 100_000


@pytest.mark.parametrize('program', [['train.py'], ['convert_torch_weights.py'], ['-m', 't2t_vit_jax.predict']])
def test_an_interrupt_while_a_program_imports_gets_one_line(program):
  """Interrupts it when it has loaded a library of numpy: it is in the middle of its imports then."""
  process = start_command(
    sys.executable, '-c', SIGINT_AS_USUAL, sys.executable, *program, '--help', cwd=ROOT, PYTHONPATH=str(ROOT)
  )
  while 'numpy' not in Path(f'/proc/{process.pid}/maps').read_text():
    assert process.poll() is None, process.communicate()
  process.send_signal(signal.SIGINT)
  output, errors = process.communicate(timeout=120)
  assert (process.returncode, output, errors) == (130, '', 'interrupted\n')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('program', 'step'),
  [
    ('predict {weights} {folder} --output={folder}/out.json', '_classify'),
    ('visualize {weights} {folder}/0/0.JPEG --output={folder}/out.png', '_run'),
    ('evaluate {weights} --folder={folder} --results={folder}/results.jsonl --batch_size=8', 'eval_step'),
  ],
)
def test_an_interrupt_while_jax_computes_ends_the_program_at_once(program, step, tmp_path):
  """Images are so large that a batch takes longer than a person waits. Half of the time, Python crashed at its end."""
  folder = write_image_folder(tmp_path, tuple('0123456789'), images=1) / 'images'
  command = program.format(weights=golden.converted('performer', tmp_path), folder=folder).split()
  process = start_command(
    sys.executable, '-c', SIGINT_AS_USUAL, sys.executable, '-m', f't2t_vit_jax.{command[0]}', *command[1:],
    '--image_size=1440', cwd=ROOT, PYTHONPATH=str(ROOT), JAX_LOG_COMPILES='1',
  )  # fmt: skip
  assert any(f'Finished XLA compilation of jit({step})' in line for line in process.stderr)  # reads up to there
  time.sleep(0.5)
  process.send_signal(signal.SIGINT)
  stopped = time.monotonic()
  output, errors = process.communicate(timeout=60)
  assert (process.returncode, output, errors.splitlines()[-1]) == (130, '', 'interrupted')
  assert time.monotonic() - stopped < 3
  assert {file.name for file in folder.iterdir()} == set('0123456789')  # not even a hidden one


# A shell that starts tests in the background lets their processes ignore Ctrl-C.
SIGINT_AS_USUAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_an_interrupt_in_a_callback_of_the_garbage_collector_is_not_lost():
  """Python drops what such a callback raises; jax has one."""
  code = """
import signal, sys, time
sys.argv[0] = '-m'
import t2t_vit_jax

def _xla_gc_callback():
  signal.raise_signal(signal.SIGINT)

try:
  _xla_gc_callback()
except KeyboardInterrupt:
  sys.exit('too early')
try:
  time.sleep(60)
except KeyboardInterrupt:
  print('interrupted')
"""
  assert run(sys.executable, '-c', SIGINT_AS_USUAL, sys.executable, '-c', code, cwd=ROOT) == 'interrupted\n'
