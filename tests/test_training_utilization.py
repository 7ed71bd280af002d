"""The share of the devices' peak, from the paper's count of operations and a peak that is put in."""

import json

import jax
import pytest

from configs import default
from t2t_vit_jax.recipe.build import build_mesh, build_recipe
from t2t_vit_jax.recipe.init_from import resolve
from t2t_vit_jax.recipe.run import build_run
from t2t_vit_jax.training import loop, utilization
from tests.test_training_loop import small_config


def recipe_of(**changes):
  config = default.get_config()
  config.update_from_flattened_dict({'model.name': 't2t_vit_7', 'data.batch_size': 64, **changes})
  config = resolve(config)
  return build_recipe(config, build_mesh(config), num_classes=1000, num_train_images=1000)


@pytest.mark.slow
def test_a_step_costs_three_times_the_published_count_whatever_is_computed_again():
  """The reference's page gives T2T-ViT-7 1.1 G multiplications with additions, and its formula leaves out some."""
  flops = utilization.model_flops(recipe_of())
  assert flops == pytest.approx(64 * 3 * 2 * 1.1e9, rel=0.1)
  again = {'model.remat': 'nothing_saveable', 'optimizer.accumulate_steps': 2, 'augment.mixing_group_size': 16}
  assert utilization.model_flops(recipe_of(**again)) == pytest.approx(flops, rel=1e-4)


def test_the_share_of_a_known_peak_is_shown_and_logged(data_dir, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(utilization, 'peak_flops', {jax.devices()[0].device_kind: 1e10}.get)
  config = small_config(data_dir, **{'schedule.max_steps': 3})
  loop.train(config, tmp_path)
  row = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[0])
  flops = utilization.model_flops(build_run(config).recipe) / 64  # an image
  assert row['mfu'] == pytest.approx(row['images_per_second'] * flops / (2 * 1e10), abs=1e-4)  # two devices
  assert f' MFU {row["mfu"]:.0%}' in capsys.readouterr().out


def test_nothing_is_shown_where_the_peak_is_unknown(data_dir):
  assert utilization.peak_images_per_second(build_run(small_config(data_dir)).recipe) is None
