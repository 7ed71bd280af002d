"""T2T-ViT wide and shallow (the ablation after wide ResNets) on ImageNet-1k, from scratch.

python train.py --config=configs/t2t_vit_14_wide.py --config.data.data_dir=DATA

Hardware: 8 devices with 64 images each; on one add --config.optimizer.accumulate_steps=8.
Batch, learning rate and weight decay are not published: t2t_vit_14's are assumed.
Published top-1: 77.9 % (paper). Measured here: nothing.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.model.name = 't2t_vit_14_wide'
  return config
