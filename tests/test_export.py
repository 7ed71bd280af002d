"""The exported file against the model it was made from, in processes that have neither Flax nor this package."""

import json
import os
from pathlib import Path
import re
import resource
import subprocess
import sys

import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from t2t_vit_jax import load_pretrained
from t2t_vit_jax.conversion import Options, convert
from t2t_vit_jax.data.transforms import ResizeCenterCrop
from t2t_vit_jax.export import export_weights, main
from tests import checkpoints, golden
from tests.parameters import slow
from tests.weights_cache import put_into_cache

ROOT = Path(__file__).parents[1]
ATOL = 1e-5
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
CIFAR_MEAN = [0.4914, 0.4822, 0.4465]


def random_images(batch, height=64, width=64):
  return np.random.default_rng(batch).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def performer(tmp_path_factory):
  """The golden performer, converted."""
  return golden.converted('performer', tmp_path_factory.mktemp('weights'))


def exported(weights, **options):
  """Program, weights and metadata of the exported file."""
  output = weights.with_suffix('.npz')
  export_weights(weights, output, force=True, **options)
  with np.load(output) as file:
    arrays = dict(file)
  metadata = json.loads(str(arrays.pop('metadata')))
  return jax_export.deserialize(bytearray(arrays.pop('program'))), arrays, metadata


def logits_of_model(weights, images, mean=MEAN, std=STD, dtype=jnp.float32, **options):
  model, variables = load_pretrained(weights, **options)
  return jax.jit(model.clone(dtype=dtype).apply)(variables, (images.astype(np.float32) / 255 - mean) / std)


@pytest.mark.parametrize(
  ('name', 'batches'),
  [
    slow('performer_qkbias_qkscale', [1, 3, 8]),
    ('transformer', [1, 3, 8]),
    slow('se', [3]),
    slow('ghost', [3]),
    slow('dense', [3]),
  ],
)
def test_logits_equal_the_models_for_any_batch(name, batches, tmp_path):
  weights = golden.converted(name, tmp_path)
  program, arrays, _ = exported(weights)
  images = random_images(8)
  expected = logits_of_model(weights, images)
  assert np.std(expected) > 0.05  # so that the tolerance means something
  for batch in batches:
    logits = jax.jit(program.call)(arrays, images[:batch])
    assert (logits.shape, logits.dtype) == ((batch, 10), jnp.float32)
    np.testing.assert_allclose(logits, expected[:batch], atol=ATOL)


@pytest.mark.slow
def test_both_heads_of_token_labeling_are_exported(performer):
  bias, images = np.linspace(-3, 3, 10), random_images(1)
  program, arrays, _ = exported(golden.with_second_head(performer, bias))
  expected = np.asarray(logits_of_model(performer, images)) + bias / 2
  np.testing.assert_allclose(jax.jit(program.call)(arrays, images), expected, atol=ATOL)


def test_one_program_is_lowered_for_every_platform_and_batch(performer):
  program, arrays, metadata = exported(performer)
  assert program.platforms == tuple(metadata['platforms']) == ('cpu', 'cuda', 'tpu')
  batch, *sides = program.in_avals[-1].shape
  assert jax_export.is_symbolic_dim(batch)
  assert sides == [64, 64, 3]
  assert program.nr_devices == 1
  with pytest.raises(ValueError, match='expected uint8'):
    program.call(arrays, random_images(1).astype(np.float32))
  with pytest.raises(ValueError, match='Shape mismatch'):
    program.call(arrays, random_images(1, 96, 96))


def test_normalisation_and_class_names_come_with_the_weights(tmp_path):
  for form in ('cifar', 'mmpretrain'):
    checkpoints.save_form(form, tmp_path / form)
    convert(tmp_path / form, tmp_path / f'{form}.safetensors', Options(settings={'num_heads': 4}))
  program, arrays, metadata = exported(tmp_path / 'cifar.safetensors')
  assert metadata['mean'] == CIFAR_MEAN
  assert (metadata['interpolation'], metadata['crop_fraction'], metadata['class_names']) == ('bilinear', 1.0, None)
  expected = logits_of_model(tmp_path / 'cifar.safetensors', random_images(2), metadata['mean'], metadata['std'])
  np.testing.assert_allclose(jax.jit(program.call)(arrays, random_images(2)), expected, atol=ATOL)

  metadata = exported(tmp_path / 'mmpretrain.safetensors')[2]
  assert metadata['class_names'] == [f'class {i}' for i in range(10)]
  assert metadata['source']['file'] == 'mmpretrain'
  assert metadata['versions']['jax'] == jax.__version__


@pytest.mark.slow
def test_bfloat16_computes_as_the_model_does(performer):
  program, arrays, metadata = exported(performer, dtype='bfloat16')
  images = random_images(3)
  logits = jax.jit(program.call)(arrays, images)
  assert (metadata['dtype'], logits.dtype) == ('bfloat16', jnp.float32)
  # XLA rounds to bfloat16 where a fusion ends: the same model with jax.jit and without it differs by 1e-2.
  np.testing.assert_allclose(logits, logits_of_model(performer, images, dtype=jnp.bfloat16), rtol=0, atol=2e-2)
  assert 'xbf16>' in program.mlir_module()


@pytest.mark.slow
def test_another_image_size_resizes_the_positions(performer):
  program, arrays, metadata = exported(performer, image_size=(96, 128))
  images = random_images(2, 96, 128)
  assert metadata['image_size'] == [96, 128]
  expected = logits_of_model(performer, images, image_size=(96, 128))
  np.testing.assert_allclose(jax.jit(program.call)(arrays, images), expected, atol=ATOL)


@pytest.mark.slow
def test_the_same_weights_give_the_same_file_and_it_names_no_source_file(performer, tmp_path):
  for name in ('a', 'b'):
    export_weights(performer, tmp_path / name)
  assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()
  assert b'.py"' not in exported(performer)[0].mlir_module().encode()
  assert b'.py' not in (tmp_path / 'a').read_bytes()


ONLY_JAX = """
import sys

finders = sys.meta_path[:]
known = {*sys.stdlib_module_names, 'jax', 'jaxlib', 'flatbuffers', 'ml_dtypes', 'numpy', 'opt_einsum', 'scipy'}


class OnlyJax:
  def find_spec(self, name, path=None, target=None):
    top = name.partition('.')[0]
    if top in known or top.startswith('_sysconfigdata'):  # the standard library's build settings: its name varies
      return next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)


sys.meta_path[:] = [OnlyJax()]
"""


@pytest.mark.slow
def test_the_documented_lines_need_only_jax(performer, tmp_path):
  loader, _, several_devices = documented('python')
  images = random_images(8)
  np.save(tmp_path / 'images.npy', images)
  cache = tmp_path / 'cache'
  put_into_cache(performer.read_bytes(), 't2t_vit_14', cache)
  command = next(line for line in documented('bash')[0].splitlines() if 't2t_vit_jax.export' in line)
  assert command.startswith('python ')
  printed = run(
    [sys.executable, *command.split()[1:]], tmp_path, PYTHONPATH=path_with(ROOT), T2T_VIT_JAX_CACHE=str(cache)
  )
  assert printed.startswith('wrote t2t_vit_14.npz: uint8[B,64,64,3] -> float32[B,10], for cpu, cuda, tpu')

  code = [
    ONLY_JAX,
    loader,
    "images = np.load('images.npy')",
    "np.save('one.npy', classify(weights, images))",
    several_devices,
    'assert len(logits.sharding.device_set) == 2',
    "np.save('two.npy', logits)",
    "print([name for name in ('flax', 't2t_vit_jax') if name in sys.modules])",
  ]
  assert run([sys.executable, '-c', '\n'.join(code)], tmp_path, JAX_NUM_CPU_DEVICES='2') == '[]\n'
  for file in ('one.npy', 'two.npy'):
    np.testing.assert_allclose(np.load(tmp_path / file), logits_of_model(performer, images), atol=ATOL)


@pytest.mark.parametrize(('width', 'height'), [(301, 200), (90, 133)])
def test_the_documented_preparation_is_that_of_evaluation(width, height, tmp_path):
  image = Image.fromarray(random_images(1, height, width)[0])
  image.save(tmp_path / 'image.png')
  names = {'np': np, 'metadata': {'image_size': [64, 64], 'crop_fraction': 0.9, 'interpolation': 'bicubic'}}
  exec(documented('python')[1], names)
  expected = ResizeCenterCrop(64, 0.9, 'bicubic')(image)
  np.testing.assert_array_equal(names['prepare'](tmp_path / 'image.png'), np.asarray(expected))


def documented(language):
  """The blocks of a language in docs/export.md."""
  return re.findall(rf'```{language}\n(.*?)```', (ROOT / 'docs' / 'export.md').read_text(), re.DOTALL)


def path_with(folder):
  return os.pathsep.join([str(folder), *filter(None, [os.environ.get('PYTHONPATH')])])


def run(command, folder, **variables):
  """What a command prints."""
  environment = {**os.environ, **variables}
  result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
  assert result.returncode == 0, result.stderr
  return result.stdout


def refusal(arguments, capsys):
  """The line with which the program refuses."""
  assert main(list(map(str, arguments))) == 2
  printed, errors = capsys.readouterr()
  assert printed == ''
  (line,) = errors.splitlines()
  return line


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['{weights}'], '--output'),
    (['--output={output}'], 'WEIGHTS'),
    (['{weights}', '--output={output}', '--ouput=x'], '--ouput'),
    (['{weights}', '--output={output}', '--dtype=float16'], "'float16' (choose from"),
    (['{weights}', '--output={output}', '--image_size=big'], 'HEIGHTxWIDTH'),
    (['{weights}', '--output={output}', '--image_size=0'], 'too small'),
    (['{weights}', '--output={weights}'], '--force'),
    (['{weights}', '--output={folder}'], 'it is a folder'),
    (['{weights}', '--output={folder}/missing/out.npz'], 'its folder does not exist'),
    (['{folder}/missing', '--output={output}'], 'missing: no such file'),
    (['{folder}/text', '--output={output}'], 'text: is neither'),
    (['{folder}/half', '--output={output}'], 'half: damaged'),
    (['{folder}/headless', '--output={output}'], 'headless: holds no model with a head'),
    (['{folder}/no_mean', '--output={output}'], 'no_mean: its metadata lack data.mean: it must be a list'),
    (['{folder}/torch.pth', '--output={output}'], 'torch.pth: is no weight file of this package'),
    (['{folder}/other', '--output={output}'], 'other: is no weight file of this package'),
  ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(arguments, says, performer, tmp_path, capsys):
  (tmp_path / 'text').write_text('weights')
  (tmp_path / 'half').write_bytes(performer.read_bytes()[:-100])
  convert(performer, tmp_path / 'headless', Options(num_classes=0))
  with safetensors.safe_open(performer, framework='np') as file:
    header = {key: text.replace('"mean"', '"middle"') for key, text in file.metadata().items()}
  safetensors.numpy.save_file(safetensors.numpy.load_file(performer), tmp_path / 'no_mean', header)
  checkpoints.save_form('bare', tmp_path / 'torch.pth')
  safetensors.numpy.save_file({'x': np.ones(3)}, tmp_path / 'other')
  before = {path: path.read_bytes() for path in tmp_path.iterdir()}
  names = dict(weights=performer, output=tmp_path / 'out.npz', folder=tmp_path)
  line = refusal([argument.format(**names) for argument in arguments], capsys)
  assert line.startswith('error: ')
  assert says in line
  assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_a_disk_that_is_full_keeps_what_was_there(performer, tmp_path, capsys):
  output = tmp_path / 'out.npz'
  output.write_bytes(b'before')
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # bytes; the file has more
  try:
    line = refusal([performer, '--output', output, '--force'], capsys)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert 'out.npz: cannot be written: File too large' in line
  assert output.read_bytes() == b'before'
  assert list(tmp_path.iterdir()) == [output]
  assert main([str(performer), '--output', str(output), '--force']) == 0
  assert len(output.read_bytes()) > 200_000
