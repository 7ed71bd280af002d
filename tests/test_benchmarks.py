"""The benchmarks: what they share, and that each command runs and writes what it has measured."""

import json
import os
from pathlib import Path
import re
import subprocess
import sys

import jax
import pytest

from benchmarks import common, model, scaling
from benchmarks.compiler import place_and_pass, traffic_by_array
from benchmarks.computations import Workload, build_yardstick, variables_of
from t2t_vit_jax import UserError
from t2t_vit_jax.planning.schedule import Operation

ROOT = Path(__file__).parents[1]
TINY = ['--model=t2t_vit_tiny', '--batch-size=2']


def benchmark(name, *arguments):
  """Runs a benchmark: exit code, output and errors."""
  command = [sys.executable, '-m', f'benchmarks.{name}', *map(str, arguments)]
  environment = {**os.environ, 'TORCHINDUCTOR_VEC_ISA_OK': '0'}  # torch.compile then takes two thirds of the time
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1200)
  return done.returncode, done.stdout, done.stderr


def test_forms_are_written_as_python_calls():
  text = 'mine:depth=2,soft_split_form=patches,dense_stages=(3, 6),qk_scale=None,scan_blocks=True,norm="x y"'
  assert common.parse_form(text) == (
    'mine',
    dict(depth=2, soft_split_form='patches', dense_stages=(3, 6), qk_scale=None, scan_blocks=True, norm='x y'),
  )
  assert common.parse_form('plain') == ('plain', {})


@pytest.mark.parametrize('text', ['a:depth', 'a:depth=', ':depth=2', 'a:depth=2=3', 'a:depth=f()', 'a:depth=2) + (3'])
def test_badly_written_forms_get_an_example(text):
  with pytest.raises(UserError, match='write NAME:FIELD=VALUE,FIELD=VALUE, such as'):
    common.parse_form(text)


def test_forms_by_name_and_twice():
  known = {'default': {}, 'small': {'depth': 1}}
  assert common.forms(None, known, ['small']) == {'small': {'depth': 1}}
  assert common.forms(['small', 'other:depth=3'], known, []) == {'small': {'depth': 1}, 'other': {'depth': 3}}
  with pytest.raises(UserError, match='smal: known by name are default, small'):
    common.forms(['smal'], known, [])
  with pytest.raises(UserError, match='two are named small'):
    common.forms(['small', 'small:depth=3'], known, [])


def test_all_measurements_take_their_turn_in_every_round():
  order = []
  measurements = {name: lambda name=name: order.append(name) or len(order) for name in 'abc'}
  assert common.in_turn(measurements, 3) == {'a': [1, 6, 7], 'b': [2, 5, 8], 'c': [3, 4, 9]}
  assert ''.join(order) == 'abccbaabc'


def test_spread():
  assert common.spread([3, 1, 2000], 1) == '3.0 (1.0 to 2,000.0)'


def test_a_table_is_aligned():
  assert common.table(('a', 'bc'), [['x', '1'], ['yy', '22']]) == ('| a  | bc |\n| -- | -- |\n| x  | 1  |\n| yy | 22 |')


def test_results_replace_a_file_whole(tmp_path):
  path = tmp_path / 'results.json'
  path.write_text('old')
  with pytest.raises(TypeError):
    common.write_json(str(path), {'not': {1, 2}})
  assert path.read_text() == 'old'
  common.write_json(str(path), {'a': 1})
  assert json.loads(path.read_text()) == {'a': 1}
  assert [file.name for file in tmp_path.iterdir()] == ['results.json']


@pytest.mark.parametrize(
  ('source', 'place', 'which'),
  [
    ('', '(made by the compiler)', 'forward'),
    ('jit(forward)/T2TViT/blocks_11/attn/attn._qkv/btd,dhe->bthe/dot_general', 'blocks/attn/btd,dhe->bthe', 'forward'),
    ('jit(f)/transpose(jvp(T2TViT))/blocks_3/mlp/fc1/dot_general', 'blocks/mlp/fc1', 'backward'),
    (
      'jit(f)/transpose(jvp(T2TViT))/T2TViT._scan/while/body/closed_call/checkpoint/rematted_computation/'
      'EncoderBlock/norm1/mul',
      'blocks/norm1',
      'recomputed',
    ),
    ('jit(train_step)/while/body/closed_call/vmap(jit(_where))/select_n', '(outside of modules)', 'forward'),
    ('jit(train_step)/while/body/closed_call/transpose(jvp(loss))/mul', 'loss', 'backward'),
    ('jit(train_step)/optimizer/add', 'optimizer', 'forward'),
  ],
)
def test_places_of_operations(source, place, which):
  assert place_and_pass(source) == (place, which)


def test_traffic_is_told_by_array_whatever_its_layout():
  arrays = {'bf16[2,6]': 48, 'bf16[12]': 24, 'f32[12]': 48}, {'bf16[3,4]': 24, 'f32[2,6]': 96, 'pred[]': 1}
  operations = [Operation('', '', '', 0, 0, 1, each) for each in arrays]
  assert traffic_by_array(operations) == {'f32[2,6]': 144, 'bf16[2,6]': 96, 'pred[]': 1}


def test_the_yardstick_has_the_published_size():
  """22.05 million parameters: arXiv 2012.12877, table 1, gives DeiT-S 22 M; by hand for S/16 at 224 px."""
  variables = variables_of(build_yardstick(Workload('', 1, 224, 'float32')), Workload('', 1, 224, 'float32'))
  dim, hidden = 384, 4 * 384
  block = 4 * (dim * dim + dim) + dim * hidden + hidden + hidden * dim + dim + 4 * dim
  around = 16 * 16 * 3 * dim + dim + dim + 197 * dim + 2 * dim + dim * 1000 + 1000
  count = sum(x.size for x in jax.tree.leaves(variables))
  assert count == 12 * block + around == 22_050_664
  with pytest.raises(UserError, match='multiple of 16 px, not 100'):
    build_yardstick(Workload('', 1, 100, 'float32'))


def test_growth_by_powers():
  assert scaling.exponent([1, 10, 100], [5, 7, 700]) == pytest.approx(2)


@pytest.mark.parametrize(
  ('module', 'arguments', 'message'),
  [
    (model, ['--model=t2t_vit_15'], "unknown model 't2t_vit_15': did you mean"),
    (model, [*TINY, '--form=x:dept=2'], "t2t_vit_tiny has no argument 'dept': did you mean 'depth'?"),
    (model, [*TINY, '--form=x:dtype=float12'], "--form=x: unknown dtype 'float12': did you mean"),
    (model, [*TINY, '--output=nowhere/x.json'], '--output: there is no folder'),
    (model, [*TINY, '--threads=100000'], '--threads=100000: there are'),
    (scaling, [*TINY, '--sizes=2'], 'an image of 2 x 2 px is too small'),
    (scaling, [*TINY, '--plot=nowhere/x.png'], '--plot: there is no folder'),
  ],
)
def test_wrong_input_gets_one_line(module, arguments, message, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['benchmark', *arguments])
  with pytest.raises(SystemExit) as error:
    module.main()
  assert error.value.code == 2
  output, errors = capsys.readouterr()
  assert output == ''
  assert errors.count('\n') == 1
  assert errors.startswith('error: ')
  assert message in errors


@pytest.mark.slow
@pytest.mark.needs('torch')
def test_model(tmp_path):
  path = tmp_path / 'results.json'
  code, output, errors = benchmark(
    'model', *TINY, '--against=torch', '--form=one:depth=1', '--form=half:depth=1,dtype=bfloat16',
    '--computation=forward', '--rounds=3', '--seconds=0.01', f'--output={path}',
  )  # fmt: skip
  assert code == 0, errors
  results = json.loads(path.read_text())
  entries = {entry['form']: entry for entry in results['entries']}
  compiled = {'torch.compile', 'torch.compile (half)'}  # needs a C++ compiler: where there is none a note says so
  assert set(entries) - compiled == {'torch eager', 'one', 'torch eager (half)', 'half'}
  assert len(compiled - set(entries)) == sum('torch.compile' in note for note in results['notes'])
  assert all(len(entry['seconds']) == 3 and min(entry['seconds']) > 0 for entry in entries.values())
  assert entries['one']['rival'] == 'torch eager, forward'
  assert entries['half']['rival'] == 'torch eager (half), forward'
  assert entries['one']['product_flops'] > entries['half']['product_flops'] > 0  # which sums windows without products
  assert results['commit']
  assert {'jax', 'torch'} <= set(results['versions'])
  assert output.count('\n| ') == 2 + len(entries)


@pytest.mark.slow
def test_scaling(tmp_path):
  path, picture = tmp_path / 'results.json', tmp_path / 'scaling.png'
  code, output, errors = benchmark(
    'scaling', *TINY, '--sizes=32,64', '--depths=1,2', '--batches=1,2', '--rounds=2', f'--output={path}',
    f'--plot={picture}',
  )  # fmt: skip
  assert code == 0, errors
  curves = scaling.curves_of(json.loads(path.read_text())['results'])
  module = {name: curves['image size', f'T2T module, {name}'] for name in ('performer', 'transformer')}
  assert [x['tokens'] for x in module['performer']] == [64, 256]
  performer, transformer = (module[name][1]['flops'] / module[name][0]['flops'] for name in module)
  assert performer < 4.2 < transformer  # four times the tokens
  shallow, deep = curves['depth', 'model']
  assert shallow['flops'] < deep['flops']
  assert len(shallow['seconds']) == 2
  assert 'Grows with the number of tokens' in output
  assert picture.read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
@pytest.mark.needs('libtpu')
def test_compiler_for_tpu(tmp_path):
  path = tmp_path / 'results.json'
  code, output, errors = benchmark(
    'compiler', *TINY, '--form=one:depth=1', '--form=looped:depth=4,scan_blocks=True', '--form=four:depth=4',
    '--computation=forward', '--no-yardstick', '--profile=5', f'--output={path}',
  )  # fmt: skip
  assert code == 0, errors
  results = {name: form['computations']['forward'] for name, form in json.loads(path.read_text())['forms'].items()}
  one, looped, four = (results[name] for name in ('one', 'looped', 'four'))
  for result in results.values():
    for unit in ('cycles', 'hbm_bytes'):
      assert sum(sum(passes.values()) for passes in result['profiles'][unit].values()) == result[unit] > 0
    assert sum(result['arrays'].values()) == result['hbm_bytes']
  # The loop over all blocks but the last counts three times, where XLA has its body once.
  assert looped['product_flops'] == four['product_flops'] > one['product_flops']
  assert looped['flops'] < four['flops']
  assert any(operation['count'] == 3 for operation in looped['operations']['cycles'])
  assert 'blocks/attn' in output


@pytest.mark.slow
def test_device(tmp_path):
  code, output, errors = benchmark('device', '--small', f'--output={tmp_path}/page')
  assert code == 0, errors
  results = json.loads((tmp_path / 'page' / 'device.json').read_text())
  parts = {title.split()[0]: part for title, part in results['parts'].items()}
  assert all('error' not in part for part in parts.values())
  assert [row[-1] for row in parts['Parity']['rows']] == 12 * ['within bounds']
  assert [row[1] for row in parts['Forms']['rows']] == ['xla', 'full', 'chunked']  # cuDNN's needs a GPU
  assert [row[:2] for row in parts['Throughput']['rows']] == [
    [computation, '4'] for computation in ('forward', 'training_step')
  ]
  assert len(parts['Input']['rows']) == 2
  assert [row[0] for row in parts['Compilation']['rows']] == ['empty', 'filled']
  assert list((tmp_path / 'page' / 'profile').rglob('*.xplane.pb'))
  page = (tmp_path / 'page' / 'device.md').read_text()
  assert page in output
  assert 'FAIL' not in page


@pytest.mark.slow
def test_evaluation_beside_a_plain_loop():
  code, output, errors = benchmark('evaluation', '--images=40', '--batch-size=10', '--rounds=1')
  assert code == 0, errors
  assert re.search(r'^throughput of evaluation / plain: \d\.\d{3} \(', output, re.MULTILINE)
  assert re.search(r'^memory after 8 and 40 images: [\d.]+ and [\d.]+ MB$', output, re.MULTILINE)
