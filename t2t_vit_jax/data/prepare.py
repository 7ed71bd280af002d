"""Prepares a tfds dataset as the array_record files that training reads.

python -m t2t_vit_jax.data.prepare imagenet2012 --manual-dir TARS --data-dir ~/tensorflow_datasets

Most builders, imagenet2012's too, need TensorFlow for this: pip install 't2t-vit-jax[prepare]'.
"""

import argparse
import os
from pathlib import Path
import sys

import tensorflow_datasets as tfds

from t2t_vit_jax.data.sources import open_builder
from t2t_vit_jax.errors import UserError

# What ImageNet's registration page offers for download; the test tar has no labels and is not needed.
IMAGENET_TARS = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')


def prepare(name: str, data_dir: str | None = None, manual_dir: str | None = None) -> tfds.core.DatasetInfo:
  """Runs the tfds builder of `name` and returns what it wrote; files that exist already are kept.

  Args:
    name: tfds name, such as 'imagenet2012' or 'cifar10'.
    data_dir: folder to write to; None for tfds's default.
    manual_dir: folder of files that must be fetched by hand, such as ImageNet's tars.

  Raises:
    UserError: unknown dataset, tars missing, or TensorFlow not installed.
  """
  builder = open_builder(name, data_dir, file_format='array_record')
  if builder.name == 'imagenet2012':
    folder = Path(manual_dir).expanduser() if manual_dir else None
    missing = [tar for tar in IMAGENET_TARS if folder is None or not (folder / tar).is_file()]
    if missing and not builder.info.splits:
      raise UserError(
        f'{" and ".join(missing)} not found in {folder or "--manual-dir (not given)"}: '
        'register at https://image-net.org/download-images and put the tars there'
      )
  manual_dir = os.path.expanduser(manual_dir) if manual_dir else None
  try:
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
  except OSError as error:
    raise UserError(f'cannot prepare {name} in {builder.data_path}: {error.strerror or error}') from error
  except ImportError as error:
    raise UserError(f"preparing {name} needs TensorFlow: pip install 't2t-vit-jax[prepare]' ({error})") from error
  return builder.info


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = argparse.ArgumentParser(prog='python -m t2t_vit_jax.data.prepare', description=__doc__.split('\n\n')[0])
  parser.add_argument('dataset', help='tfds name, such as imagenet2012')
  parser.add_argument('--data-dir', help='folder to write to (default: TFDS_DATA_DIR or ~/tensorflow_datasets)')
  parser.add_argument('--manual-dir', help='folder of files fetched by hand, such as the ImageNet tars')
  arguments = parser.parse_args(argv)
  try:
    info = prepare(arguments.dataset, arguments.data_dir, arguments.manual_dir)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  counts = ', '.join(f'{split} {details.num_examples:,}' for split, details in info.splits.items())
  print(f'{info.full_name} is ready in {info.data_dir}: {counts} images')
  return 0


if __name__ == '__main__':
  sys.exit(main())
