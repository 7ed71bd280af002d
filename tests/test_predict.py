"""Predictions against the model by itself, and what the command prints, writes and refuses."""

import csv
import dataclasses
import io
import json
import os
from pathlib import Path
import re
import resource
import shutil
import subprocess
import sys
import warnings

import jax
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from t2t_vit_jax import UserError, load_pretrained, visualize
from t2t_vit_jax.conversion import Options, convert
from t2t_vit_jax.conversion.convert import load
from t2t_vit_jax.conversion.weight_format import write_weights
from t2t_vit_jax.data.decoding import MAX_SIDE
from t2t_vit_jax.data.transforms import ResizeCenterCrop
from t2t_vit_jax.errors import printable
from t2t_vit_jax.predict import main, open_classifier, predict
from tests import checkpoints, golden
from tests.image_folder import encoded, picture
from tests.processes import ROOT
from tests.weights_cache import put_into_cache

MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """The golden performer, 64 px and 10 classes without names."""
  return golden.converted('performer', tmp_path_factory.mktemp('weights'))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """Five images, one of them in a folder, and one file that is none."""
  folder = tmp_path_factory.mktemp('photos')
  rng = np.random.default_rng(0)
  (folder / 'c').mkdir()
  for name in ('a.jpg', 'b.png', 'c/d.webp', 'e.JPEG', 'f.bmp'):
    (folder / name).write_bytes(encoded(picture(rng), Image.registered_extensions()[Path(name).suffix.lower()]))
  (folder / 'c' / 'bad.png').write_bytes(b'no picture')
  return folder


NAMES = ['a.jpg', 'b.png', 'c/bad.png', 'c/d.webp', 'e.JPEG', 'f.bmp']


@pytest.fixture(scope='module')
def expected(weights, photos):
  """Probabilities of each image by itself, (10,), computed by hand from the logits."""
  model, variables = load_pretrained(weights)
  apply = jax.jit(model.apply)
  found = {}
  for name in NAMES:
    if name != 'c/bad.png':
      crop = np.asarray(ResizeCenterCrop(64, 0.9, 'bicubic')(Image.open(photos / name).convert('RGB')), np.float32)
      logits = np.asarray(apply(variables, ((crop / 255 - MEAN) / STD)[None])[0], np.float64)
      found[str(photos / name)] = np.exp(logits) / np.exp(logits).sum()
  return found


def run(*arguments, capsys):
  """Exit code, standard output and standard error of the command."""
  code = main([str(argument) for argument in arguments])
  return code, *capsys.readouterr()


def test_predictions_are_the_models_in_any_batch(weights, photos, expected):
  classifier = open_classifier(weights)
  images = [str(photos / name) for name in NAMES]
  for batch_size in (4, 100):
    predictions = list(predict(classifier, images, top=3, batch_size=batch_size))
    assert [prediction.image for prediction in predictions] == images
    for image, guesses, error in predictions:
      if image.endswith('bad.png'):
        assert (guesses, error) == ((), 'no image file')
        continue
      order = np.argsort(-expected[image])[:3]
      assert [guess.label for guess in guesses] == order.tolist()
      assert [guess.name for guess in guesses] == [f'class {label}' for label in order]
      np.testing.assert_allclose([guess.probability for guess in guesses], expected[image][order], atol=1e-6)


def test_both_heads_of_token_labeling_count(weights, photos, expected):
  bias = np.linspace(-3, 3, 10)
  classifier = open_classifier(golden.with_second_head(weights, bias))
  image = str(photos / 'a.jpg')
  joined = expected[image] * np.exp(bias / 2)
  joined /= joined.sum()
  (prediction,) = predict(classifier, [image], top=10)
  assert [guess.label for guess in prediction.guesses] == np.argsort(-joined).tolist()
  np.testing.assert_allclose([guess.probability for guess in prediction.guesses], np.sort(joined)[::-1], atol=1e-6)
  inside = visualize.look_inside(classifier, classifier.prepare(Image.open(image)))
  assert inside.guess == (f'class {joined.argmax()}', pytest.approx(joined.max(), abs=1e-6))


def test_the_last_batch_compiles_no_second_program(weights, photos, caplog):
  images = [str(photos / name) for name in NAMES]
  classifier = open_classifier(weights)
  with jax.log_compiles(True):
    assert len(list(predict(classifier, images, batch_size=5))) == 6
  assert len([text for text in caplog.messages if text.startswith('Compiling jit(_classify)')]) == 1


def test_preparation_is_what_the_weights_say(tmp_path, photos):
  checkpoints.save_form('cifar', tmp_path / 'cifar')
  convert(tmp_path / 'cifar', tmp_path / 'cifar.safetensors', Options(settings={'num_heads': 4}, image_size=(48, 80)))
  classifier = open_classifier(tmp_path / 'cifar.safetensors')
  image = Image.open(photos / 'b.png').convert('RGB')
  prepared = classifier.prepare(image)
  assert prepared == ResizeCenterCrop((48, 80), 1.0, 'bilinear')(image)
  pixels = np.asarray(prepared, np.float32)
  mean, std = np.array([0.4914, 0.4822, 0.4465], np.float32), np.array([0.2023, 0.1994, 0.2010], np.float32)
  np.testing.assert_allclose(classifier.normalize(pixels[None])[0], (pixels / 255 - mean) / std, atol=1e-5)


@pytest.mark.slow
def test_devices_that_are_not_there_get_one_line(weights, photos):
  command = [sys.executable, '-m', 't2t_vit_jax.predict', weights, photos]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cuda', 'PYTHONPATH': str(ROOT)}
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith('error: JAX finds no devices with JAX_PLATFORMS=cuda (')
  assert 'Traceback' not in done.stderr


def test_a_photograph_is_turned_upright(weights, photos, tmp_path):
  image, exif = Image.open(photos / 'b.png').convert('RGB'), Image.Exif()
  exif[0x0112] = 6  # to be turned clockwise
  image.save(tmp_path / 'photo.png', exif=exif)
  image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / 'turned.png')
  photo, turned = predict(open_classifier(weights), [str(tmp_path / name) for name in ('photo.png', 'turned.png')])
  assert [guess.label for guess in photo.guesses] == [guess.label for guess in turned.guesses]
  # Rows of one batch: threads may add up the numbers of each in another order.
  np.testing.assert_allclose(*([guess.probability for guess in x.guesses] for x in (photo, turned)), atol=1e-6)


def test_text_json_and_csv_say_the_same(weights, photos, expected, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(photos)
  code, text, errors = run(weights, '.', '--top=2', '--batch_size=4', capsys=capsys)
  assert code == 1
  assert errors.splitlines() == [
    'warning: c/bad.png cannot be read (no image file)',
    'warning: 1 of 6 images cannot be read; the others were classified',
  ]
  lines = text.splitlines()
  assert lines[::3] == [name for name in NAMES if name != 'c/bad.png']
  best = expected[str(photos / 'a.jpg')]
  first, second = np.argsort(-best)[:2]
  assert lines[1:3] == [f'{100 * best[label]:7.2f} %  class {label}' for label in (first, second)]

  output = tmp_path / 'predictions.json'
  assert run(weights, '.', '--output', output, capsys=capsys)[:2] == (1, f'wrote {output}: predictions for 5 images\n')
  entries = json.loads(output.read_text())
  assert [entry['image'] for entry in entries] == NAMES
  assert [entry['error'] for entry in entries] == [None, None, 'no image file', None, None, None]
  for entry in entries:
    assert len(entry['predictions']) == (5 if entry['error'] is None else 0)
    for guess in entry['predictions']:
      assert guess['probability'] == pytest.approx(expected[str(photos / entry['image'])][guess['label']], abs=1e-6)
      assert guess['name'] == f'class {guess["label"]}'

  code, text, _ = run(weights, 'a.jpg', 'c', '--csv', '--top=99', capsys=capsys)
  assert code == 1
  rows = list(csv.DictReader(io.StringIO(text)))
  assert [row['image'] for row in rows] == ['a.jpg'] * 10 + ['c/bad.png'] + ['c/d.webp'] * 10
  assert [row['rank'] for row in rows[:10]] == [str(rank) for rank in range(1, 11)]  # there are ten classes
  assert sum(float(row['probability']) for row in rows[:10]) == pytest.approx(1)
  assert list(rows[10].values()) == ['c/bad.png', '', '', '', '', 'no image file']


def test_class_names_come_from_the_weights(tmp_path, photos, capsys):
  checkpoints.save_form('mmpretrain', tmp_path / 'mmpretrain')
  convert(tmp_path / 'mmpretrain', tmp_path / 'named.safetensors', Options(settings={'num_heads': 4}))
  code, text, errors = run(tmp_path / 'named.safetensors', photos / 'a.jpg', '--json', capsys=capsys)
  assert (code, errors) == (0, '')
  (entry,) = json.loads(text)
  assert {guess['name'] for guess in entry['predictions']} <= {f'class {i}' for i in range(10)}


def test_names_of_files_may_be_anything(weights, photos, tmp_path, capsys):
  names = [b'new\nline, "comma".png', b'no utf-8 \xff.png', 'ünï.png'.encode()]
  for name in names:
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes((photos / 'b.png').read_bytes())
  found = sorted(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)) for name in names)
  code, text, _ = run(weights, tmp_path, '--json', capsys=capsys)
  assert code == 0
  assert sorted(entry['image'] for entry in json.loads(text)) == found
  code, text, _ = run(weights, tmp_path, '--csv', '--top=1', capsys=capsys)
  images = [row['image'] for row in csv.DictReader(io.StringIO(text))]
  assert images[0] == str(tmp_path / 'new\\nline, "comma".png')
  assert len(text.splitlines()) == 1 + 3
  code, text, _ = run(weights, tmp_path, '--top=1', capsys=capsys)
  assert len(text.splitlines()) == 2 * 3
  assert main([str(weights), str(tmp_path), '--output', str(tmp_path / 'out.csv')]) == 0


def test_names_of_classes_may_be_anything(weights, photos, tmp_path, capsys):
  names = (
    '\x1b[2Jx',
    'a\nwarning: forged',
    "=cmd|' /C calc'!A0",
    '+1',
    '-1',
    '@SUM(A1)',
    '\t=1',
    '\r=1',
    'a,"b"',
    '\ud800',
  )
  loaded = load(weights, Options())[0]
  write_weights(dataclasses.replace(loaded, class_names=names), tmp_path / 'hostile.safetensors')
  arguments = (tmp_path / 'hostile.safetensors', photos / 'a.jpg', '--top=10')
  entries = json.loads(run(*arguments, '--json', capsys=capsys)[1])
  order = [guess['label'] for guess in entries[0]['predictions']]
  assert [guess['name'] for guess in entries[0]['predictions']] == [names[label] for label in order]
  text = run(*arguments, capsys=capsys)[1]
  assert text.replace('\n', '').isprintable()
  assert [line.split(' %  ')[1] for line in text.splitlines()[1:]] == [printable(names[label]) for label in order]
  table = run(*arguments, '--csv', capsys=capsys)[1]
  assert table.replace('\n', '').isprintable()
  rows = list(csv.DictReader(io.StringIO(table)))
  assert [row['label'] for row in rows] == [str(label) for label in order]
  assert not any(row['name'].startswith(('=', '+', '-', '@')) for row in rows)


def test_an_image_beyond_the_bounds_ends_nothing_else(weights, photos, tmp_path, capsys):
  shutil.copy(photos / 'a.jpg', tmp_path)
  Image.new('1', (1, MAX_SIDE + 1)).save(tmp_path / 'long.png')
  os.mkfifo(tmp_path / 'pipe.png')
  code, text, errors = run(weights, tmp_path, '--top=1', capsys=capsys)
  assert (code, len(text.splitlines())) == (1, 2)
  assert errors.splitlines() == [
    f'warning: {tmp_path}: 1 are no regular files and left out, such as {tmp_path}/pipe.png',
    f'warning: {tmp_path}/long.png cannot be read (1 x 1,048,577 px, of at most 1,048,576 on a side)',
    'warning: 1 of 2 images cannot be read; the others were classified',
  ]


def test_images_of_which_none_can_be_read_are_an_error(weights, tmp_path, capsys):
  for name in ('a.png', 'b.jpg'):
    (tmp_path / name).write_bytes(b'no picture')
  code, text, errors = run(weights, tmp_path, '--json', capsys=capsys)
  assert (code, [entry['error'] for entry in json.loads(text)]) == (2, ['no image file'] * 2)
  assert errors.splitlines() == [
    *(f'warning: {tmp_path / name} cannot be read (no image file)' for name in ('a.png', 'b.jpg')),
    'error: no image can be read',
  ]
  output = tmp_path / 'out.json'
  assert run(weights, tmp_path, '--output', output, capsys=capsys)[:2] == (2, '')
  assert {file.name for file in tmp_path.iterdir()} == {'a.png', 'b.jpg'}


def test_an_output_of_no_known_form_is_refused_before_the_work(photos, capsys):
  code, _, errors = run('no weights', photos, '--output', photos / 'out.xlsx', capsys=capsys)
  assert (code, errors) == (2, f'error: --output {photos / "out.xlsx"}: the name must end with .txt, .json or .csv\n')


def test_weights_that_give_no_number_are_refused(weights, photos, tmp_path, capsys):
  loaded = load(weights, Options())[0]
  arrays = {**loaded.arrays, 'params/head/kernel': np.full_like(loaded.arrays['params/head/kernel'], 3e38)}
  write_weights(dataclasses.replace(loaded, arrays=arrays), tmp_path / 'huge.safetensors')
  for tool, more in ((main, ()), (visualize.main, (f'--output={tmp_path}/out.png',))):
    assert tool([str(tmp_path / 'huge.safetensors'), str(photos / 'a.jpg'), *more]) == 2
    assert capsys.readouterr().err == (
      'error: the weights give no finite probabilities: they are damaged, or not those of a trained model\n'
    )


def test_warnings_of_pillow_take_one_line(weights, photos, tmp_path, capsys):
  exif = b'Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\xff\0\0\0\xff\0\0\0'  # whose text lies beyond its end
  Image.open(photos / 'a.jpg').save(tmp_path / 'exif.jpg', exif=exif)
  with warnings.catch_warnings():
    warnings.simplefilter('once')
    code, _, errors = run(weights, tmp_path, '--top=1', capsys=capsys)
  assert code == 0
  assert 'orrupt EXIF' in errors
  assert all(line.startswith('warning: ') for line in errors.splitlines())


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['{weights}'], 'IMAGE_OR_FOLDER'),
    (['{weights}', '{photos}', '--tpo=3'], '--tpo'),
    (['{weights}', '{photos}', '--top=0'], "argument --top: must be a whole number from 1 on, not '0'"),
    (
      ['{weights}', '{photos}', '--batch_size=many'],
      "argument --batch_size: must be a whole number from 1 on, not 'many'",
    ),
    (['{weights}', '{photos}', '--json', '--csv'], 'not allowed with'),
    (['{weights}', '{photos}', '--image_size=big'], 'HEIGHTxWIDTH'),
    (['{weights}', '{photos}', '--image_size=1'], 'too small'),
    (['{weights}', '{photos}/nothing'], 'there is no file or folder'),
    (['{weights}', '{folder}/empty'], 'empty has no images'),
    (['{folder}/missing', '{photos}'], 'missing: no such file or folder; weights are a file, the folder of a run'),
    (['{folder}/pipe', '{photos}'], 'pipe: is no regular file'),
    (['{weights}', '{folder}/pipe'], 'pipe is no regular file'),
    (['{photos}/a.jpg', '{photos}'], 'a.jpg: is neither a PyTorch checkpoint nor a safetensors file'),
    (['{folder}/headless', '{photos}'], 'headless: holds no model with a head'),
    (
      ['{folder}/other_crop', '{photos}'],
      'other_crop: data.crop_fraction in its metadata must be a number from 0.01 to 1, not 0',
    ),
    (['{weights}', '{photos}', '--output={folder}/there.csv'], 'there.csv: exists already; --force overwrites it'),
    (['{weights}', '{photos}', '--output={folder}/no/out.csv'], 'its folder does not exist'),
  ],
)
def test_what_cannot_be_done_is_refused_in_one_line(arguments, says, weights, photos, tmp_path, capsys):
  (tmp_path / 'empty').mkdir()
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'there.csv').write_text('before')
  convert(weights, tmp_path / 'headless', Options(num_classes=0))
  with safetensors.safe_open(weights, framework='np') as file:
    header = {key: text.replace('"crop_fraction": 0.9', '"crop_fraction": 0') for key, text in file.metadata().items()}
  safetensors.numpy.save_file(safetensors.numpy.load_file(weights), tmp_path / 'other_crop', header)
  names = dict(weights=weights, photos=photos, folder=tmp_path)
  code, printed, errors = run(*(argument.format(**names) for argument in arguments), capsys=capsys)
  (line,) = errors.splitlines()
  assert (code, printed) == (2, '')
  assert line.startswith('error: ')
  assert says in line
  assert (tmp_path / 'there.csv').read_text() == 'before'


def test_a_full_disk_keeps_what_was_there(weights, photos, tmp_path, capsys):
  output = tmp_path / 'out.csv'
  assert main([str(weights), str(photos / 'a.jpg'), '--output', str(output)]) == 0  # compiles, which writes files too
  output.write_text('before')
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # bytes
  try:
    code, _, errors = run(weights, photos / 'a.jpg', '--output', output, '--force', capsys=capsys)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert code == 2
  assert 'out.csv: cannot be written: File too large' in errors
  assert [path.read_text() for path in tmp_path.iterdir()] == ['before']


def test_a_batch_beyond_memory_is_said_in_one_line(weights, photos, monkeypatch):
  def exhausted(*unused):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.')

  monkeypatch.setattr('t2t_vit_jax.predict._classify', exhausted)
  with pytest.raises(UserError, match='a batch of 2 images does not fit into memory: set a smaller --batch_size'):
    list(predict(open_classifier(weights), [str(photos / 'a.jpg')] * 2))


@pytest.mark.slow
def test_the_reader_may_go_away_and_the_disk_be_full(weights, photos):
  command = [sys.executable, '-m', 't2t_vit_jax.predict', str(weights), *[str(photos / 'a.jpg')] * 2000, '--top=10']
  environment = {
    **os.environ,
    'PYTHONPATH': os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH')])),
  }
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
    assert process.stdout.readline() == f'{photos / "a.jpg"}\n'
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == ('', 141)
  with open('/dev/full', 'w') as full:
    result = subprocess.run(
      [*command[:5], '--json'], stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
    )
  assert (result.returncode, result.stderr) == (
    2,
    'error: standard output cannot be written: No space left on device\n',
  )


DOCUMENT = (Path(__file__).parents[1] / 'docs' / 'predict.md').read_text()


@pytest.mark.slow
def test_the_documented_python_runs(weights, photos, tmp_path, monkeypatch, capsys):
  put_into_cache(weights.read_bytes(), 't2t_vit_14', tmp_path / 'cache')
  monkeypatch.setenv('T2T_VIT_JAX_CACHE', str(tmp_path / 'cache'))
  shutil.copytree(photos, tmp_path / 'photos')
  monkeypatch.chdir(tmp_path)
  code = (
    '\n'.join(re.findall(r'```python\n(.*?)```', DOCUMENT, re.DOTALL)) + '\nlast = last_attention(variables, images)'
  )
  # A smaller model in its place, with two blocks and 4 x 4 tokens.
  for documented, here in (('224', '64'), ('blocks_13', 'blocks_1'), ('14, 14)', '4, 4)')):
    assert documented in code
    code = code.replace(documented, here)
  names: dict[str, object] = {}
  exec(code, names)
  assert len(capsys.readouterr().out.splitlines()) == 6
  np.testing.assert_allclose(names['last'], names['weights'], atol=1e-6)
  np.testing.assert_array_equal(names['to_tokens'][2, 3, 1, 2], names['weights'][2, 3, 0, 1 + 4 + 2])


def test_the_documented_commands_and_options_exist(weights, photos, tmp_path, monkeypatch, capsys):
  put_into_cache(weights.read_bytes(), 't2t_vit_14', tmp_path / 'cache')
  monkeypatch.setenv('T2T_VIT_JAX_CACHE', str(tmp_path / 'cache'))
  shutil.copytree(photos, tmp_path / 'photos')
  (tmp_path / 'cat.jpg').write_bytes((photos / 'a.jpg').read_bytes())
  monkeypatch.chdir(tmp_path)
  tools = {'predict': main, 'visualize': visualize.main}
  commands = re.findall(r'^t2t-vit (\w+) (t2t_vit_14.*)$', DOCUMENT, re.MULTILINE)
  assert [(tool, tools[tool](arguments.split())) for tool, arguments in commands] == [('predict', 1), ('visualize', 0)]
  assert (tmp_path / 'cat.png').is_file()
  capsys.readouterr()
  for tool, section in zip(tools, DOCUMENT.split('\n## Pictures\n'), strict=True):
    with pytest.raises(SystemExit) as end:
      tools[tool](['--help'])
    assert end.value.code == 0
    documented = set(
      re.findall(r'`(--\w+)', '\n'.join(line for line in section.splitlines() if line.startswith('| `--')))
    )
    assert documented == set(re.findall(r'--\w+', capsys.readouterr().out)) - {'--help'}
