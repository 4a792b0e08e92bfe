"""The machine that runs PTX, in a process of its own, where Triton compiles."""

import json

import pytest
from process import run_without_interpreter

# What the machine says: of a kernel as it is, in another order, without its waits, with an
# instruction that nobody knows, and of a tensor that is too short.
PROGRAM = """
import json, sys
from tools.machine import compiled, proof
arch = int(sys.argv[1])
compiled.use(arch)
shape = 100, 72, 272, (64, 64, 64), 4
if arch == 80:
    case = proof.product(proof.BF16, "ieee", *shape, 3, "nt")
else:
    case = proof.product_tma(proof.BF16, *shape, "nt")
found = [str(each) for each in case.run().findings]
said = dict(found=found, error=case.error() / case.bound)
first = case.results[0].clone()
case.run(order=1)
said["same bits in another order"] = bool((first == case.results[0]).all())
said["broken"] = {wait: proof.seen(case, proof.without(wait)) for wait in sys.argv[2:]}
try:
    case.run(lambda text: text.replace("ret;", "atom.global.add.u32 %r1, [%rd1], 1; ret;"))
except compiled.Unsupported as error:
    said["unknown"] = str(error)
try:
    x, y = proof.torch.empty(1, 64), proof.torch.empty(1, 64)
    call = dict(x=x, y=y[:, :63], N=64, stride=64, BLOCK=64)
    compiled.run(proof.softmax, (1,), call, {})
except compiled.Fault as error:
    said["fault"] = str(error)
print(json.dumps(said))
"""
WAITS = {
    80: {"barrier": ("RAW", "WAR", "WAW"), "wait for copies": ("in flight",)},
    90: {"wait for TMA": ("fault", "in flight"), "wait for wgmma": ("early", "WAR"),
         "proxy fence": ("no proxy",)},
}  # fmt: skip


@pytest.mark.parametrize("arch", WAITS)
def test_a_right_kernel_is_right_and_a_broken_one_is_seen(arch):
    text = run_without_interpreter("-c", PROGRAM, str(arch), *WAITS[arch])
    said = json.loads(text.splitlines()[-1])
    assert said["found"] == []
    assert said["error"] <= 1
    assert said["same bits in another order"]
    for wait, kinds in WAITS[arch].items():
        assert said["broken"][wait].startswith(kinds), (wait, said["broken"][wait])
    assert "atom.global.add.u32" in said["unknown"]
    assert "store of 4 bytes outside of every tensor: 252 bytes" in said["fault"]
