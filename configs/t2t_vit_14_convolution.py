"""T2T-ViT-14 with convolutions as tokens-to-token module (an ablation) on ImageNet-1k, from scratch.

python train.py --config=configs/t2t_vit_14_convolution.py --config.data.data_dir=DATA

Hardware: 8 devices with 64 images each; on one add --config.optimizer.accumulate_steps=8.
Batch, learning rate and weight decay are not published: t2t_vit_14's are assumed.
Published top-1: 80.8 % (paper). Measured here: nothing.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.model.tokens_type = 'convolution'
  return config
