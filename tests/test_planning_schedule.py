"""The reader of XLA's scheduled text, on programs written by hand and counted by hand."""

from t2t_vit_jax.planning.schedule import Collective, Operation, read_operations, read_schedule

HEAD = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def cycles(number):
  return f'backend_config={{"window_config":{{"estimated_cycles":"{number}"}}}}'


def loop(condition_root):
  """A program with a loop; each turn has 10 cycles and one all-reduce of 8 x 16 bfloat16 values: 256 bytes."""
  return f"""{HEAD}
%body (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {{
  %state = (s32[]{{:T(128)}}, bf16[8,16]{{1,0:T(8,128)(2,1)S(1)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %x = bf16[8,16]{{1,0:T(8,128)(2,1)S(1)}} get-tuple-element(%state), index=1
  %all-reduce.1 = bf16[8,16]{{1,0:T(8,128)(2,1)S(1)}} all-reduce(%x), channel_id=1, to_apply=%add, {cycles(7)}
  %next = s32[]{{:T(128)S(1)}} fusion(%i), kind=kLoop, calls=%add, {cycles(3)}
  ROOT %result = (s32[]{{:T(128)}}, bf16[8,16]{{1,0:T(8,128)(2,1)S(1)}}) tuple(%next, %all-reduce.1)
}}

%condition (state.1: (s32[], bf16[8,16])) -> pred[] {{
  %end = s32[]{{:T(128)}} constant(5)
  %state.1 = (s32[]{{:T(128)}}, bf16[8,16]{{1,0:T(8,128)(2,1)S(1)}}) parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%state.1), index=0
  {condition_root}
}}

ENTRY %main (x.1: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {{
  %x.1 = (s32[]{{:T(128)}}, bf16[8,16]{{1,0:T(8,128)(2,1)S(1)}}) parameter(0)
  ROOT %while.1 = (s32[], /*index=1*/bf16[8,16]) while(%x.1), condition=%condition, body=%body
}}
"""


def test_a_counted_loop_counts_as_often_as_it_runs():
  schedule = read_schedule(loop('ROOT %lt = pred[]{:T(512)} compare(%i.1, %end), direction=LT'))
  assert schedule.cycles == 5 * (7 + 3)
  assert schedule.collectives == (Collective('all-reduce', 'bf16', 256, 5, in_open_loop=False),)
  assert schedule.open_loops == 0
  # Of each turn only the counter, 4 bytes, is read from main memory; of the condition's it is read twice, with the end,
  # and the answer of one byte is written.
  assert schedule.hbm_bytes == 5 * 4 + 5 * (4 + 4 + 1)


def test_a_loop_of_unknown_length_counts_once_and_is_said():
  schedule = read_schedule(loop('ROOT %unequal = pred[]{:T(512)S(1)} compare(%i.1, %end), direction=NE'))
  assert schedule.cycles == 7 + 3
  assert schedule.collectives == (Collective('all-reduce', 'bf16', 256, 1, in_open_loop=True),)
  assert schedule.open_loops == 1


def test_a_length_that_the_compiler_noted():
  text = loop('ROOT %unequal = pred[]{:T(512)S(1)} compare(%i.1, %end), direction=NE')
  noted = text.replace('body=%body\n', 'body=%body, backend_config={"known_trip_count":{"n":"12"}}\n')
  assert read_schedule(noted).cycles == 12 * (7 + 3)


def test_traffic_of_main_memory():
  schedule = read_schedule(f"""{HEAD}
ENTRY %main (x: f32[1024,8], y: s8[100]) -> f32[1024] {{
  %x = f32[1024,8]{{1,0:T(8,128)}} parameter(0)
  %y = s8[100]{{0:T(512)}} parameter(1)
  %slice-start = ((f32[1024,8]{{1,0:T(8,128)}}), f32[1024,2]{{1,0:T(8,128)S(1)}}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:1024], [0:2]}}
  %slice-done = f32[1024,2]{{1,0:T(8,128)S(1)}} slice-done(%slice-start)
  %joined = f32[1024,2]{{1,0:T(8,128)S(1)}} custom-call(%slice-done), custom_call_target="ConcatBitcast"
  %copy-start = (s8[100]{{0:T(512)S(1)}}, s8[100]{{0:T(512)}}, u32[]{{:S(2)}}) copy-start(%y)
  %copy-done = s8[100]{{0:T(512)S(1)}} copy-done(%copy-start)
  ROOT %fusion = f32[1024]{{0:T(1024)}} fusion(%joined, %copy-done, %x), kind=kLoop, calls=%add, {cycles(1825)}
}}
""")  # noqa: E501
  # A quarter of x, y, then all of x and the result; what is in on-chip memory, S(1), costs nothing.
  assert schedule.hbm_bytes == 1024 * 2 * 4 + 100 + 1024 * 8 * 4 + 1024 * 4
  assert schedule.cycles == 1825


def test_a_transfer_in_several_fusions_counts_once():
  gather = 'bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, dimensions={0}'
  schedule = read_schedule(f"""{HEAD}
%first (p: bf16[128,128]) -> bf16[256,128] {{
  %p = bf16[128,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %all-gather.1 = {gather}
}}

%second (p: bf16[128,128]) -> bf16[256,128] {{
  %p = bf16[128,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %all-gather.2 = {gather}
}}

ENTRY %main (x: bf16[128,128]) -> bf16[256,128] {{
  %x = bf16[128,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  %start = bf16[256,128]{{1,0:T(8,128)(2,1)}} fusion(%x), kind=kCustom, calls=%first
  %end = bf16[256,128]{{1,0:T(8,128)(2,1)}} fusion(%x), kind=kCustom, calls=%second
  %permute = (u8[10]{{0}}, u8[10]{{0}}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start(%x), channel_id=4
  ROOT %all-reduce.9 = (bf16[256,128]{{1,0}}, f32[2]{{0}}) all-reduce(%start, %x), channel_id=5, to_apply=%add
}}
""")
  assert schedule.collectives == (
    Collective('all-gather', 'bf16', 256 * 128 * 2, 1, in_open_loop=False),
    Collective('collective-permute', 'u8', 10, 1, in_open_loop=False),
    Collective('all-reduce', 'bf16+f32', 256 * 128 * 2 + 8, 1, in_open_loop=False),
  )


def test_a_transfer_of_several_arrays_counts_its_results():
  schedule = read_schedule(f"""{HEAD}
ENTRY %main (x: f32[16], y: bf16[8]) -> (f32[64], bf16[32]) {{
  %x = f32[16]{{0:T(128)}} parameter(0)
  %y = bf16[8]{{0:T(128)}} parameter(1)
  %start = ((f32[16]{{0:T(128)}}, bf16[8]{{0:T(128)}}), (f32[64]{{0:T(128)}}, bf16[32]{{0:T(128)}})) all-gather-start(%x, %y), channel_id=1
  ROOT %done = (f32[64]{{0:T(128)}}, bf16[32]{{0:T(128)}}) all-gather-done(%start)
}}
""")  # noqa: E501
  assert schedule.collectives == (Collective('all-gather', 'bf16+f32', 64 * 4 + 32 * 2, 1, in_open_loop=False),)


def test_all_branches_count():
  branch = '%{name} (p: f32[]) -> f32[] {{\n  %p = f32[] parameter(0)\n  ROOT %r = f32[] negate(%p), {cycles}\n}}\n'
  branches = [branch.format(name=name, cycles=cycles(number)) for name, number in (('yes', 100), ('no', 20))]
  schedule = read_schedule(f"""{HEAD}
{branches[0]}
{branches[1]}
ENTRY %main (p: pred[], x: f32[]) -> f32[] {{
  %p = pred[] parameter(0)
  %x = f32[] parameter(1)
  ROOT %c = f32[] conditional(%p, %x, %x), branch_computations={{%yes, %no}}
}}
""")
  assert schedule.cycles == 120


def test_a_program_for_gpus():
  """Two kernels in a graph that starts three times, and one of a library, whose scratch memory does not count."""
  text = f"""{HEAD}
%graph (p: bf16[128,64]) -> bf16[128,64] {{
  %p = bf16[128,64]{{1,0}} parameter(0)
  %first = bf16[128,64]{{1,0}} fusion(%p), kind=kLoop, calls=%add, metadata={{op_name="jit(f)/first"}}
  ROOT %second = bf16[128,64]{{1,0}} fusion(%first), kind=kLoop, calls=%add
}}

%body (p.1: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {{
  %p.1 = (s32[], bf16[128,64]{{1,0}}) parameter(0)
  %x = bf16[128,64]{{1,0}} get-tuple-element(%p.1), index=1
  %y = bf16[128,64]{{1,0}} call(%x), to_apply=%graph
  ROOT %next = (s32[], bf16[128,64]{{1,0}}) tuple(%i, %y)
}}

%condition (p.2: (s32[], bf16[128,64])) -> pred[] {{
  ROOT %always = pred[] constant(true)
}}

ENTRY %main (x.1: bf16[128,64], k: bf16[64,32]) -> bf16[128,32] {{
  %x.1 = bf16[128,64]{{1,0}} parameter(0)
  %k = bf16[64,32]{{1,0}} parameter(1)
  %loop = (s32[], bf16[128,64]{{1,0}}) while(%x.1), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %y.1 = bf16[128,64]{{1,0}} get-tuple-element(%loop), index=1
  ROOT %product = (bf16[128,32]{{1,0}}, s8[4194304]{{0}}) custom-call(%y.1, %k), custom_call_target="__cublas$lt$matmul"
}}
"""  # noqa: E501
  schedule = read_schedule(text)
  assert (schedule.cycles, schedule.launches) == (0, 3 * 2 + 1)
  assert schedule.hbm_bytes == 3 * 4 * 128 * 64 * 2 + (128 * 64 + 64 * 32 + 128 * 32) * 2
  product, first, second = read_operations(text)
  assert {(x.hbm_bytes, x.count, x.source) for x in (first, second)} == {
    (3 * 2 * 128 * 64 * 2, 3, 'jit(f)/first'),
    (3 * 2 * 128 * 64 * 2, 3, ''),
  }
  assert (product.name, product.hbm_bytes, product.count) == ('product', 28672, 1)


def test_operations_are_told_with_their_source():
  text = loop('ROOT %lt = pred[]{:T(512)} compare(%i.1, %end), direction=LT')
  text = text.replace('calls=%add, ', 'calls=%add, metadata={op_name="jit(f)/blocks_0/add" stack_frame_id=1}, ')
  assert read_operations(text) == [
    Operation('lt', 'pred[]{:T(512)}', '', 0, 5 * (4 + 4 + 1), 5, {'pred[]': 5, 's32[]': 40}),
    Operation('all-reduce.1', 'bf16[8,16]{1,0:T(8,128)(2,1)S(1)}', '', 5 * 7, 0, 5, {}),
    Operation('next', 's32[]{:T(128)S(1)}', 'jit(f)/blocks_0/add', 5 * 3, 5 * 4, 5, {'s32[]': 20}),
  ]
