"""The exported file against the model it was made from, in processes that have neither Flax nor this package."""

import importlib.util
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
from t2t_vit_jax.data.decoding import EncodedImage
from t2t_vit_jax.data.transforms import ResizeCenterCrop, pixels_of
from t2t_vit_jax.export import export_weights, main
from t2t_vit_jax.predict import open_classifier
from t2t_vit_jax.visualize import look_inside
from tests import checkpoints, golden
from tests.parameters import slow
from tests.weights_cache import put_into_cache

ROOT = Path(__file__).parents[1]
ATOL = 1e-5
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
ONNX = [pytest.mark.needs('jax2onnx'), pytest.mark.needs('onnxruntime')]
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
  loader, _, several_devices, _ = documented('python')
  images = random_images(8)
  np.save(tmp_path / 'images.npy', images)
  cache = tmp_path / 'cache'
  put_into_cache(performer.read_bytes(), 't2t_vit_14', cache)
  command = next(line for line in documented('bash')[0].splitlines() if line.startswith('t2t-vit export '))
  printed = run(
    [sys.executable, '-m', 't2t_vit_jax', *command.split()[1:]],
    tmp_path,
    PYTHONPATH=path_with(ROOT),
    T2T_VIT_JAX_CACHE=str(cache),
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


@pytest.mark.parametrize(('width', 'height', 'size'), [(301, 200, (64, 64)), (90, 133, (64, 64)), (301, 200, (96, 64))])
@pytest.mark.parametrize(
  'form', ['rgb.png', 'turned.jpg', 'mirrored.png', 'transparent.png', 'palette.png', 'cmyk.jpg']
)
@pytest.mark.parametrize(('orientation', 'channels'), [('upright', 3), ('ignored', 3), (None, 1)])
def test_the_documented_preparation_is_that_of_evaluation(width, height, size, form, orientation, channels, tmp_path):
  """Compares pictures stored sideways, transparent, with a palette or in other colours too."""
  path, exif = tmp_path / form, Image.Exif()
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8))
  exif[0x0112] = {'turned.jpg': 6, 'mirrored.png': 5}.get(form, 1)
  if form == 'palette.png':
    image.convert('RGB').quantize(16).save(path, transparency=3)
  else:
    mode = {'transparent.png': 'RGBA', 'cmyk.jpg': 'CMYK'}.get(form, 'RGB')
    (image if mode == 'RGBA' else image.convert('RGB').convert(mode)).save(path, exif=exif)
  metadata = {'image_size': list(size), 'crop_fraction': 0.9, 'interpolation': 'bicubic', 'mean': [0.5] * channels}
  names = {'np': np, 'metadata': metadata | ({'orientation': orientation} if orientation else {})}
  exec(documented('python')[1], names)
  decoded = EncodedImage(path.read_bytes(), upright=orientation != 'ignored').decode()
  expected = pixels_of(ResizeCenterCrop(size, 0.9, 'bicubic', channels)(decoded))
  np.testing.assert_array_equal(names['prepare'](path), expected)


def test_the_documented_preparation_refuses_deep_images(tmp_path):
  Image.fromarray(np.full((90, 90), 40_000, np.uint16)).save(tmp_path / 'deep.png')
  names = {'np': np, 'metadata': {}}
  exec(documented('python')[1], names)
  with pytest.raises(ValueError, match='more than 8 bits'):
    names['prepare'](tmp_path / 'deep.png')


@pytest.mark.parametrize('form', ['npz', pytest.param('onnx', marks=[pytest.mark.slow, *ONNX])])
def test_attention_is_that_of_visualize(form, performer, tmp_path):
  output = tmp_path / f'model.{form}'
  export_weights(performer, output, form=form, attention=True)
  images = random_images(2)
  if form == 'onnx':
    logits, attention = run_onnx(output, images)
  else:
    with np.load(output) as file:
      arrays = dict(file)
    assert json.loads(str(arrays.pop('metadata')))['outputs'] == ['logits', 'attention']
    logits, attention = jax.jit(jax_export.deserialize(bytearray(arrays.pop('program'))).call)(arrays, images)
  np.testing.assert_allclose(logits, logits_of_model(performer, images), atol=ATOL)
  for image, maps in zip(images, attention, strict=True):
    inside = look_inside(open_classifier(performer), Image.fromarray(image))
    expected = [heads.mean(axis=0) for heads in inside.attention.values()]
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(maps, expected, atol=ATOL)


def run_onnx(path, images):
  import onnxruntime

  return onnxruntime.InferenceSession(path).run(None, {'images': images})


@pytest.mark.slow
@pytest.mark.parametrize('name', ['performer_qkbias_qkscale', 'transformer', 'se', 'ghost', 'dense'])
@pytest.mark.needs('jax2onnx')
@pytest.mark.needs('onnxruntime')
def test_onnx_logits_equal_the_models_for_any_batch(name, tmp_path):
  weights, output = golden.converted(name, tmp_path), tmp_path / 'model.onnx'
  export_weights(weights, output, form='onnx')
  images = random_images(8)
  for batch in (1, 5, 8):
    (logits,) = run_onnx(output, images[:batch])
    np.testing.assert_allclose(logits, logits_of_model(weights, images)[:batch], atol=ATOL)


@pytest.mark.slow
@pytest.mark.needs('jax2onnx')
@pytest.mark.needs('onnxruntime')
def test_onnx_files_have_metadata_and_are_written_only_if_they_are_right(performer, tmp_path, monkeypatch, capsys):
  import onnx
  import onnxruntime

  output = tmp_path / 'model.onnx'
  assert main([str(performer), '--output', str(output)]) == 0
  printed, errors = capsys.readouterr()
  assert re.fullmatch(
    rf"wrote {output}: uint8\[B,64,64,3\] -> float32\[B,10\], ONNX Runtime's results differ from the model's by up to "
    r'\d\.\de-0\d, [\d.]+ kB\n',
    printed,
  )
  assert errors == ''
  stored = onnxruntime.InferenceSession(output).get_modelmeta().custom_metadata_map
  metadata, other = {key: json.loads(value) for key, value in stored.items()}, exported(performer)[2]
  own = {'opset': 18, 'converter': 'jax2onnx 0.13.0'}
  shared = {key: other[key] for key in other.keys() - {'platforms', 'calling_convention_version'}}
  assert metadata == shared | own

  damaged = onnx.load(output)
  weight = next(x for x in damaged.graph.initializer if list(x.dims) == [64, 10])  # the head's
  weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
  monkeypatch.setattr('t2t_vit_jax.export.onnx_program', lambda *unused: damaged)
  before = output.read_bytes()
  line = refusal([performer, '--output', output, '--force'], capsys)
  assert re.search(r"model\.onnx: not written: ONNX Runtime's results differ from the model's by \d", line)
  assert output.read_bytes() == before
  assert list(tmp_path.iterdir()) == [output]


def test_onnx_says_what_is_missing_and_computes_in_float32(performer, tmp_path, monkeypatch, capsys):
  output = tmp_path / 'model.onnx'
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name, *more: find(name, *more) if name != 'jax2onnx' else None
  )
  line = refusal([performer, '--output', output], capsys)
  assert re.fullmatch(r"error: --format=onnx needs jax2onnx: pip install .*\[onnx\]'", line)
  line = refusal([performer, '--output', output, '--dtype=bfloat16'], capsys)
  assert line == 'error: ONNX files compute in float32: leave out --dtype=bfloat16'


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
    (['{weights}', '--output={output}', '--output={folder}/out.txt'], 'must end with .npz or .onnx'),
    (['{weights}', '--output={weights}', '--format=npz'], '--force'),
    (['{weights}', '--output={folder}', '--format=npz'], 'it is a folder'),
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
