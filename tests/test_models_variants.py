"""The table of named models against the published sizes."""

import jax
import jax.numpy as jnp
import pytest

import t2t_vit_jax
from t2t_vit_jax import UserError

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


def test_every_named_model_has_a_row_here():
  assert t2t_vit_jax.list_models() == list(PARAMETERS)


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
  model = t2t_vit_jax.create_model(name)
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
  everything, trained = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (variables, variables['params']))
  assert (everything, trained) == PARAMETERS[name]


def test_overrides_replace_the_variants_arguments():
  model = t2t_vit_jax.create_model('t2t_vit_14', num_classes=5, depth=2, image_size=96)
  assert (model.num_classes, model.depth, model.image_size, model.embed_dim) == (5, 2, 96, 384)


def test_the_small_model_is_known_but_not_listed():
  assert 't2t_vit_tiny' not in t2t_vit_jax.list_models()
  assert t2t_vit_jax.create_model('t2t_vit_tiny').embed_dim < 384


def test_unknown_names_are_answered_with_the_nearest():
  with pytest.raises(UserError, match=r"unknown model 't2t_vit_t14': did you mean .*'t2t_vit_t_14'"):
    t2t_vit_jax.create_model('t2t_vit_t14')
  with pytest.raises(UserError, match="no argument 'num_class': did you mean 'num_classes'"):
    t2t_vit_jax.create_model('t2t_vit_14', num_class=3)
