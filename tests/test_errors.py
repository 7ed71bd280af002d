"""Names and errors that are shown: one line each, without commands to a terminal and formulas of a spreadsheet."""

import csv
import io
import os
from pathlib import Path
import re
import shutil
import tomllib
from types import SimpleNamespace

import pytest

from t2t_vit_jax.errors import EXTRAS, MissingExtraError, csv_line, first_line, free_space, printable, writing_problem

ROOT = Path(__file__).parents[1]
# Screens cleared, titles set, lines forged, text turned round; bytes that are no UTF-8.
NAMES = (
  '\x1b[2J\x1b[31mred',
  '\x1b]0;title\x07',
  'a\nwarning: forged',
  'a\rb',
  'exe\u202egpj',
  '\u2028',
  '\udcff',
  '\x9b1m',
)


def test_the_extra_that_a_message_names_brings_the_library(monkeypatch, tmp_path):
  """The table of libraries agrees with pyproject.toml, whose names of packages are not those of imports."""
  packages = {'sklearn': 'scikit-learn', 'libtpu': 'jax[tpu]', 'jax_cuda13_plugin': 'jax[cuda13-local]'}
  packages |= {'tensorflow': 'tensorflow-cpu', 'tensorflow_datasets': 'tensorflow-datasets'}
  packages['cykooz_resizer'] = 'cykooz-resizer'
  extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
  for library, extra in EXTRAS.items():
    package = packages.get(library, library)
    assert any(re.match(rf'{re.escape(package)}\b|{re.escape(package)}$', line) for line in extras[extra]), library
  monkeypatch.chdir(ROOT)
  assert str(MissingExtraError('a picture', 'matplotlib')) == "a picture needs matplotlib: pip install -e '.[plots]'"
  monkeypatch.chdir(tmp_path)
  assert str(MissingExtraError('a picture', 'matplotlib', '!')).endswith(f": pip install -e '{ROOT}[plots]'!")


@pytest.mark.parametrize('name', NAMES)
def test_any_name_is_one_printable_line(name):
  assert printable(name).isprintable()
  assert printable(printable(name)) == printable(name)
  assert printable('ü 犬, "x"') == 'ü 犬, "x"'


@pytest.mark.parametrize('start', ['=', '+', '-', '@', '\t=', '\r@', ' =', '\uff1d', '\uff0b', '\uff0d', '\uff20'])
def test_no_name_is_a_formula(start):
  name = f"{start}cmd|' /C calc'!A0"
  line = csv_line('a, "b"\nc', name, 0.5, '')
  (row,) = csv.reader(io.StringIO(line))
  assert row == ['a, "b"\\nc', *row[1:2], '0.5', '']
  assert row[1][0] in "'\\"  # text to every spreadsheet: the second where the name begins with an escaped character
  assert row[1].endswith(printable(name))


@pytest.mark.parametrize(
  ('text', 'with_kind', 'without'),
  [
    ('', 'ValueError', 'ValueError'),
    (' \n\r\n', 'ValueError', 'ValueError'),
    ('\n\n  first\nsecond', 'ValueError: first', 'first'),
    ('first\rsecond', 'ValueError: first', 'first'),
    ('x' * 999, 'ValueError: ' + 'x' * 288, 'x' * 300),
  ],
)
def test_an_error_is_one_line_even_if_it_has_no_text(text, with_kind, without):
  error = ValueError(text)
  assert first_line(error) == writing_problem(error, '/') == with_kind
  assert first_line(error, kind=False) == without


def test_free_space_is_that_of_the_nearest_folder_that_exists(monkeypatch, tmp_path):
  monkeypatch.setattr(shutil, 'disk_usage', {tmp_path: SimpleNamespace(free=7)}.__getitem__)
  assert free_space(tmp_path) == free_space(tmp_path / 'a' / 'b') == free_space(os.fspath(tmp_path / 'c')) == 7
  monkeypatch.chdir(tmp_path)
  assert free_space(Path('a/b')) == 7
