"""The command that evaluates: its table in every form, results that it keeps, and what it refuses."""

import csv
import io
import json
from pathlib import Path
import re
import signal
import sys
import time

import numpy as np
from PIL import Image
import pytest

from t2t_vit_jax.data.sources import find_images
from t2t_vit_jax.evaluate import classifiers
from t2t_vit_jax.evaluate.__main__ import main
from t2t_vit_jax.evaluate.features import Features
from t2t_vit_jax.evaluate.results import render
from t2t_vit_jax.evaluate.sets import ALEXNET_ERRORS
from t2t_vit_jax.predict import open_classifier, predict
from t2t_vit_jax.training.evaluate_only import evaluate_only
from tests import golden
from tests.image_folder import write_image_folder
from tests.processes import ROOT, finish, process_flags, start_command
from tests.test_training_evaluate_only import config_of, photographs

SPLIT = 'digits:test[:40]'


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """Two files of weights with ten classes without names: the same architecture, other numbers."""
  folder = tmp_path_factory.mktemp('weights')
  return [str(golden.converted(name, folder)) for name in ('performer', 'transformer')]


@pytest.fixture
def command(data_dir, tmp_path, capsys):
  """Calls the command, whose results are kept in tmp_path; returns exit code, standard output and standard error."""

  def call(*arguments):
    results = f'--results={tmp_path / "results.jsonl"}'
    code = main([*map(str, arguments), f'--data_dir={data_dir}', results])
    return code, *capsys.readouterr()

  return call


def test_figures_are_those_of_train_evaluate(weights, command, data_dir):
  code, output, _ = command(*weights, f'--sets={SPLIT}', '--json', '--batch-size=7')
  rows = json.loads(output)
  assert code == 0
  for row, path in zip(rows, weights, strict=True):
    changes = {'data.image_size': 64, 'data.crop_fraction': 0.9, 'data.interpolation': 'bicubic'}
    changes |= {'data.mean': (0.485, 0.456, 0.406), 'data.std': (0.229, 0.224, 0.225)}
    accuracy = evaluate_only(config_of(data_dir, **changes), path)['weights']
    assert (row['correct'], row['correct_top5'], row['count']) == (accuracy.correct, accuracy.correct_top5, 40)
    assert row['loss'] == pytest.approx(accuracy.loss, rel=1e-6)
    assert row['weights'] == path
  assert rows[0]['loss'] != pytest.approx(rows[1]['loss'], rel=1e-3)


def test_results_are_kept_and_the_rest_is_evaluated(weights, command, tmp_path):
  file = tmp_path / 'results.jsonl'
  assert command(weights[0], f'--sets={SPLIT}')[0] == 0
  (first,) = map(json.loads, file.read_text().splitlines())
  file.write_text(file.read_text() + '{"weights": "half a li')  # as a killed process leaves it
  code, output, errors = command(*weights, f'--sets={SPLIT},digits:test[40:60]', '--json')
  rows = json.loads(output)
  assert (code, len(rows)) == (0, 4)
  assert rows[0] == first  # its time too: it was not evaluated again
  assert '1 of 4 results are those of' in errors
  lines = file.read_text().splitlines()
  assert [json.loads(line)['set'] for line in lines if not line.endswith('half a li')] == [row['set'] for row in rows]
  assert json.loads(command(*weights, f'--sets={SPLIT},digits:test[40:60]', '--json')[1]) == rows
  # Other settings are another evaluation, and --force makes each again.
  code, output, errors = command(weights[0], f'--sets={SPLIT}', '--image_size=32', '--json')
  assert json.loads(output)[0]['image_size'] == 32
  code, output, _ = command(weights[0], f'--sets={SPLIT}', '--json', '--force')
  assert json.loads(output)[0]['seconds'] != first['seconds']


def test_half_a_line_and_rows_by_hand_are_no_results(weights, command, tmp_path):
  file = tmp_path / 'results.jsonl'
  file.write_text('{"weights": "half a li')  # the disk was full
  assert command(weights[0], f'--sets={SPLIT}')[0] == 0
  row = json.loads(file.read_text().splitlines()[-1])
  changes = (
    {'set': {}},
    {'image_size': [[1]]},
    {'top1': '0.9'},
    {'reliability': None},
    {'top1': None},
    {'unreadable': 1},
  )
  file.write_text(''.join(json.dumps({**row, **change}) + '\n' for change in changes))
  code, _, errors = command(weights[0], f'--sets={SPLIT}')
  assert (code, 'results are those of' in errors) == (0, False)


def test_a_folder_may_be_called_like_a_part_of_a_set(weights, command, tmp_path, monkeypatch):
  write_image_folder(tmp_path / 'c', tuple('0123456789'), fog=1)
  monkeypatch.chdir(tmp_path)
  code, output, _ = command(weights[0], '--folder=c/fog', '--folder=c/fog')
  assert (code, len(output.splitlines())) == (0, 2)
  assert output.splitlines()[1].split()[1] == 'c/fog'


def test_images_that_changed_are_evaluated_again(weights, command, tmp_path):
  folder = write_image_folder(tmp_path / 'own', tuple('0123456789'), val=1)
  classes = [weights[0], f'--folder={folder / "val"}', '--json']
  before = json.loads(command(*classes)[1])
  assert json.loads(command(*classes)[1]) == before
  (folder / 'val' / '3' / '0.JPEG').write_bytes((folder / 'val' / '4' / '0.JPEG').read_bytes())
  after = json.loads(command(*classes)[1])
  assert after[0]['loss'] != before[0]['loss']


@pytest.mark.slow
def test_photographs_are_turned_as_in_prediction(weights, command, tmp_path):
  folder = photographs(tmp_path, tuple('0123456789')) / 'val'
  (row,) = json.loads(command(weights[0], f'--folder={folder}', '--json')[1])
  predictions = predict(open_classifier(weights[0]), find_images([folder]), top=1)
  right = [int(Path(image).parent.name) == guesses[0].label for image, guesses, _ in predictions]
  assert (row['correct'], row['count'], row['orientation']) == (sum(right), 20, 'upright')
  (ignored,) = json.loads(command(weights[0], f'--folder={folder}', '--orientation=ignored', '--json')[1])
  assert ignored['loss'] != pytest.approx(row['loss'], rel=1e-4)


ROW = {
  'weights': 'a|b.safetensors',
  'set': 'val',
  'version': 'imagenet2012/5.1.0 validation',
  'top1': 0.8149,
  'top5': 0.95666,
  'count': 50000,
  'images_per_second': 1234.5,
  'parameters': 21465806,
  'image_size': [384, 192],
  'unreadable': 2,
  'left_out': 0,
  'sha256': '',
  'model': 't2t_vit_14',
  'bytes': 86_212_823,
  'dtype': 'float32',
}


def test_tables_for_people_and_programs():
  corrupted = [
    {
      **ROW,
      'set': f'c/{name}/{severity}',
      'corruption': [name, severity],
      'top1': 0.5,
      'version': 'imagenet2012_corrupted/x',
      'unreadable': 0,
    }
    for name in ALEXNET_ERRORS
    for severity in range(1, 6)
  ]
  rows = [ROW, *corrupted]
  text, markdown = render(rows, 'text'), render(rows, 'markdown')
  assert text.splitlines()[:3] == [
    'weights          set  top-1 %  top-5 %     images  images/s  parameters    MB       px  data',
    'a|b.safetensors  val    81.49    95.67     50,000     1,234      21.5 M  86.2  384x192  '
    'imagenet2012/5.1.0 validation',
    'a|b.safetensors  c      50.00    95.67  3,750,000     1,234      21.5 M  86.2  384x192  '
    '75 of 75 parts of imagenet2012_corrupted',
  ]
  assert 'gaussian_noise           50.00       50.00       50.00       50.00       50.00    56.41\n' in text
  assert text.splitlines()[-2].endswith('a|b.safetensors on val: 2 images cannot be read: counted as wrong')
  assert '| a\\|b.safetensors | val | 81.49 | 95.67 | 50,000 | 1,234 | 21.5 M | 86.2 | 384x192 |' in markdown
  table = list(csv.DictReader(io.StringIO(render(rows, 'csv'))))
  assert len(table) == 77
  assert (table[0]['top1'], table[0]['image_size'], table[0]['mean_corruption_error']) == ('0.8149', '384x192', '')
  expected = sum(0.5 / error for error in ALEXNET_ERRORS.values()) / 15
  assert float(table[-1]['mean_corruption_error']) == pytest.approx(expected)


def test_the_table_goes_to_a_file_whose_ending_is_its_form(weights, command, tmp_path):
  sets = [weights[0], f'--sets={SPLIT}']
  for name, start in (('t.md', '| weights |'), ('t.csv', 'weights,set,'), ('t.json', '[\n {'), ('t.txt', 'weights ')):
    code, output, _ = command(*sets, f'--output={tmp_path / name}')
    assert (code, output) == (0, f'wrote {tmp_path / name}\n')
    assert (tmp_path / name).read_text().startswith(start)
  code, _, errors = command(*sets, f'--output={tmp_path / "t.md"}')
  assert code == 2
  assert errors.splitlines()[-1].endswith('t.md: exists already; --force overwrites it')


def test_what_cannot_be_evaluated_gets_one_line_before_anything_is_computed(weights, command, tmp_path):
  (tmp_path / 'notes.txt').write_text('my notes')
  cat = write_image_folder(tmp_path / 'pets', ('cat', 'dog'), val=1) / 'val'
  for arguments, message in (
    ([weights[0]], 'which images? Give --sets=val,'),
    ([weights[0], '--sets=val'], 'val is not in '),
    (
      [weights[0], f'--sets={SPLIT}', f'--folder={cat}'],
      f'{weights[0]} on {cat}: the model has 10 classes, but {cat} has 2',
    ),
    (['nothing.safetensors', f'--sets={SPLIT}'], 'nothing.safetensors: no such file'),
    ([weights[0], f'--sets={SPLIT}', '--batch_size=0'], 'argument --batch_size: must be a whole number from 1 on'),
    ([weights[0], f'--sets={SPLIT}', '--num_workers=-1'], 'argument --num_workers: must be a whole number from 0 on'),
    (
      [weights[0], f'--sets={SPLIT}', '--output=t.xls'],
      '--output t.xls: the name must end with .txt, .json, .csv, .md',
    ),
    ([weights[0], f'--sets={SPLIT}', '--output=t.html', '--report=t.html'], '--results must be different files'),
    ([weights[0], f'--sets={SPLIT}', '--report=page.pdf'], '--report page.pdf: the name must end with .html or .png'),
    ([weights[0], f'--sets={SPLIT}', f'--output={tmp_path / "no" / "t.md"}'], 'its folder does not exist'),
  ):
    code, output, errors = command(*arguments)
    assert (code, output) == (2, ''), arguments
    assert len(errors.splitlines()) == 1
    assert message in errors
  assert not (tmp_path / 'results.jsonl').exists()
  code = main([weights[0], f'--sets={SPLIT}', f'--results={tmp_path / "notes.txt"}'])
  assert code == 2
  assert (tmp_path / 'notes.txt').read_text() == 'my notes'


@pytest.mark.slow
def test_features_are_probed_with_any_classes(weights, command, tmp_path, monkeypatch):
  monkeypatch.setenv('T2T_VIT_JAX_CACHE', str(tmp_path / 'cache'))
  folder = write_image_folder(tmp_path / 'own', ('ant', 'bee', 'cat'), train=6, val=4)
  code, output, errors = command(weights[0], '--probe', f'--folder={folder}', '--json')
  rows = json.loads(output)
  assert (code, [row['method'] for row in rows]) == (0, ['10-NN', '20-NN', 'linear', '1-shot', '5-shot', '10-shot'] * 2)
  assert {(row['train_images'], row['test_images']) for row in rows} == {(18, 12)}

  def features(split):
    classifier = open_classifier(weights[0])
    for label, name in enumerate(('ant', 'bee', 'cat')):
      for path in sorted((folder / split / name).iterdir()):
        pixels = np.asarray(classifier.prepare(Image.open(path)))[None]
        found = golden.apply(classifier.model, classifier.variables, classifier.normalize(pixels), features=True)
        yield found.cls[0], found.tokens.mean(axis=(1, 2))[0], label

  train, test = (Features(*map(np.array, zip(*features(split), strict=True))) for split in ('train', 'val'))
  expected = [row for field in ('cls', 'mean') for row in classifiers.knn(train, test, field)]
  assert [(row['method'], row['accuracy']) for row in rows if 'NN' in row['method']] == [
    (row.method, pytest.approx(row.accuracy)) for row in expected
  ]
  assert 'features are read from' not in errors
  code, table, errors = command(weights[0], '--probe', f'--folder={folder}')
  assert errors.count('features are read from') == 2
  assert f'{folder} ({folder}): 18 training images, 12 that are classified' in table
  for arguments, message in (
    (['--sets=digits:train'], 'digits:train: these are the training images themselves: name another split'),
    (['--sets=a'], 'a has no training images: --probe takes val, datasets of tfds and folders'),
    ([f'--folder={folder}', '--report=page.html'], '--report is about the accuracy of classifiers: leave out --probe'),
    ([f'--folder={folder}', '--all_classes'], '--all_classes is about the accuracy of classifiers: leave out --probe'),
    ([], 'which images? Give --sets=val or datasets of tfds, or --folder=DIR with train and validation'),
    ([f'--folder={folder / "train"}'], 'has no folder train: images are expected as'),
  ):
    code, _, errors = command(weights[0], '--probe', *arguments)
    assert (code, message in errors) == (2, True), errors


@pytest.mark.slow
def test_the_report_is_drawn_from_kept_results(weights, command, tmp_path):
  page = tmp_path / 'page.html'
  arguments = [weights[0], f'--sets={SPLIT}', f'--report={page}']
  assert command(*arguments)[0] == 0
  first = page.read_text()
  assert 'Most confused classes' in first
  assert 'data:image/jpeg;base64,' in first  # of a confused pair
  page.unlink()
  code, _, errors = command(*arguments)
  assert (code, '1 of 1 results are those of' in errors, page.read_text() == first) == (0, True, True)


def start(*arguments, **environment):
  return start_command(sys.executable, '-m', 't2t_vit_jax.evaluate', *arguments, PYTHONPATH=str(ROOT), **environment)


def two_sets(weights, data_dir, results):
  """Flags for a short set and a long one."""
  sets = [f'--sets={SPLIT},digits:train', f'--data_dir={data_dir}']
  return [weights[0], *sets, f'--results={results}', '--batch_size=2']


def wait_for_a_result(process, results):
  while not (results.exists() and results.read_text().endswith('\n')):
    assert process.poll() is None, process.communicate()
    time.sleep(0.1)


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(weights, data_dir, tmp_path):
  results = tmp_path / 'results.jsonl'
  flags = two_sets(weights, data_dir, results)
  process = start(*flags)
  wait_for_a_result(process, results)
  process.send_signal(signal.SIGINT)
  ((code, output, errors),) = finish([process])
  assert (code, output) == (130, '')
  assert f'results are kept in {results} as they come: after a stop, the same command goes on\n' in errors
  assert errors.splitlines()[-1] == 'interrupted'
  ((code, output, errors),) = finish([start(*flags, '--json')])
  assert '1 of 2 results are those of' in errors
  first, second = json.loads(output)
  assert (first['count'], second['count']) == (40, 1437)
  assert first == json.loads(results.read_text().splitlines()[0])


@pytest.mark.slow
def test_a_killed_process_ends_the_others(weights, data_dir, tmp_path):
  results = tmp_path / 'results.jsonl'
  flags = two_sets(weights, data_dir, results)
  running = [start(*flags, *own) for own in process_flags(2)]
  wait_for_a_result(running[0], results)
  running[1].kill()
  (code, _, errors), _ = finish(running)
  assert code == 2, errors
  assert re.fullmatch(
    'error: process 0 cannot reach the others any more .* command goes on .*', errors.splitlines()[-1]
  )
  assert len(results.read_text().splitlines()) == 1


@pytest.mark.slow
def test_devices_and_processes_agree(weights, data_dir, tmp_path):
  """One process with one device, one with four, and two with two."""
  found = []
  for number, (count, devices) in enumerate(((1, 1), (1, 4), (2, 2))):
    output = tmp_path / f'{number}.json'  # standard output has lines of the library by which CPU processes talk, too
    flags = [weights[0], f'--sets={SPLIT}', f'--data_dir={data_dir}', '--batch_size=7', f'--output={output}']
    flags.append(f'--results={tmp_path / str(number)}')
    own = process_flags(count) if count > 1 else [[]]
    done = finish([start(*flags, *each, JAX_NUM_CPU_DEVICES=str(devices)) for each in own])
    assert [code for code, _, _ in done] == [0] * count, done
    assert [f'wrote {output}' in text for _, text, _ in done] == [True] + [False] * (count - 1)
    found += json.loads(output.read_text())
  assert len(found) == 3
  for row in found:
    assert (row['correct'], row['correct_top5'], row['count']) == (found[0]['correct'], found[0]['correct_top5'], 40)
    assert row['loss'] == pytest.approx(found[0]['loss'], rel=1e-6)
