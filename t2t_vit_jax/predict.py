"""Classifies images: t2t-vit predict WEIGHTS IMAGE_OR_FOLDER ...

docs/predict.md describes what it prints.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import json
import os
from pathlib import Path
import sys
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from tqdm import tqdm

from t2t_vit_jax.command_line import Parser, positive, run_tool
from t2t_vit_jax.console import warn
from t2t_vit_jax.conversion import files, parse_image_size, pretrained
from t2t_vit_jax.conversion.weight_format import ImageSize
from t2t_vit_jax.data import faults, sources
from t2t_vit_jax.data.class_names import readable_names
from t2t_vit_jax.data.decoding import ORIENTATIONS, Remark
from t2t_vit_jax.data.loader import Share, Workers, eval_batches
from t2t_vit_jax.data.transforms import EvalTransform, ResizeCenterCrop
from t2t_vit_jax.errors import UserError, csv_line, plural, printable
from t2t_vit_jax.models.preprocessing import Normalization
from t2t_vit_jax.models.t2t_vit import T2TViT

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A model with the image preparation and the class names of its weight file."""

  model: T2TViT
  variables: dict[str, Any]
  prepare: EvalTransform  # a decoded image -> one of the model's size
  normalize: Normalization  # uint8 images (B, height, width, C) -> the model's input
  class_names: tuple[str, ...]  # for people to read
  upright: bool  # whether images are turned as their EXIF data says
  chosen: Remark = Remark.NONE  # what the user asked for, so that no warning is due


class Guess(NamedTuple):
  """One of the classes that an image may belong to."""

  label: int
  name: str
  probability: float


class Prediction(NamedTuple):
  """Result for one image: guesses, the likeliest first, or why it cannot be read."""

  image: str
  guesses: tuple[Guess, ...]
  error: str | None = None


def open_classifier(
  source: str | os.PathLike[str], image_size: ImageSize | None = None, orientation: str | None = None
) -> Classifier:
  """Opens weights, whose header says how images are prepared.

  Args:
    source: a weight file, a run's folder or a name; see `find_weights`.
    image_size: px; None for the image size of the weights.
    orientation: 'upright' or 'ignored'; None for the weights' own, which is 'upright' if their header does not say it.

  Raises:
    UserError: the weights can't be read, or are of no model that classifies pictures.
  """
  loaded, _ = pretrained.load_classifier(source, image_size)
  data = loaded.data
  crop = ResizeCenterCrop(loaded.arguments['image_size'], data['crop_fraction'], data['interpolation'], loaded.channels)
  own = data.get('orientation', 'upright')
  if orientation and orientation != own:
    warn(f'EXIF orientation: {orientation}, but the weights were trained and evaluated with {own}')
  model, variables = loaded.build()
  return Classifier(
    model=model,
    variables=variables,
    prepare=crop,
    normalize=Normalization(data['mean'], data['std']),
    class_names=readable_names(loaded.class_names, loaded.arguments['num_classes']),
    upright=ORIENTATIONS[orientation or own],
    chosen=faults.CHOSEN if orientation else Remark.NONE,
  )


def predict(
  classifier: Classifier, images: Sequence[str], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
  """Classifies image files one after the other; threads read the next files while the device computes.

  >>> for prediction in predict(open_classifier('t2t_vit_14'), find_images(['photos'])): ...

  Args:
    classifier: from `open_classifier`.
    images: paths of files, for example from `sources.find_images`.
    top: number of guesses; fewer if there are fewer classes.
    batch_size: images that are computed at a time.

  Raises:
    UserError: a batch does not fit into memory.
  """
  source, remarks = sources.open_images(images, upright=classifier.upright), faults.Remarks(classifier.chosen)
  top = min(top, len(classifier.class_names))
  # Every batch has the same size, the last one filled up: the program is compiled once.
  share = Share(min(batch_size, len(images)))
  workers = Workers(num_threads=os.cpu_count() or 1)
  for batch in eval_batches(source, classifier.prepare, share, workers):
    remarks.note(source, batch, warn)
    with explaining_memory(share.batch_size):
      outputs = _classify(classifier.model, classifier.normalize, top, classifier.variables, batch['image'])
      probabilities, labels = jax.device_get(outputs)
    if not np.isfinite(probabilities).all():
      raise UserError('the weights give no finite probabilities: they are damaged, or not those of a trained model')
    for row in range(int(batch['mask'].sum())):
      index = int(batch['index'][row])
      if batch['bad'][row]:
        yield Prediction(images[index], (), faults.explain(source, index)[1])
        continue
      guesses = zip(labels[row].tolist(), probabilities[row].tolist(), strict=True)
      named = (Guess(label, classifier.class_names[label], probability) for label, probability in guesses)
      yield Prediction(images[index], tuple(named))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _classify(
  model: T2TViT, normalize: Normalization, top: int, variables: dict[str, Any], images: Array
) -> tuple[Array, Array]:
  """Probabilities and labels of the likeliest classes, each (B, top), of uint8 images."""
  logits = cast(Array, model.apply(variables, normalize(images)))
  probabilities, labels = jax.lax.top_k(jax.nn.softmax(logits), top)
  return probabilities, labels


@contextlib.contextmanager
def explaining_memory(batch_size: int) -> Iterator[None]:
  """Turns JAX's error about memory into a UserError that names the flag of this and other tools."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    if not (isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error)):
      raise
    raise UserError(f'a batch of {batch_size} images does not fit into memory: set a smaller --batch_size') from error


def _as_text(predictions: Iterable[Prediction]) -> Iterator[str]:
  """Each image's path, and its guesses below; unreadable images are left out."""
  for image, guesses, error in predictions:
    if not error:
      lines = (f'{100 * guess.probability:7.2f} %  {printable(guess.name)}' for guess in guesses)
      yield '\n'.join([printable(image), *lines, ''])


def _as_json(predictions: Iterable[Prediction]) -> Iterator[str]:
  """One list, with an image on each line: {"image", "predictions": [{"label", "name", "probability"}], "error"}."""
  separator = '[\n'
  for image, guesses, error in predictions:
    entry = {'image': image, 'predictions': [guess._asdict() for guess in guesses], 'error': error}
    yield separator + json.dumps(entry)
    separator = ',\n'
  yield '\n]\n'


def _as_csv(predictions: Iterable[Prediction]) -> Iterator[str]:
  """One line for each guess; an unreadable image has one that gives the reason."""
  yield csv_line('image', 'rank', *Guess._fields, 'error')
  for image, guesses, error in predictions:
    for rank, guess in enumerate(guesses, start=1):
      yield csv_line(image, rank, *guess, '')
    if error:
      yield csv_line(image, '', '', '', '', error)


FORMS: dict[str, Callable[[Iterable[Prediction]], Iterator[str]]] = {'text': _as_text, 'json': _as_json, 'csv': _as_csv}


def _counted(predictions: Iterable[Prediction], unreadable: list[str], num_images: int) -> Iterator[Prediction]:
  """Passes predictions on, shows progress, and names and collects the images that cannot be read."""
  with tqdm(total=num_images, unit='image', disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
    for prediction in predictions:
      if prediction.error:
        unreadable.append(prediction.image)
        warn(f'{prediction.image} cannot be read ({prediction.error})')
      yield prediction
      bar.update()


def _unless_none(text: Iterable[str], unreadable: Sequence[str], num_images: int) -> Iterator[str]:
  """Passes text on; at its end, raises UserError if `unreadable` has become all of the images."""
  yield from text
  if len(unreadable) == num_images:
    raise UserError('no image can be read')


def _write(text: Iterable[str], output: Path | None) -> None:
  """Writes to a file, which appears when it is complete, or to standard output as it comes."""
  if output is None:
    for part in text:
      tqdm.write(part, file=sys.stdout, end='')
    return

  def write(temporary: Path) -> None:
    with temporary.open('w', encoding='utf-8', errors='backslashreplace', newline='') as file:
      file.writelines(text)

  files.write_file(output, write)


def run(arguments: argparse.Namespace) -> int:
  """Does what the command line asks for; returns the exit code."""
  ending = arguments.output.suffix[1:].lower() if arguments.output else ''
  form = arguments.form or {'': 'text', 'txt': 'text'}.get(ending, ending)
  if form not in FORMS:
    raise UserError(f'--output {arguments.output}: the name must end with .txt, .json or .csv')
  if arguments.output:
    files.check_output(arguments.output, force=arguments.force)
  images = sources.find_images(arguments.images, warn)
  size = None if arguments.image_size is None else parse_image_size(arguments.image_size)
  classifier = open_classifier(arguments.weights, size, arguments.orientation)
  unreadable: list[str] = []
  predictions = predict(classifier, images, top=arguments.top, batch_size=arguments.batch_size)
  text = FORMS[form](_counted(predictions, unreadable, len(images)))
  _write(_unless_none(text, unreadable, len(images)), arguments.output)
  if arguments.output:
    print(f'wrote {arguments.output}: predictions for {plural(len(images) - len(unreadable), "image")}')
  if unreadable:
    warn(f'{len(unreadable):,} of {len(images):,} images cannot be read; the others were classified')
  return 1 if unreadable else 0


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = Parser(
    'predict',
    example='t2t-vit predict t2t_vit_14 photos cat.jpg',
    description='Classifies images.',
    epilog='Exit code: 0; 1 if some images cannot be read and the others were classified; 2 if it failed.',
  )
  parser.add_argument('weights', metavar='WEIGHTS', help=pretrained.HELP)
  parser.add_argument(
    'images', metavar='IMAGE_OR_FOLDER', nargs='+', help='image files, or folders to search recursively'
  )
  forms = parser.add_mutually_exclusive_group()
  for form in ('json', 'csv'):
    forms.add_argument(f'--{form}', dest='form', action='store_const', const=form, help=f'print {form.upper()}')
  parser.add_argument('--output', metavar='FILE', type=Path, help='file to write to; .json and .csv set its form too')
  parser.add_argument(
    '--top', metavar='N', type=positive, default=5, help='number of classes to name (default: %(default)s)'
  )
  parser.add_argument(
    '--batch_size',
    metavar='N',
    type=positive,
    default=32,
    help='number of images computed at a time (default: %(default)s)',
  )
  parser.add_argument(
    '--image_size', metavar='SIZE', help="image size in px, SIDE or HEIGHTxWIDTH (default: the weights')"
  )
  parser.add_argument(
    '--orientation', choices=ORIENTATIONS, help="treatment of EXIF's orientation (default: as the weights say)"
  )
  parser.add_argument('--force', action='store_true', help='overwrite the output')
  return run_tool(lambda: run(parser.parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main())
