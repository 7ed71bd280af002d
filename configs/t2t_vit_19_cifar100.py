"""T2T-ViT-19, trained on ImageNet, transferred to CIFAR-100.

python train.py --config=configs/t2t_vit_19_cifar100.py --config.data.data_dir=DATA

Starts from the published ImageNet weights, which are fetched once.
The data, once: t2t-vit prepare cifar100 --data-dir DATA

Hardware: 2 devices, as published, or any number that divides 64; see t2t_vit_14_cifar10 for the differences.
Published top-1: 89.0 % (reference, the best of its epochs on the test images). Measured here: nothing.
"""

from ml_collections import ConfigDict

from configs import t2t_vit_19_cifar10


def get_config() -> ConfigDict:
  config = t2t_vit_19_cifar10.get_config()
  config.data.name = 'cifar100'
  return config
