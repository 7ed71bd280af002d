"""Table of the published weight files: what each holds, where it is, and the accuracy that was measured with it."""

import dataclasses
from typing import Any

from t2t_vit_jax.errors import readable_size


@dataclasses.dataclass(frozen=True)
class Published:
  """A file of trained weights that anybody can fetch."""

  url: str
  model: str  # the named model
  top1: float  # per cent of the evaluation images, as its publisher reports
  parameters: int  # numbers in its weights, with the position table and the random projections
  data: str = 'ImageNet-1k'
  num_classes: int = 1000
  image_size: int = 224  # px
  size: int | None = None  # bytes; None if it is not known
  sha256: str = ''  # first hexadecimal digits, where the file's name tells them
  # Top-1 and top-5 in per cent of the 50,000 validation images, measured with the published files by another group:
  # https://github.com/huggingface/pytorch-image-models/pull/2426.
  measured: tuple[float, float] | None = None

  @property
  def file(self) -> str:
    """Name of the file."""
    return self.url.rpartition('/')[2]

  @property
  def publisher(self) -> str:
    """Who trained the weights."""
    return 'mmpretrain' if self.url.startswith(_MMPRETRAIN) else 'reference'

  @property
  def download_size(self) -> str:
    """Size of the file, to be shown; most publishers do not tell it, but float32 numbers take 4 bytes."""
    return f'about {readable_size(4 * self.parameters)}' if self.size is None else readable_size(self.size)


_REFERENCE = 'https://github.com/yitu-opensource/T2T-ViT/releases/download/main/'
_MMPRETRAIN = 'https://download.openmmlab.com/mmclassification/v0/t2t-vit/'
_TOKEN_LABELING = 'ImageNet-1k, token labeling'


def _reference(file: str, *facts: Any, **more: Any) -> Published:
  return Published(_REFERENCE + file, *facts, **more)


def _mmpretrain(file: str, model: str, top1: float, parameters: int) -> Published:
  digits = file.rpartition('-')[2].removesuffix('.pth')
  return Published(_MMPRETRAIN + file, model, top1, parameters, sha256=digits)


def _cifar(file: str, model: str, top1: float, parameters: int, num_classes: int) -> Published:
  return _reference(file, model, top1, parameters, data=f'CIFAR-{num_classes}', num_classes=num_classes)


PUBLISHED: dict[str, Published] = {
  't2t_vit_7': _reference('71.7_T2T_ViT_7.pth.tar', 't2t_vit_7', 71.7, 4_310_222, measured=(71.676, 90.886)),
  't2t_vit_10': _reference('75.2_T2T_ViT_10.pth.tar', 't2t_vit_10', 75.2, 5_889_230, measured=(75.150, 92.806)),
  't2t_vit_12': _reference('76.5_T2T_ViT_12.pth.tar', 't2t_vit_12', 76.5, 6_941_902, measured=(76.480, 93.484)),
  't2t_vit_14': _reference(
    '81.5_T2T_ViT_14.pth.tar', 't2t_vit_14', 81.5, 21_545_550, size=86_212_823, measured=(81.500, 95.666)
  ),
  't2t_vit_19': _reference('81.9_T2T_ViT_19.pth.tar', 't2t_vit_19', 81.9, 39_177_422, measured=(81.932, 95.744)),
  't2t_vit_24': _reference('82.3_T2T_ViT_24.pth.tar', 't2t_vit_24', 82.3, 64_105_934, measured=(82.276, 95.886)),
  't2t_vit_t_14': _reference('81.7_T2T_ViTt_14.pth.tar', 't2t_vit_t_14', 81.7, 21_541_070, measured=(81.688, 95.852)),
  't2t_vit_t_19': _reference('82.4_T2T_ViTt_19.pth.tar', 't2t_vit_t_19', 82.4, 39_172_942, measured=(82.442, 96.082)),
  't2t_vit_t_24': _reference('82.6_T2T_ViTt_24.pth.tar', 't2t_vit_t_24', 82.6, 64_101_454, measured=(82.554, 96.064)),
  't2t_vit_14_384': _reference('83.3_T2T_ViT_14.pth.tar', 't2t_vit_14', 83.3, 21_691_470, image_size=384),
  't2t_vit_24_token_labeling': _reference(
    '84.2_T2T_ViT_24.pth.tar', 't2t_vit_24', 84.2, 64_618_934, data=_TOKEN_LABELING
  ),
  't2t_vit_t_14_mmpretrain': _mmpretrain(
    't2t-vit-t-14_8xb64_in1k_20211220-f7378dd5.pth', 't2t_vit_t_14', 81.83, 21_541_070
  ),
  't2t_vit_t_19_mmpretrain': _mmpretrain(
    't2t-vit-t-19_8xb64_in1k_20211214-7f5e3aaf.pth', 't2t_vit_t_19', 82.63, 39_172_942
  ),
  't2t_vit_t_24_mmpretrain': _mmpretrain(
    't2t-vit-t-24_8xb64_in1k_20211214-b2a68ae3.pth', 't2t_vit_t_24', 82.71, 64_101_454
  ),
  't2t_vit_14_cifar10': _cifar('cifar10_t2t-vit_14_98.3.pth', 't2t_vit_14', 98.3, 21_164_400, 10),
  't2t_vit_14_cifar100': _cifar('cirfar100_t2t-vit-14_88.4.pth', 't2t_vit_14', 88.4, 21_199_050, 100),  # spelt so
  't2t_vit_19_cifar10': _cifar('cifar10_t2t-vit_19_98.4.pth', 't2t_vit_19', 98.4, 38_732_912, 10),
  't2t_vit_19_cifar100': _cifar('cifar100_t2t-vit-19_89.0.pth', 't2t_vit_19', 89.0, 38_773_322, 100),
}
