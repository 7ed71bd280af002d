"""Reads the text of XLA's scheduled HLO, for TPU or GPU: work and transfers of a compiled program on each chip."""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
# Opcodes that move nothing: they only name values, or end what is counted at its start.
FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all')
# Targets of `custom-call`s that move nothing either: they put other values side by side.
FREE_TARGETS = ('ConcatBitcast', 'AllocateBuffer')

_COMPUTATION = re.compile(r'(ENTRY )?%(\S+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)')
_SHAPE = re.compile(r'\b(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')


@dataclasses.dataclass(frozen=True)
class Collective:
  """A transfer between chips that happens `count` times a step.

  Attributes:
    kind: HLO's name, such as 'all-reduce'.
    dtype: HLO's name of the values' type.
    num_bytes: bytes of its result on one chip.
    count: how often a step runs it.
    in_open_loop: whether it is in a loop of unknown length, and counted once.
  """

  kind: str
  dtype: str
  num_bytes: int
  count: int
  in_open_loop: bool


@dataclasses.dataclass(frozen=True)
class Schedule:
  """One run of a program on one chip. Loops count as often as they run; loops of unknown length count once.

  Attributes:
    cycles: sum of the compiler's estimates; 0 for GPUs, whose compiler gives none.
    launches: number of instructions that run, without those that move nothing: on a GPU each starts a kernel.
    hbm_bytes: bytes read from and written to the chip's main memory, without what stays in on-chip memory.
    collectives: in the order of the text.
    open_loops: number of loops of unknown length.
  """

  cycles: int
  launches: int
  hbm_bytes: int
  collectives: tuple[Collective, ...]
  open_loops: int


@dataclasses.dataclass(frozen=True)
class Operation:
  """An instruction of a program that moves something; most are fusions of several of JAX's operations.

  Attributes:
    name: HLO's name.
    type: type of its result, as HLO writes it.
    source: the JAX operation that it, or the root of its fusion, came from: transformations, modules, then the
      primitive, such as 'jit(f)/transpose(jvp(T2TViT))/blocks_0/mlp/fc1/dot_general'; '' if the compiler made it.
    cycles: the compiler's estimate of all its runs together.
    hbm_bytes: bytes as in `Schedule`, of all its runs together.
    count: how often it runs; 1 in loops of unknown length.
    arrays: those of `hbm_bytes` by the array they belong to, such as 'bf16[128,197,384]'.
  """

  name: str
  type: str
  source: str
  cycles: int
  hbm_bytes: int
  count: int
  arrays: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  opcode: str
  rest: str  # after the opening parenthesis

  @functools.cached_property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.-]+)', self.rest.split(')')[0])

  def called(self, attribute: str) -> str:
    computation = re.search(rf'\b{attribute}=%([\w.-]+)', self.rest)
    return computation[1] if computation else ''


def read_schedule(text: str) -> Schedule:
  """Reads the schedule from `jax.stages.Compiled.as_text()` of a program that was compiled for TPU or GPU."""
  computations, entry = _computations(text)
  operations = _operations(computations, entry)
  open_loops = 0
  collectives = []
  for name, times, is_open in _executed(computations, entry, 1, False):
    channels = set()
    for instruction in computations[name]:
      open_loops += instruction.opcode == 'while' and _trip_count(instruction, computations) is None
      for transfer in _transfers(instruction, computations):
        # A transfer that runs beside other work is spread over several fusions, which share a channel.
        channel = re.search(r'channel_id=(\d+)', transfer.rest)
        if transfer is instruction or channel is None or channel[1] not in channels:
          collectives.append(_collective(transfer, times, is_open))
        channels |= {channel[1]} if channel else set()
  return Schedule(
    cycles=sum(operation.cycles for operation in operations),
    launches=sum(operation.count for operation in operations),
    hbm_bytes=sum(operation.hbm_bytes for operation in operations),
    collectives=tuple(collectives),
    open_loops=open_loops,
  )


def read_operations(text: str) -> list[Operation]:
  """Reads the operations that `read_schedule` adds up, in the order of the text; runs in a loop are one entry."""
  return _operations(*_computations(text))


def _operations(computations: dict[str, list[_Instruction]], entry: str) -> list[Operation]:
  operations = []
  for name, times, _ in _executed(computations, entry, 1, False):
    types = {instruction.name: instruction.type for instruction in computations[name]}
    for instruction in computations[name]:
      if _is_free(instruction):
        continue
      source = re.search(r'op_name="([^"]*)"', instruction.rest)
      arrays: dict[str, int] = {}
      for array, num_bytes in _hbm_arrays(instruction, types):
        arrays[array] = arrays.get(array, 0) + times * num_bytes
      operations.append(
        Operation(
          name=instruction.name,
          type=instruction.type,
          source=source[1] if source else '',
          cycles=times * _cycles(instruction),
          hbm_bytes=sum(arrays.values()),
          count=times,
          arrays=arrays,
        )
      )
  return operations


def _cycles(instruction: _Instruction) -> int:
  estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
  return int(estimate[1]) if estimate else 0


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Computations of a module by name, and the name of its entry, where the program starts."""
  computations: dict[str, list[_Instruction]] = {}
  entry = name = ''
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      name = header[2]
      entry = name if header[1] else entry
      computations[name] = []
    elif name and (parts := _INSTRUCTION.match(line)):
      computations[name].append(_Instruction(*parts.groups()))
  return computations, entry


def _executed(
  computations: dict[str, list[_Instruction]], name: str, times: int, is_open: bool
) -> Iterator[tuple[str, int, bool]]:
  """Yields each computation that runs on its own, how often, and whether it is in a loop of unknown length."""
  yield name, times, is_open
  for instruction in computations[name]:
    if instruction.opcode == 'while':
      trips = _trip_count(instruction, computations)
      for part in ('condition', 'body'):
        yield from _executed(computations, instruction.called(part), times * (trips or 1), is_open or trips is None)
    elif instruction.opcode == 'conditional':  # one branch runs, and all are counted
      branches = re.search(r'branch_computations=\{(.*?)\}', instruction.rest)
      for branch in re.findall(r'%([\w.-]+)', branches[1] if branches else ''):
        yield from _executed(computations, branch, times, is_open)
    elif instruction.opcode == 'call':  # a graph of kernels that a GPU starts at once
      yield from _executed(computations, instruction.called('to_apply'), times, is_open)


def _trip_count(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
  """Rounds of a loop, as the compiler notes or `lax.scan`'s condition `counter < constant` shows; None if unknown."""
  if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
    return int(noted[1])
  condition = computations[loop.called('condition')]
  constants = {x.name: x.rest for x in condition if x.opcode == 'constant' and x.type.startswith('s32[]')}
  last = condition[-1]
  if last.opcode == 'compare' and 'direction=LT' in last.rest and last.operands[-1] in constants:
    return int(constants[last.operands[-1]].split(')')[0])
  return None


def _transfers(instruction: _Instruction, computations: dict[str, list[_Instruction]]) -> list[_Instruction]:
  """The instruction itself, if it is a collective, and the collectives that are fused into it."""
  candidates = instruction, *computations.get(instruction.called('calls'), ())
  return [x for x in candidates if x.opcode.removesuffix('-start') in COLLECTIVES]


def _collective(instruction: _Instruction, times: int, is_open: bool) -> Collective:
  kind = instruction.opcode.removesuffix('-start')
  shapes = _SHAPE.findall(instruction.type)
  if instruction.opcode != kind and kind != 'all-reduce':
    operands = len(instruction.operands)
    shapes = shapes[operands : 2 * operands]  # an asynchronous start has the type (operands, results, ...)
  size = sum(_num_bytes(dtype, dims) for dtype, dims, _ in shapes)
  return Collective(kind, '+'.join(sorted({dtype for dtype, _, _ in shapes})), size, times, is_open)


def _is_free(instruction: _Instruction) -> bool:
  opcode = instruction.opcode
  return opcode in FREE or opcode.endswith('-done') or any(f'"{x}"' in instruction.rest for x in FREE_TARGETS)


def _hbm_arrays(instruction: _Instruction, types: dict[str, str]) -> list[tuple[str, int]]:
  """Results and operands of an instruction, without those in on-chip memory, each with its bytes."""
  if instruction.opcode in ('copy-start', 'slice-start'):  # of (result, operand, ...) the smaller one is what moves
    ends = [shape for shape in _SHAPE.findall(instruction.type) if shape[1] or 'S(2)' not in shape[2]]
    dtype, dims, _ = min(ends, key=lambda end: _num_bytes(*end[:2]))
    return [(f'{dtype}[{dims}]', _num_bytes(dtype, dims)) for _, _, layout in ends if _in_hbm(layout)]
  result = instruction.type
  if re.search('custom_call_target="__(cublas|cudnn)', instruction.rest):
    result = re.sub(r'\b[su]8\[\d+\]', '', result)  # the library's scratch memory, which need not leave the cache
  touched = _SHAPE.findall(' '.join([result, *(types.get(name, '') for name in instruction.operands)]))
  return [(f'{dtype}[{dims}]', _num_bytes(dtype, dims)) for dtype, dims, layout in touched if _in_hbm(layout)]


def _in_hbm(layout: str) -> bool:
  return re.search(r'S\([1-9]', layout) is None


def _num_bytes(dtype: str, dims: str) -> int:
  """Bytes of an array such as bf16[128,197]; layouts may pad it, which is not counted."""
  bits = re.search(r'\d+', dtype)
  return math.prod(int(size) for size in dims.split(',') if size) * (int(bits[0]) if bits else 8) // 8
