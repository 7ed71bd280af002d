"""`t2t-vit COMMAND ...`, run as `python -m t2t_vit_jax`: its commands, their help, configs by name, missing devices."""

import os
from pathlib import Path
import re
import subprocess
import sys

from PIL import Image
import pytest

from docs import command_help
from t2t_vit_jax.__main__ import COMMANDS, main
from tests import golden
from tests.conftest import is_installed
from tests.test_docs import ALL

ROOT = Path(__file__).parents[1]


def run(*arguments, cwd, **environment):
  done = subprocess.run(
    [sys.executable, '-m', 't2t_vit_jax', *map(str, arguments)],
    cwd=cwd,
    env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout, done.stderr


def test_commands_are_listed_without_importing_jax(tmp_path):
  code = 'import sys; from t2t_vit_jax.__main__ import main; main([]); assert "jax" not in sys.modules'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')
  assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith('  ')][1:] == list(COMMANDS)


def test_an_unknown_command_gets_one_line(capsys):
  assert main(['predikt']) == 2
  assert capsys.readouterr().err == "error: there is no command 'predikt': did you mean 'predict'?\n"


@pytest.mark.parametrize('name', COMMANDS)
def test_help_begins_with_an_example(name, capsys):
  with pytest.raises(SystemExit) as ended:
    main([name, '--help'])
  assert ended.value.code == 0
  assert capsys.readouterr().out.startswith(f'For example:\n  t2t-vit {name} ')


def test_without_tfds_prepare_shows_its_help_and_names_the_extra(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  for module in ('preparation', 'tfds_source'):
    monkeypatch.delitem(sys.modules, f't2t_vit_jax.data.{module}', raising=False)
    monkeypatch.delattr(f't2t_vit_jax.data.{module}', raising=False)
  with pytest.raises(SystemExit, match='0'):
    main(['prepare', '--help'])
  assert main(['prepare', 'digits']) == 2
  output, errors = capsys.readouterr()
  assert '--manual_dir DIR' in output
  needs = (
    'a dataset of tfds needs tensorflow_datasets' if is_installed('tensorflow') else 't2t-vit prepare needs tensorflow'
  )
  assert re.fullmatch(rf"error: {needs}: pip install .*\[(tfds|prepare)\]'\n", errors)


@pytest.mark.slow
@pytest.mark.needs('libtpu')
def test_commands_are_silent_about_a_tpu_that_is_not_there(tmp_path):
  """Its library prints errors wherever it is installed, and still does in a user's own program."""
  # Commands that ran in this process have set the last two.
  ours = {'JAX_PLATFORMS', 'TPU_ACCELERATOR_TYPE', 'TPU_WORKER_HOSTNAMES'}
  environment = {name: value for name, value in os.environ.items() if name not in ours}
  environment |= {'PYTHONPATH': str(ROOT), 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  Image.new('RGB', (32, 32)).save(tmp_path / 'black.png')
  golden.converted('performer', tmp_path)
  prediction = ['-m', 't2t_vit_jax', 'predict', 'performer.safetensors', 'black.png']
  for command in (prediction, ['-c', 'import t2t_vit_jax, jax; jax.devices()']):
    done = subprocess.run(
      [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert ('TPU' in done.stderr) == (command is not prediction), done.stderr


@pytest.mark.slow
def test_a_users_config_may_build_on_the_default_from_any_folder(tmp_path):
  """Hyphens in flags are understood too."""
  (tmp_path / 'mine.py').write_text(
    'from configs import digits\n\ndef get_config():\n  config = digits.get_config()\n'
    '  config.model.depth = 1\n  config.data.image_size = 16\n  return config\n'
  )
  flags = ['--config=mine.py', '--config.data.batch-size=64', '--config.schedule.max_steps=2']
  code, output, errors = run('train', *flags, cwd=tmp_path, JAX_PLATFORMS='cpu')
  assert code == 0, errors
  assert (tmp_path / 'runs' / 'mine' / 'weights' / 'model.safetensors').is_file(), output


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')  # ml_collections calls it
@pytest.mark.parametrize('flag', ['--epochs=3', '--config.epochs=3'])
def test_the_last_name_of_a_field_is_enough_for_advice(flag, capsys):
  assert main(['train', flag]) == 2
  assert capsys.readouterr().err.endswith(': did you mean --config.schedule.epochs?\n')


def test_an_unknown_config_gets_one_line(capsys):
  assert main(['plan', '--config=t2t_vit_t4', '--topology=v5e:2x2']) == 2
  assert capsys.readouterr().err.startswith("error: there is no config 't2t_vit_t4': did you mean ")


def test_the_page_of_commands_is_up_to_date():
  assert command_help.PAGE.read_text() == command_help.render(), 'run `python -m docs.command_help`'


def test_documented_commands_exist_with_their_flags():
  """In every block of commands of README, CONTRIBUTING and docs."""
  _, *sections = re.split(r'^## (\w+)\n', command_help.PAGE.read_text(), flags=re.MULTILINE)
  flags = {
    name: set(re.findall(r'^  (?:-h, )?--(\S+)', section, re.MULTILINE))
    for name, section in zip(sections[::2], sections[1::2], strict=True)
  }
  assert flags.keys() == COMMANDS.keys()
  documented = [line.split() for line in ALL if line.startswith('t2t-vit ')]
  assert len(documented) > 20
  for _, name, *words in documented:
    used = {word[2:].split('=')[0].replace('-', '_') for word in words if word.startswith('--')}
    assert {flag for flag in used if not flag.startswith('config.')} <= flags[name], (name, words)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--config=broken.py'], r"broken\.py, line 2: ValueError: invalid literal for int\(\) with base 10: '3o0'"),
    (['--config=misspelt.py'], "misspelt.py: unknown config field 'schedule.epoch': did you mean 'schedule.epochs'"),
    (['--config=without.py'], r'without\.py: get_config returns None, no ConfigDict; does it end with `return config`'),
    (['--config=part.py'], "part.py: the config lacks the field 'schedule.epochs': begin with `config = default"),
    (['--config=nothing.py'], 'nothing.py has no function get_config'),
    (['--config=unknown.py'], r"unknown\.py, line 1: ModuleNotFoundError: No module named 'config'"),
    (['--config=./digits'], r'digits, line 1: SyntaxError: invalid syntax'),
    (['--config=sized.py:9', '--config.model.dept=1'], "unknown config field 'model.dept': did you mean 'model.depth'"),
    (['--config.data.=5'], ''),
    (['--dry_run=true'], "argument --dry_run: takes no value, not 'true'"),
  ],
)
def test_errors_in_configs_and_flags_are_one_line_with_the_cause(flags, message, tmp_path, monkeypatch, capsys):
  (tmp_path / 'broken.py').write_text("def get_config():\n  return int('3o0')\n")
  (tmp_path / 'sized.py').write_text(
    'from configs import digits\n\ndef get_config(size):\n  return digits.get_config()\n'
  )
  get_default = 'from configs import default\n\ndef get_config():\n  config = default.get_config()\n'
  (tmp_path / 'misspelt.py').write_text(f'{get_default}  config.schedule.epoch = 2\n  return config\n')
  (tmp_path / 'without.py').write_text(get_default)
  (tmp_path / 'part.py').write_text(f'{get_default}  del config.schedule.epochs\n  return config\n')
  (tmp_path / 'nothing.py').write_text('x = 1\n')
  (tmp_path / 'unknown.py').write_text('from config import default\n')
  (tmp_path / 'digits').write_text('no Python')  # a file with the name of a config is not taken for it
  monkeypatch.chdir(tmp_path)
  assert main(['train', *flags]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert re.match(f'error: {message}', line), line
