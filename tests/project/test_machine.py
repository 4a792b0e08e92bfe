"""The machine that runs PTX, in a process of its own, where Triton compiles."""

import json

import pytest
from process import run_without_interpreter

# What the machine says of an architecture: of a kernel as it is, in another order, without its
# waits, with an instruction that nobody knows, and of a tensor that is too short.
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
        x, y = proof.torch.empty(1, 64), proof.torch.empty(1, 4096)  # y is the nearest
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
sys.path.append("tests/support")
from tools.machine import cases, run, tritons
found = {"all": cases.names(quick=True), "cards": [*run.CARDS]}
for share in (1, 4, 8):
    asked = run._asked(["--quick", "--share", str(share)])
    found[share] = [[*run.chosen(card, asked)] for card in run.CARDS]
halves = [run._asked(["--quick", "--share", "16", "--turn", str(i), "2"]) for i in range(2)]
found[16] = [[*run.chosen(card, half)] for half in halves for card in run.CARDS]
found["ci"] = []
for pinned in tritons.VERSIONS:
    tritons.pinned = lambda: pinned
    found["ci"].append(tritons.versions(["ci"]))
print(json.dumps(found))
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
    """What the two programs print, as one process.

    What an instruction computes is judged where a kernel has it: `make machine`.
    """
    printed = run_without_interpreter("-c", KERNELS + SHARES, json.dumps(WAITS)).splitlines()
    return dict(zip(("kernels", "shares"), map(json.loads, printed[-2:]), strict=True))


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
    for share in (1, 4, 8, 16):
        taken = [name for card in found[str(share)] for name in card]
        assert sorted(taken) == sorted(found["all"] * max(1, 8 // share))
    first, *others, newest = found["ci"]  # by what torch pins
    assert first == newest == ["3.6.0", "3.9.0"]
    assert others == [["3.7.1", "3.9.0"], ["3.8.0", "3.9.0"]]
