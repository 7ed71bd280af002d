"""What importing costs, and what it must not load; the wheel."""

import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import numpy as np
from PIL import Image
import pytest

import t2t_vit_jax
from tests import golden
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


LIBRARIES_OF_EXTRAS = ['matplotlib', 'sklearn', 'tensorflow_datasets', 'tensorflow', 'torch', 'huggingface_hub']
WITHOUT_TRAINING = f"""
import sys
sys.modules.update(dict.fromkeys([*{LIBRARIES_OF_EXTRAS}, 'grain', 'array_record', 'tensorboardX']))
import t2t_vit_jax, t2t_vit_jax.plan
from t2t_vit_jax import conversion, export, predict, visualize, weights
from t2t_vit_jax.conversion import __main__ as convert
"""


def test_prediction_needs_no_library_of_an_extra_nor_those_of_training(tmp_path):
  """A PyTorch file becomes weights that predict, are exported and listed; what needs more says in a line what it is."""
  code = f"""{WITHOUT_TRAINING}
from t2t_vit_jax.evaluate import __main__ as evaluate
checkpoint = {str(golden.DATA / 'official_tiny_performer.pth.tar')!r}
assert convert.main([checkpoint, '--output=w.safetensors', '--set=num_heads=4']) == 0
assert predict.main(['w.safetensors', 'a.png', 'a.png', '--top=1000', '--output=p.json']) == 0
assert export.main(['w.safetensors', '--output=model.npz']) == 0
assert weights.main([]) == 0
for tool, *arguments in [
  (visualize, 'w.safetensors', 'a.png', '--output=b.png'),
  (evaluate, 'w.safetensors', '--folder=.', '--report=b.html'),
  (evaluate, 'w.safetensors', '--folder=.', '--probe'),
  (evaluate, 'w.safetensors', '--sets=digits'),
  (convert, 'w.safetensors', '--output=b.pth', '--reverse'),
  (predict, 'hf://user/repo', 'a.png'),
]:
  assert tool.main(arguments) == 2, arguments
"""
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save(tmp_path / 'a.png')
  done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  first, second = json.loads((tmp_path / 'p.json').read_text())
  assert first == second
  assert sum(guess['probability'] for guess in first['predictions']) == pytest.approx(1, abs=1e-5)
  assert (tmp_path / 'model.npz').stat().st_size > 100_000
  named = [re.fullmatch(r"error: .+ needs (\w+): pip install .*\[\w+\]'.*", line) for line in done.stderr.splitlines()]
  assert [match and match[1] for match in named] == [
    'matplotlib',
    'matplotlib',
    'sklearn',
    'tensorflow_datasets',
    'torch',
    'huggingface_hub',
  ]


def test_training_the_digits_needs_no_library_of_an_extra(tmp_path):
  """Two steps of the README's command."""
  code = f"""
import sys
sys.modules.update(dict.fromkeys({LIBRARIES_OF_EXTRAS}))
from configs import digits
from t2t_vit_jax.training import loop
config = digits.get_config()
config.update_from_flattened_dict({{'model.depth': 1, 'data.image_size': 16, 'schedule.max_steps': 2}})
loop.train(config, {str(tmp_path)!r})
"""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('matplotlib') == 1, done.stdout
  assert 'warning' not in done.stderr
  assert (tmp_path / 'weights' / 'model.safetensors').exists()
  assert not (tmp_path / 'report.png').exists()


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
  data = {f't2t_vit_jax/data/{name}.tsv' for name in ('digits', 'imagenet_names', 'imagenet_subsets')}
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
