"""The PTX emulator of tools/machine, run in a separate process without Triton's interpreter."""

import json

import pytest
from process import run_without_interpreter

# For each architecture: the findings for an unchanged kernel, in another order, without its waits,
# with an unknown instruction, and with a tensor that is too short.
KERNELS = """
import json, sys
from tools.machine import compiled, proof
shape = 100, 72, 272, (64, 64, 64), 4
answers = {}
for arch, waits in json.loads(sys.argv[1]).items():
    compiled.use(int(arch))
    if arch in ("80", "120"):
        case = proof.product(proof.BF16, "ieee", *shape, 3, "nt")
    elif arch == "100":
        case = proof.attention_case(proof.BF16, 100, 64, (64, 64), 4)
    else:
        case = proof.product_tma(proof.BF16, *shape, "nt")
    found = [str(each) for each in case.run().findings if each.kind in compiled.RACES]
    said = answers[arch] = dict(found=found, error=case.error() / case.bound)
    first = case.results[0].clone()
    case.run(order=1)
    said["same bits in another order"] = bool((first == case.results[0]).all())
    said["broken"] = {wait: proof.seen(case, proof.without(wait)) for wait in waits}
    try:
        case.run(lambda text: text.replace("ret;", "atom.global.add.u32 %r1, [%rd1], 1; ret;"))
    except compiled.Unsupported as error:
        said["unknown"] = str(error)
    try:
        # y is the nearest: NaNs of many bits, of which warps make one.
        x, y = proof.torch.empty(1, 64), proof.torch.arange(4096, dtype=proof.torch.int32)
        y = (y + 0x7FC00000).view(proof.torch.float32).view(1, 4096)
        call = dict(x=x, y=y[:, :63], N=64, stride=64, BLOCK=64)
        compiled.run(proof.softmax, (1,), call, {})
    except compiled.Fault as error:
        said["fault"] = str(error)
    call = dict(x=y[:, :2048].view(32, 64)[:2], y=y.view(64, 64)[1:3], N=64, stride=64, BLOCK=64)
    ran = compiled.run(proof.softmax, (2,), call, {})  # the next program's row is written over
    said["races"] = sorted({each.kind for each in ran.findings if each.kind in compiled.RACES})
print(json.dumps(answers))
"""
SHARES = """
import pathlib, tempfile
sys.path.append("tests/support")
from tools.machine import cases, run, table, tritons
found = {"all": cases.names(quick=True), "cards": [*run.CARDS]}
for share in (1, 4, 8):
    asked = run._asked(["--quick", "--share", str(share)])
    found[share] = [[*run.chosen(card, asked)] for card in run.CARDS]
halves = [run._asked(["--quick", "--target", "ci", "--turn", str(i), "2"]) for i in range(2)]
found["two"] = halves[0].target
found["halves"] = [[[*run.chosen(card, half)] for half in halves] for card in halves[0].target]
found["turns"] = [run.card_in_turn(f"{i:040x}") for i in range(7)]
table.RESULTS = pathlib.Path(tempfile.mkdtemp(), "machine.json")
for commit, card in (("a" * 40, "sm_80"), ("a" * 40, "sm_90"), ("b" * 40, "sm_90")):
    table.add("--quick", "3.9.0", commit, {card: {"ok": 2}})
    found[commit[0]] = table.table(json.loads(table.RESULTS.read_text()))
found["ci"] = []
for pinned in tritons.VERSIONS:
    tritons.pinned = lambda: pinned
    found["ci"].append(tritons.versions(["ci"]))
print(json.dumps(found))
"""
# Programs of one warp that store rows of 32 numbers.
INSTRUCTIONS = """
import torch
from tools.machine.memory import Fault, Kernel, Memory
HEAD = '''.visible .entry one(.param .u64 .ptr .global p0) .reqntid 32
{ .reg .b16 %h<3>; .reg .b32 %r<19>; .reg .b64 %rd<9>;
ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
'''
BLACKWELL = '''
cvt.rn.f32.u32 %r2, %r1; mov.b64 %rd4, {%r2, 0f40000000}; mov.b16 %h1, 0x3FC0;
fma.rn.f32x2 %rd5, %rd4, %rd4, %rd4; mov.b64 {%r3, %r4}, %rd5;
add.rn.f32.bf16 %r5, %h1, %r2; fma.rn.f32.bf16 %r6, %h1, %h1, %r2;
redux.sync.max.NaN.f32 %r7, %r2, 0xffffffff;
st.global.b32 [%rd3], %r3; st.global.b32 [%rd3+128], %r4; st.global.b32 [%rd3+256], %r5;
st.global.b32 [%rd3+384], %r6; st.global.b32 [%rd3+512], %r7; ret; }
'''
NANS = '''
mov.b32 %r2, 0x7fc00123; add.rn.f32 %r3, %r2, %r2; mov.b32 %r4, 0xffc00000;
fma.rn.f32 %r5, %r4, %r2, %r2; mov.b16 %h1, 0xFFC1; cvt.f32.bf16 %r6, %h1;
mul.rn.f32 %r7, %r6, %r4; mov.b32 %r8, %r2;
st.global.b32 [%rd3], %r3; st.global.b32 [%rd3+128], %r5; st.global.b32 [%rd3+256], %r7;
st.global.b32 [%rd3+384], %r8; ret; }
'''
TENSOR_MEMORY = '''
mov.u32 %r2, 1024; shl.b32 %r3, %r1, 3; add.u32 %r4, %r3, 1; add.u32 %r5, %r3, 2;
add.u32 %r6, %r3, 3; add.u32 %r7, %r3, 4; add.u32 %r8, %r3, 5; add.u32 %r9, %r3, 6;
add.u32 %r10, %r3, 7;
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2], 32; ld.shared.b32 %r11, [%r2];
tcgen05.st.sync.aligned.32x32b.x8.b32 [%r11], {%r3, %r4, %r5, %r6, %r7, %r8, %r9, %r10};
tcgen05.wait::st.sync.aligned;
tcgen05.ld.sync.aligned.16x256b.x1.b32 {%r12, %r13, %r14, %r15}, [%r11];
tcgen05.wait::ld.sync.aligned;
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r11, 32;
st.global.b32 [%rd3], %r12; st.global.b32 [%rd3+128], %r13; st.global.b32 [%rd3+256], %r14;
st.global.b32 [%rd3+384], %r15; ret; }
'''
def ran(body, dtype, lost=None):
    lines = [line for line in body.split(";") if lost is None or lost not in line]
    out = torch.zeros(5, 32, dtype=dtype)
    kernel = Kernel(HEAD + ";".join(lines), 16)
    result = kernel.launch((1,), out.data_ptr().to_bytes(8, "little"), Memory([out]))
    return out.tolist(), sorted({each.kind for each in result.findings})
found = {"blackwell": ran(BLACKWELL, torch.float32), "nans": ran(NANS, torch.int32)}
for lost in (None, "wait::st", "wait::ld"):
    found[str(lost)] = ran(TENSOR_MEMORY, torch.int32, lost)
try:
    ran(TENSOR_MEMORY, torch.int32, "dealloc")
except Fault as fault:
    found["dealloc"] = str(fault)
print(json.dumps(found))
"""
# One pass over x with the default tiles of sm_90, launched as in a call.
ONE_PASS = """
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.weight_grad import weight_grad
from tools.machine import driver
driver.install("sm_90")
answers = {}
for dtype, precision, count in ((torch.bfloat16, "ieee", 3), (torch.float32, "tf32", 1)):
    x, *us = (torch.randn(160, n).to(dtype) for n in (32, *[64] * count))
    outs, vs = (torch.empty(count, 64, 32).mT, torch.randn(count, 64, 32).mT)
    call = dict(precision=precision, vs=[*vs], low_rank=torch.empty_like(x))
    with driver.use(driver.Session()) as session, intercept(Launch.run):
        weight_grad(x, us, [*outs], **call)
    is_finite = bool(outs.isfinite().all() and call["low_rank"].isfinite().all())
    answers[precision] = {"races": session.races, "is finite": is_finite}
print(json.dumps(answers))
"""
WAITS = {
    80: {"barrier": ("RAW", "WAR", "WAW"), "wait for copies": ("in flight",)},
    90: {"wait at an mbarrier": ("fault", "in flight"), "wait for wgmma": ("early", "WAR"),
         "proxy fence": ("no proxy",)},
    100: {"wait at an mbarrier": ("fault", "RAW", "WAR"), "commit": ("fault",),
          "wait for tensor memory's loads": ("WAR",),
          "wait for tensor memory's stores": ("in flight",), "proxy fence": ("no proxy",)},
    120: {"barrier": ("RAW", "WAR", "WAW"), "wait for copies": ("in flight",)},
}  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> dict[str, dict]:
    """The output of the four programs, run in one process."""
    program = KERNELS + SHARES + INSTRUCTIONS + ONE_PASS
    printed = run_without_interpreter("-c", program, json.dumps(WAITS)).splitlines()
    names = ("kernels", "shares", "instructions", "one pass")
    return dict(zip(names, map(json.loads, printed[-4:]), strict=True))


@pytest.mark.parametrize("arch", WAITS)
def test_a_right_kernel_is_right_and_a_broken_one_is_seen(arch, answers):
    said = answers["kernels"][str(arch)]
    assert said["found"] == []
    assert said["error"] <= 1
    assert said["same bits in another order"]
    for wait, kinds in WAITS[arch].items():
        assert said["broken"][wait].startswith(kinds), (wait, said["broken"][wait])
    assert "atom.global.add.u32" in said["unknown"]
    assert "store of 4 bytes outside of every tensor: 252 bytes" in said["fault"]
    assert said["races"] == ["global race"]


def test_cards_that_share_the_cases_leave_none_out(answers):
    found = answers["shares"]
    assert found["cards"] == [f"sm_{arch}" for arch in (80, 86, 89, 90, 100, 103, 120, 121)]
    for share in (1, 4, 8):
        taken = [name for card in found[str(share)] for name in card]
        assert sorted(taken) == sorted(found["all"] * (8 // share))
    first, *others, newest = found["ci"]  # one list for each Triton that torch pins
    assert first == newest == ["3.6.0", "3.9.0"]
    assert others == [["3.7.1", "3.9.0"], ["3.8.0", "3.9.0"]]


def test_ci_runs_every_case_on_sm_90_and_on_a_card_in_turn(answers):
    """Each case of a card under one of two Tritons."""
    found = answers["shares"]
    assert found["two"][0] == "sm_90"
    assert sorted([*found["turns"], "sm_90"]) == sorted(found["cards"])
    assert found["two"][1] in found["turns"]
    for one, other in found["halves"]:
        assert sorted(one + other) == sorted(found["all"])
        assert min(len(one), len(other)) > len(found["all"]) / 3


def test_results_of_a_commit_come_together_and_replace_those_of_another(answers):
    found = answers["shares"]
    assert found["a"].splitlines()[-1] == "| 3.9.0 | aaaaaaa | 2 | 2 |"
    assert found["b"].splitlines() == [
        "| Triton | commit | sm_90 |",
        "|---|---|---|",
        "| 3.9.0 | bbbbbbb | 2 |",
    ]


def test_one_pass_on_sm_90_multiplies_no_tile_that_is_loaded_over(answers):
    """Three adapters of rank 64 in bfloat16, one in TF32: u is read by two products."""
    for said in answers["one pass"].values():
        assert said == {"races": [], "is finite": True}


def test_float32_operations_give_one_nan_pattern(answers):
    """Otherwise two warps could store different bits of one value; moves keep the bits."""
    (*computed, moved, _), findings = answers["instructions"]["nans"]
    assert computed == [[0x7FFFFFFF] * 32] * 3
    assert moved == [0x7FC00123] * 32
    assert not findings


def test_blackwell_s_instructions_follow_the_ptx_manual(answers):
    """Pairs of float32, sums with 16 bits, the maximum of a warp, and layouts of tensor memory."""
    found = answers["instructions"]
    (pair, other, plus, fused, largest), _ = found["blackwell"]
    lanes = range(32)
    assert (pair, other) == ([n * n + n for n in lanes], [6] * 32)
    assert (plus, fused, largest) == (
        [n + 1.5 for n in lanes],
        [n + 2.25 for n in lanes],
        [31] * 32,
    )
    rows, findings = found["None"]  # row n holds 8 n to 8 n + 7
    assert not findings
    assert rows[0] == [8 * (n // 4) + 2 * (n % 4) for n in lanes]
    assert rows[1:4] == [[n + more for n in rows[0]] for more in (1, 64, 65)]
    assert found["wait::st"][1] == ["in flight"]
    assert found["wait::ld"][1] == ["WAR", "early load"]
    assert "never given back" in found["dealloc"]
