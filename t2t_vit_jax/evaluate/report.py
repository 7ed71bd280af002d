"""A page about what models get wrong and how far they can be trusted: an HTML file with pictures, or one picture.

The HTML file needs nothing beside it: its style, diagrams and pictures are inside, and it has no script.
"""

import base64
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import html
from importlib import resources
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any
import warnings

import numpy as np
from PIL import Image

from t2t_vit_jax.conversion.files import problem, write_file
from t2t_vit_jax.errors import printable
from t2t_vit_jax.evaluate import diagrams

if TYPE_CHECKING:
  from matplotlib.figure import Figure

ENDINGS = ('.html', '.png')
MAX_SECTIONS = {'.html': 20, '.png': 10}  # that are shown: one of HTML takes about half a megabyte
MAX_BARS = 10  # pairs of classes in a PNG file
THUMBNAIL = 112  # px, the longer side
JPEG_QUALITY = 80
MAX_NAME = 200  # characters of a class's name


@dataclasses.dataclass(frozen=True)
class Section:
  """One model on one set.

  Attributes:
    weights: their name or path.
    dataset: the set's name.
    facts: figures by name, such as top-1, that are shown as they are.
    class_names: for people to read, by label.
    summary: of `reliability.summary`.
    picture: the image of a number in the set: upright, of any size and mode; None if it cannot be read. None in its
      place if there are no pictures.
  """

  weights: str
  dataset: str
  facts: dict[str, str]
  class_names: tuple[str, ...]
  summary: dict[str, Any]
  picture: Callable[[int], Image.Image | None] | None

  @property
  def num_read(self) -> int:
    """Number of images that could be read."""
    return self.summary['images'] - self.summary['unreadable']


def write_report(path: Path, sections: Sequence[Section], title: str) -> None:
  """Writes a page, whole or not at all.

  Args:
    path: ends in one of `ENDINGS`.
    sections: at least one. If there are more than `MAX_SECTIONS`, the page shows the first of them and says so; the
      table at the top of an HTML page has all.
    title: of the page.

  Raises:
    UserError: the path has another ending, or cannot be written.
  """
  if path.suffix not in ENDINGS:
    raise problem(path, f'the name of a report must end in {" or ".join(ENDINGS)}')
  if path.suffix == '.html':
    page = html_page(sections, title).encode()
    write_file(path, lambda temporary: temporary.write_bytes(page))
  else:
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'Glyph', UserWarning)  # letters that the font lacks are boxes
      figure = draw_page(sections, title)
      write_file(path, lambda temporary: figure.savefig(temporary, format='png', dpi=100))


def html_page(sections: Sequence[Section], title: str) -> str:
  """The page as one HTML document."""
  style = (resources.files('t2t_vit_jax.evaluate') / 'report.css').read_text('utf-8')
  return '\n'.join(
    [
      '<!DOCTYPE html>',
      '<html lang="en">',
      '<head>',
      '<meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      # Whatever a name contains: no script runs, and nothing is fetched.
      '<meta http-equiv="Content-Security-Policy" '
      "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
      f'<title>{html.escape(printable(title))}</title>',
      f'<style>\n{style}</style>',
      '</head>',
      '<body>',
      f'<h1 id="top">{_text(title)}</h1>',
      _overview(sections),
      *(_section(number, section) for number, section in enumerate(sections[: MAX_SECTIONS['.html']], start=1)),
      '</body>',
      '</html>',
      '',
    ]
  )


def _text(text: str) -> str:
  """HTML of a text of any origin: on one line, without markup, its direction of writing kept to itself."""
  return f'<bdi>{html.escape(printable(text))}</bdi>'


def _percent(share: float | None) -> str:
  return '-' if share is None else f'{100 * share:.2f}\u00a0%'


def _table(kind: str, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table whose cells are HTML already; it scrolls sideways where it is wider than the screen."""
  head = ''.join(f'<th scope="col">{cell}</th>' for cell in heading)
  lines = ['<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in rows]
  return '\n'.join(
    [
      f'<div class="scroll"><table class="{kind}">',
      *([f'<thead><tr>{head}</tr></thead>'] if heading else []),
      '<tbody>',
      *lines,
      '</tbody></table></div>',
    ]
  )


def _overview(sections: Sequence[Section]) -> str:
  """A table with a row for each section, which leads to it if the page shows it."""
  names = list(dict.fromkeys(name for section in sections for name in section.facts))
  shown = sections[: MAX_SECTIONS['.html']]
  rows = [
    [
      *(
        f'<a href="#section-{number}">{_text(text)}</a>' if number <= len(shown) else _text(text)
        for text in (section.weights, section.dataset)
      ),
      *(_text(section.facts.get(name, '-')) for name in names),
      _percent(section.summary['calibration_error']),
    ]
    for number, section in enumerate(sections, start=1)
  ]
  table = _table('overview', ['weights', 'set', *map(_text, names), 'calibration error'], rows)
  if len(shown) == len(sections):
    return table
  return (
    f'{table}\n<p>To stay small, this page shows the first {len(shown)} of these {len(sections)} in detail. '
    'For others, write a report on these alone.</p>'
  )


def _section(number: int, section: Section) -> str:
  parts = [
    f'<section id="section-{number}">',
    f'<h2>{_text(section.weights)} <small>on</small> {_text(section.dataset)}</h2>',
    _facts(section),
  ]
  if section.num_read:
    parts += ['<div class="diagrams">', _reliability(number, section), _coverage(number, section), '</div>']
    parts.append(_confused(section))
  else:
    parts.append('<p>None of the images could be read: there is nothing to show.</p>')
  return '\n'.join([*parts, '<p><a href="#top">to the top</a></p>', '</section>'])


def _facts(section: Section) -> str:
  summary = section.summary
  rows = [[_text(name), _text(fact)] for name, fact in section.facts.items()]
  rows += [
    ['mean confidence', _percent(summary['confidence'])],
    ['expected calibration error', _percent(summary['calibration_error'])],
    ['area under the risk-coverage curve', _percent(summary['risk_coverage_area'])],
  ]
  if summary['unreadable']:
    rows.append(['unreadable images, left out here', f'{summary["unreadable"]:,}'])
  return _table('facts', (), rows)


def _figure(svg: str, caption: str, numbers: str) -> str:
  """A diagram, a sentence that says how to read it, and a table of its numbers, which opens on a click."""
  return '\n'.join(
    [
      f'<figure>{svg}',
      f'<figcaption>{caption}',
      f'<details><summary>numbers</summary>{numbers}</details>',
      '</figcaption></figure>',
    ]
  )


def _reliability(number: int, section: Section) -> str:
  rows = [
    [
      f'{100 * row["lower"]:.1f} to {100 * row["upper"]:.1f} %',
      f'{row["count"]:,}',
      _percent(row['confidence']),
      _percent(row['accuracy']),
    ]
    for row in section.summary['bins']
  ]
  return _figure(
    diagrams.as_svg(diagrams.draw_reliability, section.summary, f'reliability {number}'),
    'A blue bar is the share of right guesses among those of about this confidence. Where it ends below the dashed '
    'line, the model is surer than it should be; above it, less sure. The orange gap reaches from the bar to the mean '
    'confidence: its mean length over all images is the calibration error, '
    f'{_percent(section.summary["calibration_error"])}. Grey bars are the share of the images with this confidence; '
    'where there are few, the blue bar says little.',
    _table('numbers', ['confidence', 'images', 'mean confidence', 'accuracy'], rows),
  )


def _coverage(number: int, section: Section) -> str:
  curve = section.summary['coverage']
  rows = [
    [f'{100 * row["share"]:.0f} %', f'{row["kept"]:,}', _percent(row['least_confidence']), _percent(row['accuracy'])]
    for row in curve
  ]
  example = next(row for row in curve if row['share'] == 0.8)
  return _figure(
    diagrams.as_svg(diagrams.draw_coverage, section.summary, f'coverage {number}'),
    'Accuracy on the images that are kept if the guesses with the least confidence are refused. For example, the most '
    f'confident 80 % have a confidence of {_percent(example["least_confidence"])} or more, and '
    f'{_percent(example["accuracy"])} of them are right. Where the curve is flat, confidence does not tell right '
    'guesses from wrong ones.',
    _table('numbers', ['kept', 'images', 'least confidence', 'accuracy'], rows),
  )


def _confused(section: Section) -> str:
  """A table of the most confused pairs of classes, with pictures if there are."""
  pairs = section.summary['confused']
  if not pairs:
    return '<p>No image of a single class was taken for another class.</p>'
  rows = [
    [
      _class(section, pair['label']),
      _class(section, pair['guess']),
      f'<b>{pair["count"]:,}</b> of {pair["of"]:,} <span class="share">({_percent(pair["count"] / pair["of"])})</span>',
      _examples(section.picture, pair['examples']),
    ]
    for pair in pairs
  ]
  heading = ['class', 'taken for', 'images of the class', 'examples by number, the most confident first']
  return '<h3>Most confused classes</h3>\n' + _table('pairs', heading, rows)


def _class(section: Section, label: int) -> str:
  """A class's name, cut if it is long; and its label if it has none, or another class has the same."""
  name = section.class_names[label]
  number = f' <span class="label">{label}</span>' if section.class_names.count(name) > 1 or not name else ''
  return _text(_cut(name, MAX_NAME)) + number


def _cut(name: str, length: int) -> str:
  """A name on one line of at most `length` characters."""
  name = printable(name)
  return name if len(name) <= length else f'{name[: length - 1]}…'


def _examples(picture: Callable[[int], Image.Image | None] | None, indices: Sequence[int]) -> str:
  if picture is None:
    return ', '.join(map(str, indices))
  return '<div class="pictures">' + ''.join(_example(picture(index), index) for index in indices) + '</div>'


def _example(image: Image.Image | None, index: int) -> str:
  """An image's thumbnail and number, with a grey box in place of an image that cannot be read."""
  if image is None:
    return f'<figure><div class="missing">cannot be read</div><figcaption>{index}</figcaption></figure>'
  small = thumbnail(image)
  file = io.BytesIO()
  small.save(file, 'JPEG', quality=JPEG_QUALITY, optimize=True)
  content = base64.b64encode(file.getvalue()).decode()
  return (
    f'<figure><img src="data:image/jpeg;base64,{content}" alt="image {index}" width="{small.width}" '
    f'height="{small.height}"><figcaption>{index}</figcaption></figure>'
  )


def thumbnail(image: Image.Image) -> Image.Image:
  """An image of any mode in RGB, its longer side `THUMBNAIL` px; small ones keep their pixels visible.

  What is transparent is shown on white. Samples of more than 8 bits are scaled from the darkest to the lightest.
  """
  if image.mode.startswith(('I', 'F')):
    samples = np.nan_to_num(np.asarray(image, np.float64))
    low, high = samples.min(), samples.max()
    image = Image.fromarray((255 * (samples - low) / max(high - low, 1e-9)).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  scale = THUMBNAIL / max(image.size)
  width, height = (max(1, round(scale * side)) for side in image.size)
  method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
  return image.convert('RGB').resize((width, height), method, reducing_gap=2)


def draw_page(sections: Sequence[Section], title: str) -> 'Figure':
  """A row for each section that is shown: its diagrams, and its most confused pairs of classes."""
  from matplotlib.figure import Figure  # late: it takes half a second

  shown = sections[: MAX_SECTIONS['.png']]
  figure = Figure(figsize=(15, 4 * len(shown) + 0.5), layout='constrained')  # without pyplot: no display
  left_out = f' (the first {len(shown)} of {len(sections)})' if len(shown) < len(sections) else ''
  figure.suptitle(printable(title) + left_out, parse_math=False)
  for row, section in zip(figure.subfigures(len(shown), 1, squeeze=False).flat, shown, strict=True):
    facts = ', '.join(f'{name} {fact}' for name, fact in section.facts.items())
    row.suptitle(printable(f'{section.weights} on {section.dataset}: {facts}'), fontsize='medium', parse_math=False)
    if not section.num_read:
      continue
    reliability, coverage, confused = row.subfigures(1, 3)
    diagrams.draw_reliability(reliability, section.summary)
    diagrams.draw_coverage(coverage, section.summary)
    pairs = section.summary['confused'][:MAX_BARS]
    names = [' → '.join(_cut(section.class_names[pair[which]], 20) for which in ('label', 'guess')) for pair in pairs]
    diagrams.draw_pairs(confused, names, [pair['count'] for pair in pairs])
  return figure
