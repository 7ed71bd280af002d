"""Model FLOPs utilization (MFU): the share of the devices' published peak that the model's own products take.

As in the PaLM paper (arXiv 2204.02311, appendix B), work that is only done again to save memory does not count.
"""

from ml_collections import ConfigDict

from t2t_vit_jax.planning.flops import count_flops
from t2t_vit_jax.planning.peaks import peak_flops
from t2t_vit_jax.recipe.build import Recipe, build_recipe


def peak_images_per_second(recipe: Recipe) -> float | None:
  """Images a second that the devices would train on at their bfloat16 peak; None if that is not known here.

  Counting takes some seconds, in which the training step is traced.
  """
  peak = peak_flops(recipe.mesh.devices.flat[0].device_kind)
  return None if peak is None else peak * recipe.mesh.size * recipe.order.batch_size / model_flops(recipe)


def model_flops(recipe: Recipe) -> int:
  """Operations of the products of a training step, for the whole batch, in any form of the model the same."""
  model = recipe.model.clone(remat='none', soft_split_form='conv', attention_form='xla', token_attention_form='full')
  plain = build_recipe(
    ConfigDict(recipe.config),
    recipe.mesh,
    num_classes=model.num_classes,
    num_train_images=recipe.order.num_records,
    model=model,
  )
  return count_flops(plain.train_step, *plain.abstract_train_arguments)
