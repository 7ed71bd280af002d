"""The program convert_torch_weights.py: flags, lines on both outputs, exit codes."""

from pathlib import Path
import shutil
import subprocess
import sys

import pytest

from t2t_vit_jax import load_pretrained
from t2t_vit_jax.conversion.__main__ import main
from tests import checkpoints, golden
from tests.parameters import slow_but
from tests.small_disk import small_disk

ROOT = Path(__file__).parents[1]


def program(*arguments):
  command = [sys.executable, ROOT / 'convert_torch_weights.py', *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def assert_error(result, *says):
  assert result.returncode == 2
  assert result.stdout == ''
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ')
  assert all(text in line for text in says), line


def test_there_and_back(tmp_path):
  import torch

  source = golden.DATA / 'official_tiny_performer_qkbias_qkscale.pth.tar'
  here, back = tmp_path / 'weights.safetensors', tmp_path / 'back.pth'
  result = program(source, f'--output={here}', '--set=num_heads=4,qk_scale=0.17')
  assert (result.returncode, result.stderr) == (0, '')
  assert 'qkv_bias=True' in result.stdout
  assert f'wrote {here}' in result.stdout
  assert load_pretrained(here)[0].qk_scale == 0.17
  assert program(here, f'--output={back}', '--reverse').returncode == 0
  state = golden.load_state_dict('performer_qkbias_qkscale')
  assert all(torch.equal(tensor, state[name]) for name, tensor in torch.load(back, weights_only=True).items())


@pytest.mark.slow
def test_other_classes_and_sizes(tmp_path):
  source = golden.DATA / 'official_tiny_transformer.pth.tar'
  output = tmp_path / 'weights.safetensors'
  result = program(source, f'--output={output}', '--set=num_heads=4', '--num_classes=3', '--image_size=96x128')
  assert result.returncode == 0
  assert 'head: 3 instead of 10 classes' in result.stdout
  model, _ = load_pretrained(output)
  assert (model.num_classes, model.image_size) == (3, (96, 128))


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (['--output={}'], '--set=num_heads=N'),
    ([], '--output'),
    (['another', '--output={}'], 'another'),
    (['--ouput={}'], 'ouput'),
    (['--output={}', '--weights=best'], 'weights'),
    (['--output={}', '--set=heads=4'], "did you mean 'num_heads'?"),
    (['--output={}', '--set=num_heads=four'], 'four'),
    (['--output={}', '--set=num_heads=5'], 'num_heads must divide 64, the width of blocks_0, and is 5'),
    (['--output={}', '--set=num_heads=0'], 'positive'),
    (['--output={}', '--set=num_heads=4', '--image_size=big'], 'HEIGHTxWIDTH'),
    (['--output={}', '--set=num_heads=4', '--image_size=0'], 'too small'),
    (['--output={}', '--model=t2t_vit_41'], 'did you mean'),
    (['--output={}', '--model=t2t_vit_14'], 'is not t2t_vit_14'),
  ],
)
def test_bad_flags_are_one_line(flags, says, tmp_path, capsys):
  output = tmp_path / 'weights.safetensors'
  source = str(golden.DATA / 'official_tiny_performer.pth.tar')
  command = [source, *(flag.format(output) for flag in flags)]
  assert_error(subprocess.CompletedProcess(command, main(command), *capsys.readouterr()), says)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'damage',
  slow_but(
    ['no file'],
    ['pickle that runs a command', 'non-zip pickle that runs a command', 'TorchScript archive', 'NaN', 'no file'],
  ),
)
def test_bad_files_are_one_line(damage, tmp_path):
  says = checkpoints.save_bad(damage, tmp_path / 'weights.pth')
  before = set(tmp_path.iterdir())
  assert_error(program(tmp_path / 'weights.pth', f'--output={tmp_path}/out.safetensors'), 'weights.pth', says)
  assert set(tmp_path.iterdir()) == before


def test_the_command_of_the_readme_shows_its_flags():
  result = program('--help')
  assert result.returncode == 0
  for flag in ('--output', '--model', '--set', '--weights', '--num_classes', '--image_size', '--reverse', '--force'):
    assert f'\n  {flag}' in result.stdout


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, capsys):
  """The shell leaves it as it is after an equals sign."""
  monkeypatch.setenv('HOME', str(tmp_path))
  shutil.copy(golden.DATA / 'official_tiny_performer.pth.tar', tmp_path / 'weights.pth')
  assert main(['~/weights.pth', '--output=~/weights.safetensors', '--set=num_heads=4']) == 0
  assert f'wrote {tmp_path}/weights.safetensors' in capsys.readouterr().out
  assert load_pretrained('~/weights.safetensors')[0].num_heads == 4


def test_a_read_only_disk_gets_one_line(tmp_path):
  with small_disk(tmp_path, ',ro'):
    result = program(
      golden.DATA / 'official_tiny_performer.pth.tar', f'--output={tmp_path}/out.safetensors', '--set=num_heads=4'
    )
    assert_error(result, f'{tmp_path}/out.safetensors: cannot be written: Read-only file system')
