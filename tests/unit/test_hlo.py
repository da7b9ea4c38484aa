"""The text of a compiled program: its messages and kernels, by kind and place. A few lines of XLA's stand for all."""

import pytest

from esd_jax.planning import hlo
from esd_jax.planning.collectives import Collective, collectives
from esd_jax.planning.hlo import Kernels

MESSAGES = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  ROOT %permuted = f32[8,16]{1,0} collective-permute(%p), source_target_pairs={{0,1}}
}

%region_0.7 (carry: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %gathered = bf16[16,16]{1,0} all-gather(%weight), channel_id=1, dimensions={0}
  %started = (bf16[8,16]{1,0}, bf16[16,16]{1,0}) all-gather-start(%weight), channel_id=2, dimensions={0}
  %ended = bf16[16,16]{1,0} all-gather-done(%started)
  %called = f32[8,16]{1,0} fusion(%p), kind=kLoop, calls=%inner
}

%region_1.8 (carry: (s32[], bf16[8,16])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %loop = (s32[], bf16[8,16]{1,0}) while(%carry), condition=%region_1.8, body=%region_0.7, metadata={op_name="w"}
  ROOT %total = (f32[4,4]{1,0}, f32[]) all-reduce(%x, %y), channel_id=3, to_apply=%add
}
"""


def test_messages_are_counted_by_kind_and_place():
    actual = collectives(hlo.Program(MESSAGES))
    assert actual == (
        Collective("all-gather", True, 2, 2 * 16 * 16 * 2),
        Collective("all-reduce", False, 1, 4 * 4 * 4 + 4),
        Collective("collective-permute", True, 1, 8 * 16 * 4),
    )
    assert str(actual[1]) == "1 all-reduce, outside of loops"


@pytest.mark.parametrize(
    ("started", "size"),
    [
        ("bf16[4,8]{1,0} all-reduce-start(%x)", 64),
        ("(bf16[4,8]{1,0}, f32[]) all-reduce-start(%x, %y)", 68),  # two results, as of old
        ("((bf16[4,8]{1,0}), bf16[4,8]{1,0}) all-reduce-start(%x)", 64),  # the operand, the result
        ("((bf16[4,8]{1,0}, f32[]), (bf16[4,8]{1,0}, f32[])) all-reduce-start(%x, %y)", 68),
        ("(bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)(2,1)S(1)}, u32[], u32[]) all-gather-start(%x)", 256),
        ("((bf16[4,8]{1,0}, f32[2]), (bf16[16,8]{1,0}, f32[8])) all-gather-start(%x, %y)", 288),
    ],
)
def test_what_is_started_counts_by_its_result(started, size):
    (message,) = collectives(hlo.Program(f"ENTRY %main () -> f32[] {{\n  %a = {started}, channel_id=1\n}}"))
    assert message.bytes == size


KERNELS = """HloModule jit_step

%region_2 (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%turned (p: bf16[3,3,4,8]) -> bf16[8,3,3,4] {
  %p = bf16[3,3,4,8]{3,2,1,0} parameter(0)
  ROOT %t = bf16[8,3,3,4]{3,2,1,0} transpose(%p), dimensions={3,0,1,2}
}

%gemm (p: f32[4,8], q: f32[8,2]) -> f32[4,2] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[8,2]{1,0} parameter(1)
  ROOT %d = f32[4,2]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%softmax (p: f32[4,2]) -> bf16[4,2] {
  %p = f32[4,2]{1,0} parameter(0)
  %e = f32[4,2]{1,0} exponential(%p)
  ROOT %c = bf16[4,2]{1,0} convert(%e)
}

%body (carry: (s32[], bf16[1,8,8,4])) -> (s32[], bf16[1,8,8,4]) {
  %x = bf16[1,8,8,4]{3,2,1,0} get-tuple-element(%carry), index=1
  %w = bf16[8,3,3,4]{3,2,1,0} get-tuple-element(%carry), index=2
  %conv = (bf16[1,8,8,8]{3,2,1,0}, u8[4096]{0}) custom-call(%x, %w), custom_call_target="__cudnn$convForward"
  %q = bf16[2,64,2,16]{3,2,1,0} bitcast(%x)
  %a = (bf16[2,64,2,16]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
}

%condition (carry: (s32[], bf16[1,8,8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (w: bf16[3,3,4,8]) -> f32[4] {
  %w = bf16[3,3,4,8]{3,2,1,0} parameter(0)
  %v = bf16[8,3,3,4]{3,2,1,0} fusion(%w), kind=kInput, calls=%turned
  %loop = (s32[], bf16[1,8,8,4]{3,2,1,0}) while(%carry), condition=%condition, body=%body
  %p = f32[4,8]{1,0} parameter(1)
  %q = f32[8,2]{1,0} parameter(2)
  %g = f32[4,2]{1,0} fusion(%p, %q), kind=kCustom, calls=%gemm, backend_config={"kind":"__triton_gemm"}
  %s = bf16[4,2]{1,0} fusion(%g), kind=kLoop, calls=%softmax
  %h = (bf16[4,8]{1,0}, s8[33554432]{0}) custom-call(%s, %b), custom_call_target="__cublas$lt$matmul"
  %dq = (bf16[2,64,2,16]{3,2,1,0}, u8[16]{0}) custom-call(%do), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %r = f32[4]{0} reduce(%g, %zero), dimensions={1}, to_apply=%region_2
}
"""


def test_kernels_are_counted_by_kind_and_place():
    results = {(kernel.kind, kernel.inside): kernel for kernel in hlo.kernels(hlo.Program(KERNELS))}
    kernel, image = 2 * 9 * 4 * 8, 2 * 64 * 4
    assert results["move", False] == Kernels("move", False, 1, 2 * kernel)
    assert results["convolution", True] == Kernels("convolution", True, 1, image + kernel + 2 * image)
    assert results["attention", True].count == 1 and results["attention backward", False].count == 1
    assert results["product", False].count == 2 and results["product", False].float32 == 1  # cuBLAS's is of bfloat16
    assert results["product", False].bytes == 4 * (4 * 8 + 8 * 2 + 4 * 2) + 2 * 4 * 8 + 2 * 4 * 2  # no workspace
    assert results["other", False].count == 2 and results["other", True].count == 1
    assert len(results) == 7
