"""Reads the golden files in `tests/data`: numbers that the PyTorch reference produced (see tests/data/README.md)."""

import argparse
import dataclasses
import functools
from pathlib import Path
import pickle
import zipfile

from flax.traverse_util import unflatten_dict
import jax
import numpy as np
import optax

from t2t_vit_jax import T2TViT, conversion
from t2t_vit_jax.conversion import names
from t2t_vit_jax.conversion.convert import load
from t2t_vit_jax.conversion.weight_format import write_weights

DATA = Path(__file__).parent / 'data'

# Parameters of the PyTorch reference: all (with position table and random projections), trained.
PARAMETERS = {
  't2t_vit_7': (4_310_222, 4_255_694),
  't2t_vit_10': (5_889_230, 5_834_702),
  't2t_vit_12': (6_941_902, 6_887_374),
  't2t_vit_14': (21_545_550, 21_465_806),
  't2t_vit_19': (39_177_422, 39_085_070),
  't2t_vit_24': (64_105_934, 64_000_974),
  't2t_vit_t_14': (21_541_070, 21_465_422),
  't2t_vit_t_19': (39_172_942, 39_084_686),
  't2t_vit_t_24': (64_101_454, 64_000_590),
  't2t_vit_14_resnext': (21_545_550, 21_465_806),
  't2t_vit_14_wide': (25_156_302, 25_000_910),
  't2t_vit_14_se': (21_803_598, 21_723_854),
  't2t_vit_16_ghost': (16_253_262, 16_173_518),
  't2t_vit_dense': (23_647_062, 23_617_750),
}

# The golden models' arguments; heads and qk_scale leave no trace in the tensors.
TINY = dict(image_size=64, num_classes=10, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2.0, token_dim=16)
TINY_MODELS = {
  'performer': dict(TINY, tokens_type='performer'),
  'transformer': dict(TINY, tokens_type='transformer'),
  'performer_qkbias_qkscale': dict(TINY, tokens_type='performer', qkv_bias=True, qk_scale=0.17),
  'performer_own_pos_embed': dict(TINY, tokens_type='performer'),
  'se': dict(TINY, tokens_type='performer', token_dim=64, block_type='se'),
  'ghost': dict(TINY, tokens_type='performer', token_dim=64, mlp_ratio=3.0, block_type='ghost'),
  'dense': dict(
    TINY,
    tokens_type='performer',
    token_dim=64,
    embed_dim=32,
    block_type='dense',
    dense_stages=(1, 2),
    growth_rate=16,
  ),
}


def load_numbers(name):
  """The arrays of `tests/data/official_<name>.npz`."""
  with np.load(DATA / f'official_{name}.npz') as file:
    return dict(file)


def load_state_dict(name):
  """Torch tensors of the golden model `official_tiny_<name>.pth.tar` (its EMA weights) by their names."""
  import torch

  with torch.serialization.safe_globals([argparse.Namespace]):
    return torch.load(DATA / f'official_tiny_{name}.pth.tar', weights_only=True)['state_dict_ema']


class _ArrayReader(pickle.Unpickler):
  """Reads a file of `torch.save` with float32 tensors as one with arrays, where torch is not installed too."""

  def __init__(self, archive):
    self._archive, (self._root,) = archive, {name.split('/')[0] for name in archive.namelist()}
    super().__init__(archive.open(f'{self._root}/data.pkl'))

  def find_class(self, module, name):
    known = {
      'OrderedDict': dict,
      'Namespace': argparse.Namespace,
      'FloatStorage': '<f4',
      '_rebuild_tensor_v2': self.array,
    }
    return known[name]

  def persistent_load(self, reference):
    _, dtype, key, _, _ = reference
    return np.frombuffer(self._archive.read(f'{self._root}/data/{key}'), dtype)

  @staticmethod
  def array(storage, offset, shape, strides, *unused):
    return np.lib.stride_tricks.as_strided(
      storage[offset:], shape, [step * storage.itemsize for step in strides]
    ).copy()


def load_variables(name):
  """The same as variables `{'params': ..., 'frozen': ...}` of `T2TViT`."""
  with zipfile.ZipFile(DATA / f'official_tiny_{name}.pth.tar') as archive:
    return to_variables(_ArrayReader(archive).load()['state_dict_ema'])


def token_labeling():
  """Model, variables and numbers of the golden performer with a second head; its images are the performer's."""
  numbers = load_numbers('tiny_performer_token_labeling')
  variables = load_variables('performer')
  second_head = to_variables({name: numbers[name] for name in ('aux_head.weight', 'aux_head.bias')})['params']
  model = T2TViT(**TINY_MODELS['performer'], token_labeling=True)
  return model, {**variables, 'params': {**variables['params'], **second_head}}, numbers


def converted(name, folder, **options):
  """A golden model as a file of this package; `options` are those of `conversion.Options`."""
  settings = {key: TINY_MODELS[name][key] for key in ('num_heads', 'qk_scale') if key in TINY_MODELS[name]}
  path = folder / f'{name}.safetensors'
  conversion.convert(DATA / f'official_tiny_{name}.pth.tar', path, conversion.Options(settings=settings, **options))
  return path


def with_second_head(path, bias):
  """A weight file beside `path`, with a second head that finds the logits `bias` in every token."""
  weights, _ = load(path, conversion.Options())
  width, classes = weights.arrays['params/head/kernel'].shape
  second_head = {
    'params/aux_head/kernel': np.zeros((width, classes), np.float32),
    'params/aux_head/bias': np.array(bias, np.float32),
  }
  changes = dict(arrays=weights.arrays | second_head, arguments=weights.arguments | {'token_labeling': True})
  output = path.with_name('second_head.safetensors')
  write_weights(dataclasses.replace(weights, **changes), output)
  return output


def to_variables(tensors):
  """Nests arrays under torch names (all of a model's, or some) as the variables of `T2TViT`."""
  tokens_type, flat = names.tokens_type_of(tensors), {}
  for name, array in tensors.items():
    path, transform = names.from_torch(name, tokens_type)
    flat[path] = transform.to_here(array)
  return unflatten_dict(flat, sep='/')


@functools.cache
def _compiled(model, options):
  return jax.jit(functools.partial(model.apply, **dict(options)))


def apply(model, variables, images, rngs=None, **options):
  """`model.apply` as one program: operation by operation, each would be compiled by itself."""
  return _compiled(model, tuple(options.items()))(variables, images, rngs=rngs)


@functools.cache
def loss_and_gradients(model):
  """Compiles `(params, frozen, images, labels) -> ((loss, logits), gradients)`, of the mean cross entropy."""

  def loss_of(params, frozen, images, labels):
    logits = model.apply({'params': params, 'frozen': frozen}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

  return jax.jit(jax.value_and_grad(loss_of, has_aux=True))


def shapes_of(model, images):
  """Shapes and dtypes of a model's variables; each model is traced once for images of a size."""
  return _shapes_of(model, images.shape[1:])


@functools.cache
def _shapes_of(model, sizes):
  return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *sizes), np.float32))


def random_variables(model, images, seed=0):
  """Variables of a model that no program had to be compiled for: weights of a size that matters, frozen ones too."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    if path[-1].key == 'kernel':
      return noise / np.float32(np.prod(leaf.shape[:-1])) ** np.float32(0.5)
    return 0.2 * noise + (path[-1].key == 'scale')

  return jax.tree_util.tree_map_with_path(draw, shapes_of(model, images))
