"""What importing costs, and what it must not load; what is released, and what is said about it."""

import email
import importlib.util
import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile

import numpy as np
from PIL import Image
import pytest
import yaml

import t2t_vit_jax
from tests import golden
from tests.image_folder import write_image_folder
from tests.processes import start_command

ROOT = Path(__file__).parents[1]


def test_neither_torch_nor_tensorflow_is_loaded(tmp_path):
  """By imports, by PyTorch's files, and by a run's report, whose library for event files imports torch where it can."""
  modules = ['t2t_vit_jax', 't2t_vit_jax.export', 't2t_vit_jax.visualize', 't2t_vit_jax.training.loop']
  modules += ['t2t_vit_jax.data.loader', 't2t_vit_jax.data.preparation']
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


def run(*command, cwd, **variables):
  environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'} | variables
  done = subprocess.run(
    list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


NOT_RELEASED = ('.ci/', '.dockerignore', '.github/', '.pre-commit-config.yaml', 'Dockerfile', 'tests/')
REPOSITORY = 'https://github.com/example/t2t'
# What lies in a checkout besides the files that git tracks.
LITTER = (
  '.env', '.venv/lib/module.py', 'venv/lib/module.py', '.idea/workspace.xml', '.vscode/settings.json', 'dist/old.whl',
  'notes.md', 'scratch.py', 'DATA/digits/1.0.0/features.json', 'TARS/ILSVRC2012_img_val.tar', 'runs/digits/m.jsonl',
  'configs/.env', 'configs/notes.txt', 'docs/draft.docx', 'docs/images/.DS_Store', 'docs/images/face.jpg',
  't2t_vit_jax/.env', 't2t_vit_jax/data/photo.png', 't2t_vit_jax/models/t2t_vit.py.orig', 'tests/new/test_it.py',
)  # fmt: skip


def tracked():
  """Paths of the files that git tracks; empty where there is no git, or where this is no clone."""
  if not shutil.which('git'):
    return []
  listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
  return [name for name in listed.stdout.split('\0') if (ROOT / name).is_file()]


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
  """A copy of this checkout, and litter."""
  folder = tmp_path_factory.mktemp('copy') / 'checkout'
  if names := tracked():
    for name in names:
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, folder / name)
  else:
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns('.git', '.*_cache', '*venv*', 'runs', 'dist', 'build'))
  for name in LITTER:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text('private')
  return folder


@pytest.fixture(scope='module')
def built(checkout, tmp_path_factory):
  """A folder with the sdist, and the wheel that was built from it, as GitHub's workflows build them."""
  folder = tmp_path_factory.mktemp('dist')
  command = (sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, checkout)
  run(*command, cwd=folder, GITHUB_REPOSITORY='example/t2t')
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
  configs = {f't2t_vit_jax/configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')}
  assert {'t2t_vit_jax/py.typed', 't2t_vit_jax/evaluate/report.css', *data, *configs} <= set(names)
  assert not [name for name in names if '__pycache__' in name or Path(name).name.startswith('.')]
  with tarfile.open(built / f't2t_vit_jax-{version}.tar.gz') as sdist:
    files = {name.split('/', 1)[1] for name in sdist.getnames()}
  assert {'train.py', 'configs/default.py', 'docs/training.md', 'LICENSE', 'CHANGELOG.md', 'hatch_build.py'} <= files
  assert not files & set(LITTER)
  assert not [name for name in files if name.startswith(NOT_RELEASED)]
  if names := tracked():
    assert files == {name for name in names if not name.startswith(NOT_RELEASED)} | {'PKG-INFO'}


@pytest.mark.slow
@pytest.mark.needs('hatchling')
@pytest.mark.skipif(not shutil.which('git'), reason='needs git')
def test_a_file_that_git_does_not_track_stops_a_release(checkout, tmp_path):
  """Where `include` matches it: a new module may have been forgotten, and a config may be private."""
  clone = shutil.copytree(checkout, tmp_path / 'clone')
  for command in (['git', 'init', '--quiet'], ['git', 'add', '--all']):
    run(*command, cwd=clone)
  command = (sys.executable, '-m', 'hatchling', 'build', '--target', 'sdist', '--directory', tmp_path / 'dist')
  run(*command, cwd=clone)
  (clone / 'configs' / 'mine.py').write_text('private')
  with pytest.raises(AssertionError, match=r'git does not track configs/mine\.py: add it with git add, or move it'):
    run(*command, cwd=clone)


@pytest.mark.slow
@pytest.mark.needs('build')
def test_the_page_of_the_package_leads_to_the_repository(built):
  """Each link of the README, as another library finds it, leads to a file of this version or to another site."""
  markdown_it = pytest.importorskip('markdown_it')
  version = t2t_vit_jax.__version__
  with zipfile.ZipFile(built / f't2t_vit_jax-{version}-py3-none-any.whl') as wheel:
    metadata = email.message_from_bytes(wheel.read(f't2t_vit_jax-{version}.dist-info/METADATA'))
  urls = dict(url.split(', ') for url in metadata.get_all('Project-URL'))
  assert urls == {
    'Repository': REPOSITORY,
    'Issues': f'{REPOSITORY}/issues',
    'Documentation': f'{REPOSITORY}/tree/v{version}/docs',
    'Changelog': f'{REPOSITORY}/blob/v{version}/CHANGELOG.md',
  }
  assert metadata['Description-Content-Type'] == 'text/markdown'
  page = markdown_it.MarkdownIt('commonmark', {'html': True}).enable('table').render(metadata.get_payload())
  ours = 0
  for target in re.findall(r'(?:href|src|srcset)="([^"]*)"', page):
    if match := re.fullmatch(rf'{REPOSITORY}/(raw|blob)/v{version}/([^#]+)(#.*)?', target):
      assert (ROOT / match[2]).exists(), target
      assert (match[1] == 'raw') == (Path(match[2]).suffix == '.png'), target
      ours += 1
    else:
      assert target.startswith(('https://', '#')), target
  assert ours > 9


@pytest.mark.needs('hatchling')
def test_links_become_absolute_where_the_repository_is_known(tmp_path, monkeypatch):
  spec = importlib.util.spec_from_file_location('hatch_build', ROOT / 'hatch_build.py')
  hook = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(hook)
  relative = (
    '[a](docs/a.md#b) [![c](d/e.png)](f.py) <img width="9" src="g.svg" alt="h"> [i](j.md "k") <a href="l">m</a>\n'
    '[n](#o) [p](https://q/r.png) [s](mailto:t) `[u](v)`\n```python\nw = [x](y)\n```\n[z](docs/)\n'
  )
  (tmp_path / 'README.md').write_text(relative)

  def page():
    metadata = {'version': '1.2'}
    hook.Metadata(str(tmp_path), {}).update(metadata)
    return metadata['readme']['text'], metadata['urls']

  monkeypatch.delenv('GITHUB_REPOSITORY', raising=False)
  assert page() == (relative, {})
  monkeypatch.setenv('GITHUB_REPOSITORY', 'example/t2t')
  text, urls = page()
  blob, raw = f'{REPOSITORY}/blob/v1.2/', f'{REPOSITORY}/raw/v1.2/'
  assert text == (
    f'[a]({blob}docs/a.md#b) [![c]({raw}d/e.png)]({blob}f.py) <img width="9" src="{raw}g.svg" alt="h"> '
    f'[i]({blob}j.md "k") <a href="{blob}l">m</a>\n'
    f'[n](#o) [p](https://q/r.png) [s](mailto:t) `[u](v)`\n```python\nw = [x](y)\n```\n[z]({blob}docs/)\n'
  )
  assert urls['Changelog'] == f'{blob}CHANGELOG.md'


def test_the_tests_that_hold_what_is_promised_about_files_exist():
  promised = re.findall(r'`(test_\w+)`', (ROOT / 'SECURITY.md').read_text())
  tests = {
    name
    for file in (ROOT / 'tests').glob('test_*.py')
    for name in re.findall(r'^def (test_\w+)', file.read_text(), re.M)
  }
  assert len(promised) > 20
  assert not set(promised) - tests


def test_the_citation_is_that_of_the_readme():
  paper = yaml.safe_load((ROOT / 'CITATION.cff').read_text())['preferred-citation']
  entry = re.search(r'```bibtex\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)[1]
  authors = re.split(r'\s+and\s+', re.search(r'author=\{(.*?)\}', entry, re.S)[1])
  assert [f'{author["family-names"]}, {author["given-names"]}' for author in paper['authors']] == authors
  assert f'title={{{paper["title"]}}}' in entry
  assert f'year={{{paper["year"]}}}' in entry


@pytest.mark.slow
@pytest.mark.needs('build')
def test_the_wheel_computes_the_references_logits(installed, tmp_path):
  """From a converted checkpoint, in a folder without the checkout."""
  checkpoint = golden.DATA / 'official_tiny_performer.pth.tar'
  command = installed.with_name('t2t-vit')
  run(command, 'convert', checkpoint, '--output=w.safetensors', '--set=num_heads=4', cwd=tmp_path)
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
  run(command, 'export', 'w.safetensors', '--output=model.npz', cwd=tmp_path)
  assert (tmp_path / 'model.npz').stat().st_size > 100_000


@pytest.mark.slow
@pytest.mark.needs('build')
def test_the_wheel_trains_a_config_of_its_own_or_a_users_and_predicts(installed, tmp_path):
  command, folder = installed.with_name('t2t-vit'), tmp_path / 'photos'
  (tmp_path / 'mine.py').write_text(
    'from configs import digits\n\ndef get_config():\n  config = digits.get_config()\n'
    '  config.model.depth = 1\n  config.data.image_size = 16\n  config.schedule.max_steps = 2\n  return config\n'
  )
  run(command, 'train', '--config=mine.py', cwd=tmp_path)
  assert 'top-1' in run(command, 'train', '--config=digits', '--evaluate=runs/mine', cwd=tmp_path)
  folder.mkdir()
  Image.fromarray(np.full((20, 20), 99, np.uint8)).save(folder / 'a.png')
  (guesses,) = json.loads(run(command, 'predict', 'runs/mine', folder, '--json', cwd=tmp_path))
  assert {guess['name'] for guess in guesses['predictions']} <= set(map(str, range(10)))


@pytest.mark.parametrize(
  'program',
  [['train.py', '--dry_run'], ['convert_torch_weights.py', '--help'], ['-m', 't2t_vit_jax', 'predict', '--help']],
)
def test_an_interrupt_while_a_program_imports_gets_one_line(program):
  """Interrupts it when it has loaded a library of numpy: it is in the middle of its imports then."""
  process = start_command(
    sys.executable, '-c', SIGINT_AS_USUAL, sys.executable, *program, cwd=ROOT, PYTHONPATH=str(ROOT)
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


@pytest.mark.slow
def test_a_loop_that_stops_by_itself_has_the_time_to_save():
  """Longer than a program that does not hear Ctrl-C is left alive."""
  code = """
import sys, time
sys.argv[0] = '-m'
import t2t_vit_jax
from t2t_vit_jax.command_line import run_tool
from t2t_vit_jax.training.stopping import stop_request

def tool():
  with stop_request() as request:
    print('ready', flush=True)
    while not request:
      pass
    time.sleep(3)
    print('saved', flush=True)
  return 130

sys.exit(run_tool(tool))
"""
  for _ in range(3):  # which thread runs first is a matter of chance
    process = start_command(sys.executable, '-c', SIGINT_AS_USUAL, sys.executable, '-c', code, PYTHONPATH=str(ROOT))
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, 'saved\n')
