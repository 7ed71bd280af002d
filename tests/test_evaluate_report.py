"""The page about a model's errors: what it shows, names of any kind, pictures of any kind, and its size."""

import base64
import dataclasses
from html.parser import HTMLParser
import io
import re

from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest

from t2t_vit_jax.errors import UserError
from t2t_vit_jax.evaluate import diagrams, report
from t2t_vit_jax.evaluate.reliability import summary
from t2t_vit_jax.evaluate.report import Section, write_report
from tests.test_evaluate_reliability import guesses_of

# Name of a class -> its text on the page.
NAMES = {
  '<script>alert(1)</script>': '<script>alert(1)</script>',
  '"><img src=x onerror=alert(1)>': '"><img src=x onerror=alert(1)>',
  "it's &amp; &lt;": "it's &amp; &lt;",
  'two\nlines\r\x1b[2J\x00': 'two\\nlines\\r\\x1b[2J\\x00',
  '猫 חתול Ünï': '猫 חתול Ünï',
  '$x^{2$ \\frac': '$x^{2$ \\frac',
  '\u202egnp.exe \ud800': '\\u202egnp.exe \\ud800',
  'x' * 500: 'x' * 199 + '…',
}
VOID = {'meta', 'img', 'br'}


def guesses(count=300, num_classes=8, seed=0):
  """Guesses that are wrong by one or two classes; image 0 could not be read."""
  rng = np.random.default_rng(seed)
  confidence = rng.uniform(0.2, 1, count).astype(np.float32)
  label = rng.integers(0, num_classes, count).astype(np.int32)
  right = rng.uniform(size=count) < confidence
  guess = np.where(right, label, (label + rng.integers(1, 3, count)) % num_classes).astype(np.int32)
  label[0], right[0] = -1, False
  return guesses_of(np.arange(count), label, guess, right, confidence)


def plain_picture(index):
  """A picture of one colour, which tells the number."""
  return Image.new('RGB', (40, 30), (index % 256, 40 * (index // 256), 128))


def section(**changes):
  return dataclasses.replace(
    Section('t2t_vit_14', 'val', {'top-1': '61.00 %'}, tuple(NAMES), summary(guesses()), plain_picture), **changes
  )


class Page(HTMLParser):
  """An HTML document: its elements as (tag, attributes), their texts by tag; fails if nesting is wrong."""

  def __init__(self, document):
    super().__init__(convert_charrefs=True)
    self.elements, self.texts, self.open = [], [], []
    self.feed(document)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append((tag, []))

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_data(self, data):
    for _, text in self.open:
      text.append(data)

  def handle_endtag(self, tag):
    opened, text = self.open.pop()
    assert opened == tag
    self.texts.append((tag, ''.join(text).strip()))

  def all(self, tag):
    return [text for name, text in self.texts if name == tag]

  def attributes(self, *names):
    return [attrs[name] for _, attrs in self.elements for name in names if name in attrs]


def read(path):
  return Page(path.read_text('utf-8'))


def pictures(page):
  found = []
  for tag, attrs in page.elements:
    if tag == 'img':
      kind, _, content = attrs['src'].partition(',')
      assert kind == 'data:image/jpeg;base64'
      image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
      assert image.format == 'JPEG'
      assert image.size == (int(attrs['width']), int(attrs['height']))
      found.append((int(attrs['alt'].removeprefix('image ')), image))
  return found


def test_a_page_of_two_models(tmp_path):
  path = tmp_path / 'page.html'
  second = section(weights='other', facts={'top-1': '62.00 %', 'images': '300'}, summary=summary(guesses(seed=1)))
  write_report(path, [section(), second], 'Evaluation')
  page = read(path)
  assert page.all('title') == page.all('h1') == ['Evaluation']
  assert page.all('h2') == ['t2t_vit_14 on val', 'other on val']
  overview = page.all('tr')[:3]
  error = [f'{100 * each.summary["calibration_error"]:.2f}\xa0%' for each in (section(), second)]
  assert overview == [
    'weightssettop-1imagescalibration error',
    f't2t_vit_14val61.00 %-{error[0]}',
    f'otherval62.00 %300{error[1]}',
  ]
  targets = [href for href in page.attributes('href') if href.startswith('#section')]
  assert targets == ['#section-1', '#section-1', '#section-2', '#section-2']
  assert 'unreadable images, left out here1' in page.all('tr')
  assert len([tag for tag, _ in page.elements if tag == 'svg']) == 4
  for caption in page.all('figcaption')[:2]:
    assert len(caption) > 200


def test_the_numbers_of_the_diagrams(tmp_path):
  path, given = tmp_path / 'page.html', section()
  write_report(path, [given], 'Evaluation')
  rows, percent = read(path).all('tr'), '{:.2f}\xa0%'.format
  full = [row for row in given.summary['bins'] if row['count']]
  assert len(full) == 12
  for row in full:
    numbers = f'{row["count"]}{percent(100 * row["confidence"])}{percent(100 * row["accuracy"])}'
    assert f'{100 * row["lower"]:.1f} to {100 * row["upper"]:.1f} %{numbers}' in rows
  assert '0.0 to 6.7 %0--' in rows
  # Of 299 images that could be read, 60 are a fifth.
  fifth = given.summary['coverage'][4]
  assert f'20 %60{percent(100 * fifth["least_confidence"])}{percent(100 * fifth["accuracy"])}' in rows


def test_the_page_needs_nothing_and_runs_nothing(tmp_path):
  path = tmp_path / 'page.html'
  write_report(
    path, [section(weights='<script>', dataset='"x"', facts={'<b>': '</td>'}), section()], '</title><script>'
  )
  page, text = read(path), path.read_text('utf-8')
  tags = {tag for tag, _ in page.elements}
  assert 'svg' in tags
  assert not tags & {'script', 'link', 'iframe', 'object', 'embed', 'base', 'form'}
  assert not [name for _, attrs in page.elements for name in attrs if name.startswith('on')]
  ids = page.attributes('id')
  assert len(ids) == len(set(ids))
  for target in page.attributes('href', 'src', 'xlink:href'):
    assert target.startswith('data:image/jpeg;') or target[1:] in ids, target
  references = re.findall(r'url\((.*?)\)', text)
  assert {reference[1:] for reference in references} <= set(ids)
  assert {reference[0] for reference in references} == {'#'}
  assert '@import' not in text
  assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page.attributes('content')
  assert 'prefers-color-scheme: dark' in text
  assert page.all('title') == ['</title><script>']
  assert page.all('h2')[0] == '<script> on "x"'
  assert diagrams.INK not in text


def test_names_are_shown_as_they_are_on_one_line(tmp_path):
  path, given = tmp_path / 'page.html', section(picture=None)
  write_report(path, [given], 'Evaluation')
  cells = read(path).all('bdi')
  pairs = given.summary['confused']
  assert {pair['label'] for pair in pairs} | {pair['guess'] for pair in pairs} == set(range(len(NAMES)))
  texts = list(NAMES.values())
  expected = [texts[pair[which]] for pair in pairs for which in ('label', 'guess')]
  assert cells[-len(expected) :] == expected


def test_the_confused_classes_with_their_pictures(tmp_path):
  path, given = tmp_path / 'page.html', section()
  write_report(path, [given], 'Evaluation')
  page, pairs = read(path), given.summary['confused']
  found = pictures(page)
  assert [index for index, _ in found] == [index for pair in pairs for index in pair['examples']]
  for index, image in found:
    assert image.size == (112, 84)
    wanted = np.asarray(plain_picture(index))[0, 0].astype(int)
    assert abs(np.asarray(image)[40, 50] - wanted).max() <= 4
  cells = page.all('td')
  assert [cell for cell in cells if re.match(r'\d+ of \d+ ', cell)] == [
    f'{pair["count"]} of {pair["of"]} ({100 * pair["count"] / pair["of"]:.2f}\xa0%)' for pair in pairs
  ]


def test_pictures_that_cannot_be_read_and_sets_without_pictures(tmp_path):
  path, given = tmp_path / 'page.html', section()
  examples = [index for pair in given.summary['confused'] for index in pair['examples']]
  lost = set(examples[::3])
  write_report(path, [section(picture=lambda i: None if i in lost else plain_picture(i))], 'Evaluation')
  page = read(path)
  assert [index for index, _ in pictures(page)] == [index for index in examples if index not in lost]
  assert page.all('div').count('cannot be read') == len(lost)
  write_report(path, [section(picture=None)], 'Evaluation')
  page = read(path)
  assert not pictures(page)
  assert ', '.join(map(str, given.summary['confused'][0]['examples'])) in page.all('td')


def test_texts_of_any_kind_stay_on_one_line(tmp_path):
  path = tmp_path / 'page.html'
  write_report(path, [section(weights='a\nb', dataset='\x1b[2J', facts={'c\u202e': 'd\0'})], 'e\r\nf')
  page = read(path)
  assert page.all('title') == page.all('h1') == ['e\\r\\nf']
  assert page.all('h2') == ['a\\nb on \\x1b[2J']
  assert 'c\\u202ed\\x00' in page.all('tr')


def test_labels_tell_classes_of_one_name_apart(tmp_path):
  path = tmp_path / 'page.html'
  write_report(path, [section(class_names=('crane', 'crane', '', *'cdefg'), picture=None)], 'Evaluation')
  cells = read(path).all('td')
  assert {'crane 0', 'crane 1', '2', 'c'} <= set(cells)


def test_a_page_of_twenty_pairs_of_noise_is_below_a_megabyte(tmp_path):
  def noise(index):
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (300, 300, 3), np.uint8))

  path = tmp_path / 'page.html'
  names = tuple(f'class {i}' for i in range(40))
  given = section(class_names=names, summary=summary(guesses(5000, 40)), picture=noise)
  write_report(path, [given], 'Evaluation')
  assert len(pictures(read(path))) == 80
  assert 200_000 < path.stat().st_size < 1_000_000


def test_more_sections_than_a_page_shows(tmp_path, monkeypatch):
  monkeypatch.setattr(report, 'MAX_SECTIONS', {'.html': 2, '.png': 1})
  given = [section(dataset=f'set {i}', picture=None) for i in range(4)]
  write_report(tmp_path / 'page.html', given, 'Evaluation')
  page = read(tmp_path / 'page.html')
  assert page.all('h2') == ['t2t_vit_14 on set 0', 't2t_vit_14 on set 1']
  assert [row.count('set 3') for row in page.all('tr')[:5]] == [0, 0, 0, 0, 1]
  assert {href for href in page.attributes('href') if href.startswith('#s')} == {'#section-1', '#section-2'}
  assert 'shows the first 2 of these 4' in ' '.join(page.all('p'))
  one, four = (report.draw_page(sections, 'Evaluation') for sections in (given[:1], given))
  assert one.get_size_inches().tolist() == four.get_size_inches().tolist()
  assert four.get_suptitle() == 'Evaluation (the first 1 of 4)'


@pytest.mark.parametrize('ending', report.ENDINGS)
@pytest.mark.parametrize('right', [True, False])
def test_models_that_are_always_right_or_wrong(tmp_path, right, ending):
  always = guesses_of(*(np.array([x] * 3) for x in (0, 0, 0 if right else 1, right)), np.ones(3, np.float32))
  write_report(tmp_path / f'page{ending}', [section(summary=summary(always))], 'Evaluation')
  if ending == '.html':
    shown = 'No image of a single class was taken for another class.' in read(tmp_path / 'page.html').all('p')
    assert shown == right


@pytest.mark.parametrize('ending', report.ENDINGS)
def test_sets_of_which_nothing_can_be_read(tmp_path, ending):
  unreadable = guesses_of(*(np.array([x]) for x in (0, -1, 0, False)), np.zeros(1, np.float32))
  write_report(tmp_path / f'page{ending}', [section(summary=summary(unreadable)), section()], 'Evaluation')
  if ending == '.html':
    assert 'None of the images could be read' in ' '.join(read(tmp_path / 'page.html').all('p'))


def test_a_png_file(tmp_path):
  path = tmp_path / 'page.png'
  write_report(path, [section(weights='$x^{2$', facts={'$': '\x1b'}), section()], '$x^{2$ 猫\n')
  with Image.open(path) as image:
    assert image.format == 'PNG'
    assert image.size == (1500, 850)
    colors = {color for _, color in image.convert('RGB').getcolors(2**24)}
  assert tuple(bytes.fromhex(diagrams.ACCURACY[1:])) in colors
  assert tuple(bytes.fromhex(diagrams.GAP[1:])) in colors


def test_bars_and_lines_have_the_lengths_of_the_numbers():
  given = summary(guesses())
  figure = Figure()
  diagrams.draw_reliability(figure, given)
  upper, lower = figure.axes
  full = [row for row in given['bins'] if row['count']]
  bars = [(bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()) for bar in upper.patches]
  accuracies, gaps = np.array(bars[: len(full)]), np.array(bars[len(full) :])
  np.testing.assert_allclose(accuracies, [(row['lower'], 0, 1 / 15, row['accuracy']) for row in full])
  np.testing.assert_allclose(gaps[:, 1], [row['accuracy'] for row in full])
  np.testing.assert_allclose(gaps[:, 1] + gaps[:, 3], [row['confidence'] for row in full])
  assert [bar.get_height() for bar in lower.patches] == pytest.approx([row['count'] / 299 for row in full])
  assert upper.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]

  figure = Figure()
  diagrams.draw_coverage(figure, given)
  (axes,) = figure.axes
  points = [(row['share'], row['accuracy']) for row in given['coverage']]
  assert [tuple(point) for point in axes.lines[0].get_xydata()] == points
  low, high = axes.get_ylim()
  assert 0 <= low < min(accuracy for _, accuracy in points) <= max(accuracy for _, accuracy in points) <= high <= 1

  figure = Figure()
  diagrams.draw_pairs(figure, ['$x^{2$', 'b'], [5, 3])
  (axes,) = figure.axes
  assert [bar.get_width() for bar in axes.patches] == [5, 3]
  assert [label.get_text() for label in axes.get_yticklabels()] == ['$x^{2$', 'b']
  figure.savefig(io.BytesIO(), format='png')  # would fail if it read a formula


@pytest.mark.parametrize(
  'mode', ['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBa', 'RGBX', 'CMYK', 'YCbCr', 'HSV', 'I', 'I;16', 'F']
)
def test_thumbnails_of_pictures_of_any_mode(mode):
  small = report.thumbnail(Image.new(mode, (300, 200)))
  assert (small.mode, small.size) == ('RGB', (112, 75))


@pytest.mark.parametrize(
  ('size', 'expected'),
  [((8, 8), (112, 112)), ((1, 1), (112, 112)), ((1, 5000), (1, 112)), ((5000, 1), (112, 1)), ((60, 120), (56, 112))],
)
def test_thumbnails_of_pictures_of_any_size(size, expected):
  assert report.thumbnail(Image.new('L', size)).size == expected


def test_thumbnails_show_transparency_on_white_and_deep_samples_as_grey():
  clear = Image.new('RGBA', (20, 10), (255, 0, 0, 0))
  assert np.asarray(report.thumbnail(clear)).min() == 255
  deep = Image.fromarray(np.array([[100, 300], [200, 300]], np.uint16))
  assert np.asarray(report.thumbnail(deep))[[20, 20, 90], [20, 90, 20], 0].tolist() == [0, 255, 127]
  floats = Image.fromarray(np.array([[-1, np.nan], [1, 1]], np.float32))
  assert np.asarray(report.thumbnail(floats))[[20, 20, 90], [20, 90, 20], 0].tolist() == [0, 127, 255]
  # Pixels of a small picture stay squares of one colour.
  digit = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8))
  assert (np.asarray(report.thumbnail(digit))[::14, ::14, 0] == np.asarray(digit)).all()


def test_the_same_page_is_the_same_file(tmp_path):
  for name in ('a', 'b'):
    write_report(tmp_path / f'{name}.html', [section()], 'Evaluation')
  assert (tmp_path / 'a.html').read_bytes() == (tmp_path / 'b.html').read_bytes()


@pytest.mark.parametrize('name', ['page.pdf', 'page', 'page.html.gz'])
def test_other_endings_are_refused(tmp_path, name):
  with pytest.raises(UserError, match=r'the name of a report must end in \.html or \.png'):
    write_report(tmp_path / name, [section()], 'Evaluation')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('ending', report.ENDINGS)
def test_a_page_that_cannot_be_written_is_one_line(tmp_path, ending):
  with pytest.raises(UserError, match='cannot be written: No such file or directory'):
    write_report(tmp_path / 'nowhere' / f'page{ending}', [section(picture=None)], 'Evaluation')


def test_a_page_that_fails_leaves_the_former_one(tmp_path):
  path = tmp_path / 'page.html'
  path.write_text('before')
  with pytest.raises(RuntimeError, match='no disk'):
    write_report(path, [section(picture=lambda index: (_ for _ in ()).throw(RuntimeError('no disk')))], 'Evaluation')
  assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [('page.html', 'before')]
