"""Evaluates weights on ImageNet, its relatives and others: t2t-vit evaluate WEIGHTS ... --sets=val,real,a

docs/evaluate.md describes the sets and what it prints.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import json
from pathlib import Path
import sys
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from t2t_vit_jax import processes
from t2t_vit_jax.command_line import Parser, add_process_flags, positive, print_error, run_tool, whole_number
from t2t_vit_jax.console import note, say, warn
from t2t_vit_jax.conversion import files, parse_image_size, pretrained
from t2t_vit_jax.data.decoding import ORIENTATIONS, BadImage
from t2t_vit_jax.data.sources import Source
from t2t_vit_jax.errors import UserError, require
from t2t_vit_jax.evaluate.accuracy import Candidate, Options, Pair, Row, Runner, fit, open_candidate
from t2t_vit_jax.evaluate.probe import Prober
from t2t_vit_jax.evaluate.probe import render as render_probe
from t2t_vit_jax.evaluate.report import ENDINGS as PAGES
from t2t_vit_jax.evaluate.report import Section, write_report
from t2t_vit_jax.evaluate.results import Results, render
from t2t_vit_jax.evaluate.sets import (
  NAMES,
  ImageSet,
  expand,
  open_folder_set,
  open_folder_splits,
  open_set,
  open_splits,
)
from t2t_vit_jax.evaluate.tables import ENDINGS
from t2t_vit_jax.predict import explaining_memory
from t2t_vit_jax.recipe.build import DTYPES
from t2t_vit_jax.recipe.sharding import make_mesh

T = TypeVar('T')
TIMEOUT_S = 300  # for processes that meet


def open_sets(arguments: argparse.Namespace) -> list[ImageSet]:
  """The sets that the command line names.

  Raises:
    UserError: there are none, or the images of some are missing.
  """
  sets, problems = [], []
  for name in expand(arguments.sets):
    try:
      sets.append(open_set(name, arguments.data_dir, arguments.orientation))
    except UserError as error:
      problems.append((name, error))
  if problems:
    others = list(dict.fromkeys(name.partition('/')[0] for name, _ in problems))[1:]
    raise UserError(f'{problems[0][1]}' + (f' (nor can be opened: {", ".join(others)})' if others else ''))
  sets += [open_folder_set(folder, arguments.orientation) for folder in dict.fromkeys(arguments.folder)]
  if not sets:
    raise UserError(f'which images? Give --sets={",".join(NAMES)}, some of these or a dataset of tfds, or --folder=DIR')
  return sets


def open_candidates(names: Sequence[str], options: Options) -> list[Candidate]:
  """Reads all weights."""
  return [open_candidate(name, options.image_size) for name in dict.fromkeys(names)]


def pair_up(names: Sequence[str], sets: Sequence[ImageSet], options: Options) -> list[Pair]:
  """All weights with all sets, checked before anything is computed.

  Raises:
    UserError: weights can't be read, or don't fit a set.
  """
  candidates = open_candidates(names, options)
  return [fit(candidate, image_set, options) for candidate in candidates for image_set in sets]


def evaluate(pairs: Sequence[Pair], known: Sequence[Row | None], options: Options, results: Results) -> list[Row]:
  """A row for each pair.

  Args:
    pairs: of weights and sets, those of the same weights one after the other.
    known: rows that are there already, None for pairs that are to be evaluated; the same in all processes.
    options: of all.
    results: where rows are kept as they come.

  Raises:
    UserError: one cannot be evaluated; what is done so far is kept.
  """
  mesh = _mesh()
  rows: list[Row] = []
  runner: tuple[Candidate, Runner] | None = None
  for pair, row in zip(pairs, known, strict=True):
    if row is None:
      if runner is None or runner[0] is not pair.candidate:
        runner = pair.candidate, Runner(pair.candidate, options, mesh)
      title = f'{pair.candidate.name} {pair.image_set.name}'
      with explaining_memory(options.batch_size), show_bar(title, len(pair.source)) as progress:
        row = runner[1](pair, warn, progress)
      in_first_process(functools.partial(results.add, row))
      if jax.process_index() == 0:
        note(f'{row["weights"]} on {row["set"]}: top-1 {100 * row["top1"]:.2f} %, top-5 {100 * row["top5"]:.2f} %')
    rows.append({**row, 'weights': pair.candidate.name})
  return rows


def in_first_process(action: Callable[[], T]) -> T | None:
  """Result of `action` in the first process, None in the others; if it raises a UserError, all do."""
  return processes.in_all_processes(lambda: None if jax.process_index() else action())


@contextlib.contextmanager
def show_bar(title: str, num_images: int) -> Iterator[Callable[[int], object]]:
  """A bar on a terminal; in the context is the function that moves it."""
  hidden = jax.process_index() > 0 or not sys.stderr.isatty()
  with tqdm(desc=title, total=num_images, unit='image', disable=hidden, dynamic_ncols=True) as bar:
    yield bar.update


def probe(arguments: argparse.Namespace, options: Options) -> list[Row]:
  """Results of all methods that probe features, for all weights on all datasets.

  Raises:
    UserError: weights can't be read, or a dataset lacks images for training.
  """

  def prepare() -> tuple[list[Candidate], list[tuple[Source, ImageSet]]]:
    splits = [open_splits(name, arguments.data_dir, arguments.orientation) for name in expand(arguments.sets)]
    splits += [open_folder_splits(folder, arguments.orientation) for folder in arguments.folder]
    if not splits:
      raise UserError('which images? Give --sets=val or datasets of tfds, or --folder=DIR with train and validation')
    return open_candidates(arguments.weights, options), splits

  candidates, splits = processes.in_all_processes(prepare)
  images = [[*_signs(train), *_signs(test.source)] for train, test in splits]
  _check_same([*(candidate.sha256 for candidate in candidates), *images])
  mesh = _mesh()
  return [
    row
    for candidate in candidates
    for train, test in splits
    for row in Prober(candidate, options, mesh, show_bar)(train, test)
  ]


def _signs(source: Source) -> list[Any]:
  """Facts that a split has in every process, though files may be copies with other paths and times."""
  count = len(source)
  return [count, source.class_names, [_id(source, index) for index in range(0, count, max(1, count // 8))]]


def _id(source: Source, index: int) -> Any:
  try:
    return source[index][1:]
  except BadImage:
    return None


def _check_same(things: Any) -> None:
  """Raises UserError unless all processes have the same weights and images."""
  if len(set(processes.gather_texts(json.dumps(things, default=str)))) > 1:
    raise UserError('the processes do not have the same weights and images: give all of them the same')


def _mesh() -> Mesh:
  return make_mesh(ConfigDict({'data': -1, 'fsdp': 1}))


def sections(pairs: Sequence[Pair], rows: Sequence[Row]) -> list[Section]:
  """Sections of the report, one for each pair."""
  return [
    Section(
      weights=row['weights'],
      dataset=f'{row["set"]} ({row["version"]})',
      facts={
        'top-1': f'{100 * row["top1"]:.2f} %',
        'top-5': f'{100 * row["top5"]:.2f} %',
        'images': f'{row["count"]:,}',
        'scored classes': f'{row["scored_classes"]:,}',
      },
      class_names=pair.candidate.class_names,
      summary=row['reliability'],
      picture=pair.picture,
    )
    for pair, row in zip(pairs, rows, strict=True)
  ]


def run(arguments: argparse.Namespace) -> int:
  """Does what the command line asks for; returns the exit code."""
  processes.start(arguments.coordinator, arguments.num_processes, arguments.process_id, TIMEOUT_S)
  form = arguments.form or ENDINGS.get(arguments.output.suffix.lower() if arguments.output else '', 'text')
  options = Options(
    image_size=None if arguments.image_size is None else parse_image_size(arguments.image_size),
    dtype=arguments.dtype,
    batch_size=arguments.batch_size,
    all_classes=arguments.all_classes,
    allow_missing_classes=arguments.allow_missing_classes,
    num_workers=arguments.num_workers,
  )
  with ending_together():
    own = {'process_id', 'weights', 'folder', 'data_dir'}  # paths may differ: what they lead to is compared later
    processes.check_agreement(ConfigDict({name: str(x) for name, x in vars(arguments).items() if name not in own}))
    in_first_process(lambda: _check_outputs(arguments))
    text = (
      render_probe(probe(arguments, options), form) if arguments.probe else render(accuracies(arguments, options), form)
    )
    if jax.process_index() == 0:
      _write(text, arguments.output)
  return 0


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends this one of several processes after an error in a way that the others end too."""
  try:
    yield
  except Exception as error:
    lost = processes.lost_process(error, 'The same command goes on with what is not evaluated yet')
    if jax.process_count() == 1 or not (lost or isinstance(error, UserError)):
      raise
    print_error(lost or error)
    processes.leave(2, lost=lost is not None)


def accuracies(arguments: argparse.Namespace, options: Options) -> list[Row]:
  """A row for all weights on all sets, evaluated or taken from the results; draws the report."""
  pairs = processes.in_all_processes(lambda: pair_up(arguments.weights, open_sets(arguments), options))
  _check_same([[pair.candidate.sha256, pair.classes, *_signs(pair.source)] for pair in pairs])
  for line in dict.fromkeys(line for pair in pairs for line in pair.source.notes) if jax.process_index() == 0 else ():
    warn(line)
  results = Results(arguments.results)
  known = in_first_process(lambda: [None if arguments.force else results.find(pair.identity) for pair in pairs])
  known = json.loads(processes.gather_texts(json.dumps(known))[0])  # all go by what the first one finds
  if jax.process_index() == 0:
    _say_what_is_known(known, arguments.results)
  rows = evaluate(pairs, known, options, results)
  if jax.process_index() == 0 and arguments.report:
    write_report(arguments.report, sections(pairs, rows), 'Evaluation')
    note(f'wrote {arguments.report}')
  return rows


def _check_outputs(arguments: argparse.Namespace) -> None:
  """Raises UserError if a file cannot be written, or has an unknown ending: before the work, not after it."""
  if arguments.probe:
    require('--probe', 'sklearn')
  if arguments.report:
    require('--report', 'matplotlib')
  outputs = list(filter(None, (arguments.output, arguments.report)))
  for path in outputs:
    files.check_output(path, force=arguments.force)
  if len({path.resolve() for path in (*outputs, arguments.results)}) <= len(outputs):
    raise UserError('--output, --report and --results must be different files')
  if arguments.output and arguments.output.suffix.lower() not in ('', '.txt', *ENDINGS):
    raise UserError(f'--output {arguments.output}: the name must end with .txt, {", ".join(ENDINGS)}')
  for flag in ('report', 'all_classes'):
    if arguments.probe and getattr(arguments, flag):
      raise UserError(f'--{flag} is about the accuracy of classifiers: leave out --probe')
  files.check_output(arguments.results, force=True)
  is_new = not arguments.results.exists()
  try:
    arguments.results.open('ab').close()
    if is_new:
      arguments.results.unlink()
  except OSError as error:
    raise UserError(f'{arguments.results} cannot be written: {error.strerror}') from error
  if arguments.report and arguments.report.suffix not in PAGES:
    raise UserError(f'--report {arguments.report}: the name must end with {" or ".join(PAGES)}')


def _say_what_is_known(known: Sequence[Row | None], file: Path) -> None:
  if count := sum(row is not None for row in known):
    note(f'{count} of {len(known)} results are those of {file}; --force evaluates again')
  elif len(known) > 1:
    note(f'results are kept in {file} as they come: after a stop, the same command goes on')


def _write(text: str, output: Path | None) -> None:
  if output is None:
    sys.stdout.write(text)
    return
  files.write_file(output, lambda temporary: temporary.write_text(text, 'utf-8', 'backslashreplace', ''))
  say(f'wrote {output}')


def not_negative(text: str) -> int:
  """Type of a flag: a whole number from 0 on."""
  return whole_number(text, least=0)


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = Parser(
    'evaluate',
    example='t2t-vit evaluate t2t_vit_14 t2t_vit_t_14 --sets=val,real --data_dir=DATA',
    description='Evaluates weights on sets of labelled images, and prints one table.',
    epilog='Exit code: 0; 2 if it failed. Results that were found before are kept.',
  )
  parser.add_argument('weights', metavar='WEIGHTS', nargs='+', help=pretrained.HELP)
  parser.add_argument(
    '--sets',
    metavar='NAME,...',
    action='append',
    default=[],
    help=f'names of sets: {", ".join(NAMES)}, or NAME[:SPLIT] of tfds',
  )
  parser.add_argument(
    '--folder',
    metavar='DIR',
    action='append',
    default=[],
    help='folder of images, DIR/CLASS/IMAGE, with classes of the weights',
  )
  parser.add_argument(
    '--data_dir', metavar='DATA', help='folder of prepared datasets and unpacked archives (default: that of tfds)'
  )
  parser.add_argument(
    '--results',
    metavar='FILE',
    type=Path,
    default=Path('evaluation.jsonl'),
    help='file that keeps results (default: %(default)s)',
  )
  parser.add_argument(
    '--force', action='store_true', help='evaluate again what is in the results, and overwrite outputs'
  )
  chosen = parser.add_mutually_exclusive_group()
  for form, name in {'json': 'JSON', 'csv': 'CSV', 'markdown': 'Markdown'}.items():
    chosen.add_argument(f'--{form}', dest='form', action='store_const', const=form, help=f'print {name}')
  parser.add_argument(
    '--output', metavar='FILE', type=Path, help='write the table to a file; .json, .csv and .md set its form too'
  )
  parser.add_argument('--probe', action='store_true', help='classify by the features, which takes training images too')
  parser.add_argument(
    '--report', metavar='FILE', type=Path, help='draw how reliable the models are: an .html or .png file'
  )
  parser.add_argument(
    '--batch_size',
    metavar='N',
    type=positive,
    default=256,
    help='number of images computed at a time (default: %(default)s)',
  )
  parser.add_argument(
    '--image_size', metavar='SIZE', help="image size in px, SIDE or HEIGHTxWIDTH (default: the weights')"
  )
  parser.add_argument(
    '--dtype', choices=DTYPES, default='float32', help='precision of the computation (default: %(default)s)'
  )
  parser.add_argument(
    '--orientation',
    choices=ORIENTATIONS,
    help="treatment of EXIF's orientation (default: ignored; for --folder: as the weights say)",
  )
  parser.add_argument(
    '--all_classes', action='store_true', help='on sets of fewer classes: choose among all of the weights'
  )
  parser.add_argument('--allow_missing_classes', action='store_true', help='take sets that lack some of the classes')
  parser.add_argument(
    '--num_workers',
    metavar='N',
    type=not_negative,
    help='number of processes that read images (default: as many as processors)',
  )
  add_process_flags(parser)
  return run_tool(lambda: run(parser.parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main())
