"""Every command and every piece of Python in README.md, CONTRIBUTING.md and docs/ works as it stands there.

Commands run in a folder that looks like a checkout with the files that they name: weights, a photograph, an image
folder. What they cannot have here is named in `LEFT_OUT` with the reason. A new command fails until it has a rule.
"""

import dataclasses
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from sklearn.datasets import load_sample_image

import t2t_vit_jax
from t2t_vit_jax.conversion.weight_format import Weights, write_weights
from t2t_vit_jax.models.t2t_vit import ARCHITECTURE
from t2t_vit_jax.models.variants import DataDefaults
from tests.image_folder import write_image_folder
from tests.weights_cache import put_into_cache

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('**/*.md'))]
SHORT_DIGITS = ' --config.model.depth=1 --config.data.image_size=16 --config.schedule.max_steps=2'

# Run as written, with these words after it that make it short.
RUN = {
  r'python train\.py --config=configs/finetune\.py .*': ' --config.schedule.max_steps=2',
  r'python train\.py --export=runs/\w+': '',
  r't2t-vit (predict|visualize|export|weights).*': '',
  r't2t-vit evaluate .*--folder=DIR(/val)?': '',
  r't2t-vit convert t2t_vit_14\.safetensors .*--reverse': '',
}
# Run as written: without ImageNet or another prepared dataset they say in one line what is missing, and exit with 2.
WITHOUT_DATA = [
  r'python train\.py --config=configs/t2t_vit_\w+\.py( --(workdir|evaluate|json|config\.data|dry_run)\S*)+',
  r't2t-vit shrink .*',
  r't2t-vit evaluate .*--sets=.*',
  r'python convert_torch_weights\.py 81\.5_T2T_ViT_14\.pth\.tar .*',
  r't2t-vit prepare .*',
  r't2t-vit convert 81\.5_T2T_ViT_14\.pth\.tar .*',
]
LEFT_OUT = {
  r'pip install .*|python -m venv .*|pre-commit install.*': 'installs; .ci/run does what matters of it',
  r't2t-vit prepare cifar10 .*': 'downloads',
  r'(gcloud|mkdir -p ~/BUCKET && gcsfuse|hf upload) .*': 'needs a network and an account',
  r'python train\.py .*--config\.data\.data_dir=~/BUCKET.*': 'needs a bucket',
  r'(#|srun|code=|\[ \$code|exit) ?.*': 'a SLURM script, for a cluster',
  r't2t-vit plan .*': 'compiles for a TPU or GPU: tests/test_plan.py, on a smaller one',
  r'python examples/serve\.py .*|curl .*|python -m benchmarks\.serving .*': 'tests/test_serve.py runs the server',
  r'python -m benchmarks\.input_pipeline .*': 'takes minutes and a quiet machine',
  r'python -m benchmarks\.(model|compiler|scaling|device|evaluation).*': 'minutes: tests/test_benchmarks.py, on less',
  r'python train\.py .*--coordinator=.*|wait': 'tests/test_training_processes.py runs it, see documented_commands',
}


def blocks(page, language):
  return [match[1] for match in re.finditer(rf'```{language}\n(.*?)```', page.read_text(), flags=re.DOTALL)]


def commands(page):
  """Each command on one line, without its comment."""
  for block in blocks(page, 'bash'):
    block = re.sub(r'=?"\n.*?"\n', '\n', block, flags=re.DOTALL)  # what is sent to another machine
    for line in block.replace('\\\n', ' ').splitlines():
      if line := re.sub(r'\s+', ' ', re.sub(r'(^|\s+)#\s.*', '', line)).strip():
        yield line


# tests/test_predict.py runs docs/predict.md on a small model.
PYTHON_PAGES = [page for page in PAGES if '```python' in page.read_text() and page.stem != 'predict']
ALL = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


def rule(command):
  found = [r for r in (*LEFT_OUT, *RUN, *WITHOUT_DATA) if re.fullmatch(r, command)]
  return found[0] if found else None


def test_every_command_has_a_rule_and_every_rule_a_command():
  assert [command for command in ALL if rule(command) is None] == []
  assert {*RUN, *WITHOUT_DATA, *LEFT_OUT} == {rule(command) for command in ALL}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
  """Links as GitHub follows them."""
  text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
  links = re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'src="([^"]+)"', text)
  for path, _, heading in (link.partition('#') for link in links if not re.match('https?:', link)):
    target = page.parent / path if path else page
    assert target.exists(), path
    assert not heading or heading in anchors(target), f'{path}#{heading}'


def anchors(page):
  """Names of a page's headings in links, as GitHub makes them."""
  headings = re.findall(r'^#+ (.*)', re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
  return [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]


def test_the_api_page_has_every_public_name():
  text = (ROOT / 'docs' / 'api.md').read_text()
  named = re.findall(r'^\.\. auto(?:function|class|exception):: (\w+)$', text, flags=re.MULTILINE)
  assert sorted(named) == sorted(t2t_vit_jax.__all__)
  assert named[:3] == ['create_model', 'load_pretrained', 'T2TViT']  # those that people look for come first


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
  """A folder with the files that the pages name; in its cache the published weights are a small model's, at random."""
  folder = tmp_path_factory.mktemp('checkout')
  for name in ('train.py', 'convert_torch_weights.py', 'configs', 'docs', 'benchmarks', 'examples', 't2t_vit_jax'):
    (folder / name).symlink_to(ROOT / name)
  for name in ('t2t_vit_7', 't2t_vit_14', 't2t_vit_14_384'):
    put_into_cache(random_weights(folder), name, folder / 'cache')
  photograph = Image.fromarray(load_sample_image('flower.jpg'))
  (folder / 'photos').mkdir()
  photograph.save(folder / 'photos' / 'flower.jpg')
  photograph.save(folder / 'cat.jpg')
  shutil.copy(folder / 'random.safetensors', folder / 't2t_vit_14.safetensors')
  write_image_folder(folder / 'DIR', ('cat', 'dog'), train=40, val=4)
  return folder


def random_weights(folder):
  model = t2t_vit_jax.create_model('t2t_vit_tiny', num_classes=1000)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  data = {**dataclasses.asdict(DataDefaults()), 'image_size': 32}
  arrays = {key: np.asarray(array) for key, array in flatten_dict(variables, sep='/').items()}
  arguments = {field: getattr(model, field) for field in (*ARCHITECTURE, 'image_size', 'num_classes')}
  file = folder / 'random.safetensors'
  write_weights(Weights(arrays, 't2t_vit_tiny', arguments, 3, data, None, {'weights': None}), file)
  return file.read_bytes()


def run(command, folder):
  return subprocess.run(
    re.sub(
      r'^(python|t2t-vit) ', lambda match: f'{sys.executable} {"-m t2t_vit_jax " * (match[1] != "python")}', command
    ),
    shell=True,
    cwd=folder,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(folder),
      'TFDS_DATA_DIR': str(folder / 'tfds'),
      'T2T_VIT_JAX_CACHE': str(folder / 'cache'),
    },
    capture_output=True,
    text=True,
  )


@pytest.fixture(scope='module')
def after_commands(checkout):
  """The same folder after the commands of `RUN`, whose results other pages read; and what became of each command."""
  first = f'python train.py --workdir=runs/t2t_vit_14{SHORT_DIGITS}'  # a workdir that pages name
  rest = [command + RUN[rule(command)] for command in ALL if rule(command) in RUN]
  return checkout, {command: run(command, checkout) for command in (first, *rest)}


@pytest.mark.slow
def test_commands_run(after_commands):
  for command, done in after_commands[1].items():
    assert done.returncode == 0, (command, done.stdout, done.stderr)


@pytest.mark.slow
def test_commands_without_their_data_say_so(checkout):
  for command in ALL:
    if rule(command) in WITHOUT_DATA:
      done = run(command, checkout)
      assert done.returncode == 2, (command, done.stdout, done.stderr)
      *_, last = done.stderr.strip().splitlines()
      assert last.startswith('error: '), (command, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize('page', PYTHON_PAGES, ids=lambda page: page.name)
def test_python_runs(page, after_commands):
  """All of a page in order, in one process. Batches are of one image, since no figure depends on their number."""
  checkout, _ = after_commands
  text = '\n'.join(blocks(page, 'python')).replace('(8, 224, 224, 3)', '(1, 224, 224, 3)')
  script = checkout / f'{page.stem}_page.py'
  script.write_text(text)
  done = run(f'python {script}', checkout)
  assert done.returncode == 0, done.stderr
