"""Configs by name or path, and the flags --config=CONFIG and --config.FIELD=VALUE.

The configs of this package lie in the checkout's `configs/`. The wheel has a copy of that folder inside the package.
"""

import importlib.util
from pathlib import Path
import re
import sys
import traceback
import types
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from t2t_vit_jax.command_line import Parser, with_flag_names, with_home
from t2t_vit_jax.errors import UserError, did_you_mean, first_line

PACKAGE = Path(__file__).parent
FOLDER = next(folder for folder in (PACKAGE / 'configs', PACKAGE.parent / 'configs') if folder.is_dir())
IS_CONFIG_FLAG = re.compile(r'--(no)?config(\.|=|$)').match
HELP = 'name of a config of this package, such as t2t_vit_14, or path of a config file'


def names() -> list[str]:
  """Names of the configs that come with this package."""
  return sorted(path.stem for path in FOLDER.glob('[!_]*.py'))


def find_config(config: str) -> Path:
  """The file of a config that is given by its path, or by its name among `names()`.

  Raises:
    UserError: there is no such file.
  """
  file = Path(config)
  if config in names():  # whatever else has this name here
    return FOLDER / f'{config}.py'
  if file.is_file():
    return file
  if file.name == config and file.suffix != '.py':
    beside = f'{config}.py is a file here, ' if Path(f'{config}.py').is_file() else ''
    raise UserError(f'there is no config {config!r}: {beside}{did_you_mean(config, names())}')
  advice = f': did you mean {file}.py?' if Path(f'{file}.py').is_file() else ''
  if not advice and file.stem in names():
    advice = f': did you mean --config={file.stem}?'
  raise UserError(f'there is no config file {file}{advice}')


def make_importable(file: Path) -> None:
  """Has `from configs import default` in a config file find the configs of this package, wherever that file is.

  Config files in a folder that is itself called `configs` find their neighbours first.
  """
  own = file.resolve().parent
  folders = [str(own)] if own.name == 'configs' else []
  if str(FOLDER) not in folders:
    folders.append(str(FOLDER))
  spec = importlib.util.spec_from_file_location('configs', FOLDER / '__init__.py', submodule_search_locations=folders)
  assert spec is not None
  sys.modules['configs'] = importlib.util.module_from_spec(spec)
  for name in [name for name in sys.modules if name.startswith('configs.')]:
    del sys.modules[name]  # of another folder, or of an earlier call


class ConfigParser(Parser):
  """Parser of a command with a config: also takes --config=CONFIG, and --config.FIELD=VALUE for any of its fields.

  Args:
    command: name of the command.
    default: name of the config that is taken without --config; None if one must be named.
    options: see `Parser`.
  """

  def __init__(self, command: str, default: str | None = None, **options: Any):
    super().__init__(command, **options)
    self.default = default
    explained = FOLDER / 'default.py' if FOLDER.parent == PACKAGE else 'configs/default.py'
    self.add_argument('--config', metavar='CONFIG', help=f'{HELP} (default: {default})' if default else HELP)
    self.add_argument(
      '--config.FIELD', metavar='VALUE', help=f'value of a field of the config; {explained} explains every field'
    )

  def parse_args(self, argv: Any = None, namespace: Any = None) -> Any:
    """Parses `argv`, or the program's own. The result has `config`, a ConfigDict, and `config_file`, its path.

    Raises:
      UserError: an argument or the config is wrong.
    """
    argv = with_flag_names(with_home(sys.argv[1:] if argv is None else argv))
    own, overrides = _divide(argv)
    arguments = super().parse_args(own, namespace)
    named = [value for flag, value in overrides if flag == '--config']
    if not named and self.default is None:
      raise UserError('which run? Give --config=CONFIG, such as --config=t2t_vit_14')
    name, colon, argument = str(named[-1] if named else self.default).partition(':')  # an argument of get_config
    file = find_config(name)
    make_importable(file)
    fields = [f'{flag}={value}' if value is not None else flag for flag, value in overrides if flag != '--config']
    arguments.config_file = file
    arguments.config = _override(_load_config(file, argument if colon else None), fields)
    return arguments

  def unknown_flag(self, flag: str) -> str:
    """See `Parser`; a flag with the last name of a field is taken for that field."""
    return _fields_named(flag.lstrip('-'), _default_config()) or super().unknown_flag(flag)

  def advice_without_flag(self, argument: str) -> str:
    """See `Parser`; it may be a config."""
    return f'; did you mean --config={argument}?' if argument in names() or argument.endswith('.py') else ''


def _default_config() -> Any:
  make_importable(FOLDER / 'default.py')
  return importlib.import_module('configs.default').get_config()


def _divide(argv: list[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
  """Divides a command line into the arguments of the command, and the flags of the config with their values."""
  own, overrides, rest = [], [], list(argv)
  while rest:
    argument = rest.pop(0)
    if not IS_CONFIG_FLAG(argument):
      own.append(argument)
      continue
    flag, equals, value = argument.partition('=')
    if not equals and rest and not rest[0].startswith('--'):
      equals, value = '=', rest.pop(0)
    if flag == '--config' and not value:
      raise UserError('--config has no value')
    overrides.append((flag, value if equals else None))
  return own, overrides


def _load_config(file: Path, argument: str | None) -> ConfigDict:
  """Config that `get_config`, or `get_config(argument)`, of a file returns.

  Raises:
    UserError: the file is no config, there is an error in it, or a field is unknown or missing.
  """
  module = types.ModuleType('config')
  module.__file__ = str(file)
  try:
    exec(compile(file.read_bytes(), str(file), 'exec'), module.__dict__)
    if not hasattr(module, 'get_config'):
      raise UserError(f'{file} has no function get_config, which returns the config')
    config = module.get_config() if argument is None else module.get_config(argument)
  except UserError:
    raise
  except Exception as error:  # anything can stand in the file
    raise UserError(f'{file}{_line_of(error, file)}: {first_line(error)}') from error
  if not isinstance(config, ConfigDict):
    raise UserError(f'{file}: get_config returns {config!r:.50}, no ConfigDict; does it end with `return config`?')
  _check_fields(file, config, _default_config())
  return config


def _check_fields(file: Path, config: ConfigDict, default: ConfigDict) -> None:
  """Raises UserError unless a config has the fields of the default one; `T2TViT` checks those of the model."""
  known, found = ([path for path in _paths(x) if not path.startswith('model.')] for x in (default, config))
  if unknown := [path for path in found if path not in known]:
    advice = _fields_named(unknown[0], default) or did_you_mean(unknown[0], known)
    raise UserError(f'{file}: unknown config field {unknown[0]!r}: {advice}')
  if missing := [path for path in known if path not in found]:
    raise UserError(f'{file}: the config lacks the field {missing[0]!r}: begin with `config = default.get_config()`')


def _line_of(error: Exception, file: Path) -> str:
  """Where in `file` an exception arose, as a phrase; empty if elsewhere."""
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
  if isinstance(error, SyntaxError) and error.filename == str(file):
    lines.append(error.lineno)
  return f', line {lines[-1]}' if lines else ''


def _override(config: ConfigDict, fields: list[str]) -> ConfigDict:
  """A config after the flags `fields`.

  Raises:
    UserError: a field is unknown, or its value has the wrong type.
  """
  values = flags.FlagValues()
  argv = ['', *fields]
  try:
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
    values(argv)
  except (AttributeError, KeyError):
    _refuse_unknown_field(fields, config)
    raise
  except (flags.Error, ValueError) as error:
    raise UserError(first_line(error, kind=False)) from error
  for name in values:
    if isinstance(value := values[name].value, str) and value.startswith('--'):  # absl takes what comes next
      raise UserError(f'--{name} has no value: after it comes {value}')
  return values.config


def _refuse_unknown_field(fields: list[str], config: ConfigDict) -> None:
  """Raises UserError if a flag names a field that the config lacks."""
  known = _paths(config)
  for match in filter(None, (re.match(r'--(?:no)?config\.([^=]+)', argument) for argument in fields)):
    if (path := match[1]) not in known and path not in config:
      advice = _fields_named(path, config) or did_you_mean(path, known)
      raise UserError(f'unknown config field {path!r}: {advice}')


def _paths(config: Any) -> list[str]:
  """Fields of a config, such as 'init_from' and 'data.batch_size'."""
  groups = [name for name in config if isinstance(config[name], ConfigDict)]
  return [f'{group}.{field}' for group in groups for field in config[group]] + [x for x in config if x not in groups]


def _fields_named(name: str, config: Any) -> str:
  """A phrase with the flags of the fields that have a last name such as 'epochs'; empty if there are none."""
  found = [f'--config.{path}' for path in _paths(config) if path.split('.')[-1] == name]
  return f'did you mean {" or ".join(found)}?' if found else ''
