"""fastlora.tune with times given by the test: its choice, its file, and no other changes."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from marks import DEVICE
from models import Mlp, adapt, assert_untouched, snapshot, tiny_llama
from process import run_python

import fastlora
from fastlora import tuning
from fastlora.__main__ import main
from fastlora.backends.triton import measured, verification
from fastlora.doctor import examine
from fastlora.kernels import launchers as kernels
from fastlora.kernels import plan, replay, target
from fastlora.kernels.plan import FUSED, IN_PLACE, Plan, Row, plan_for, use_rows

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter stands in for a GPU")
GPU = "A GPU"
ROWS, IN, OUT, R = 40, 24, 32, 4
PRODUCTS = [f"y {ROWS}x{IN}x{OUT}, r {R}, float32", f"dx {ROWS}x{IN}x{OUT}, r {R}, float32"]


def device(name):
    return replace(target.TARGETS["interpreter"], device=name)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """Simulates a named device with the interpreter, and a user without tuning files."""
    monkeypatch.setattr(target, "_of_cpu", device(GPU))
    monkeypatch.setattr(measured, "_rows", {})
    monkeypatch.setattr(replay, "calls", {})
    monkeypatch.setattr(tuning, "_MOST_TILES", 2)
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    with fastlora.use_backend("triton"):
        yield
    use_rows(())


@pytest.fixture
def timed(monkeypatch):
    """The plans that were timed and how often; ``of(plan)`` is the time of each."""
    found = SimpleNamespace(steps=[], rounds=[], of=lambda plan: 0.5 if plan == IN_PLACE else 1.0)

    def medians(clock, steps, rounds):
        if rounds == 1:  # the warm-up
            found.steps.append(list(steps))
        else:
            found.rounds.append(rounds)
        return {name: found.of(name) for name in steps}

    monkeypatch.setattr(tuning, "medians", medians)
    return found


@pytest.fixture(params=[verification.OFF, verification.FIRST])
def mode(request, monkeypatch):
    """When the results of new kernels are compared."""
    monkeypatch.setattr(verification, "_CHOSEN", request.param)
    monkeypatch.setattr(verification, "_records", {})
    monkeypatch.setattr(verification, "REPEATS", 2)
    return request.param


def tuned(p=0.0, **settings):
    linear = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    model = adapt(linear, r=R, lora_dropout=p, target_modules=["0"])
    return fastlora.tune(model, ROWS, **{"progress": False} | settings)


def planned(backward=False, m=ROWS, name=GPU):
    """The plan of a call of these sizes on this device."""
    n, k = (IN, OUT) if backward else (OUT, IN)
    with target.use_target(device(name)):
        return plan_for(torch.empty(m, k), n, k, [R], "ieee", backward=backward)


def files(folder):
    return {path.name: path.read_text() for path in folder.rglob("*.json")}


def resolved(monkeypatch, change=None):
    """For each new kind of call: the plan that it is captured with, and its kernels' identities.

    ``change`` changes the results under a plan, or raises an error.
    """
    real, found = kernels.capture_call, []

    def capture(*call):
        forced, made = plan.forced, real(*call)
        found.append((forced or plan.edition, made.identities))
        if change is None:
            return made
        return made._replace(replay=lambda *args: change(forced, made.replay(*args)))

    monkeypatch.setattr(kernels, "capture_call", capture)
    return found


def test_the_fastest_plan_is_written_and_the_next_process_goes_by_it(timed, tmp_path):
    timed.of = lambda plan: 0.5 if plan == IN_PLACE else 1.0
    found = tuned()
    assert [line.product for line in found.lines] == PRODUCTS
    for line in found.lines:
        assert (line.default, line.best) == ("fused", "in place")
        assert (line.seconds, line.default_seconds) == (0.5, 1.0)
    assert planned() == planned(backward=True) == planned(m=2 * ROWS) == IN_PLACE
    assert planned(m=8 * ROWS) == planned(name="Another") == FUSED
    assert found.path == str(tmp_path / "tuning" / "A-GPU.json")
    words = [" ".join(line.split()) for line in str(found).splitlines()]
    assert f"{PRODUCTS[0]} fused in place 500.000 0.500" in words
    assert str(found).endswith(f"written to {found.path}")
    code = f"""if True:
        import torch
        from dataclasses import replace
        from fastlora.backends import triton
        from fastlora.kernels import target
        from fastlora.kernels.plan import plan_for
        for name in ("{GPU}", "Another"):
            with target.use_target(replace(target.TARGETS["interpreter"], device=name)):
                print(plan_for(torch.empty({ROWS}, {IN}), {OUT}, {IN}, [{R}], "ieee").fused)"""
    assert run_python("-c", code, TRITON_INTERPRET="1").split() == ["False", "True"]


def test_the_fastest_tiles_of_each_direction_are_used_by_calls_that_ran_before(timed, monkeypatch):
    x, layer = torch.randn(ROWS, IN, requires_grad=True), fastlora.LoRALinear(IN, OUT, r=R)
    kinds = resolved(monkeypatch)

    def identities():
        before = len(kinds)
        layer(x).sum().backward()
        return [identity for _, identity in kinds[before:]]

    first = identities()
    assert identities() == []
    # Make another one of the two tiles the fastest in the backward than in the forward.
    timed.of = lambda plan: 0.5 if plan == timed.steps[-1][1 + len(timed.steps)] else 1.0
    found = tuned()
    tiles = [planned().gemm, planned(backward=True).gemm]
    assert tiles == [timed.steps[0][2].gemm, timed.steps[1][3].gemm]
    tiles = ("3 stages, group 2", "2 stages, group 4")
    named = [f"fused, 32x32x16, 4 warps, {each}, descriptors" for each in tiles]
    assert [line.best for line in found.lines] == named
    pairs = zip(first, identities(), strict=True)
    found = [{each.split()[0] for each in before ^ now} for before, now in pairs]
    assert found == [{"gemm_lowrank_few_rows"}, {"gemm_lowrank"}]


def test_a_plan_that_is_hardly_faster_does_not_replace_the_default(timed):
    timed.of = lambda plan: 1.0 if plan == FUSED else 0.995
    assert {line.best for line in tuned().lines} == {"fused"}
    assert planned() == FUSED


def test_a_later_call_adds_to_the_file_and_replaces_what_it_measured_again(timed, tmp_path):
    tuned()
    timed.of = lambda plan: 0.5 if plan == FUSED else 1.0
    tuned(p=0.5)
    tuned()
    ((name, text),) = files(tmp_path).items()
    rows = json.loads(text)["rows"]
    assert sorted((row["masked"], row["backward"]) for row in rows) == [
        (False, False), (False, True), (True, False), (True, True),
    ]  # fmt: skip
    assert {row["plan"]["fused"] for row in rows} == {True}
    assert measured.from_text(text).rows == tuple(map(measured.as_row, rows))
    assert name == "A-GPU.json"


def one_element(results):
    results[0][3, 5] += 2 * results[0].std()


def one_row_unwritten(results):
    new = torch.empty_like(results[0])
    new[1:] = results[0][1:]
    results[0] = new


def the_second_result(results):
    results[-1] = 1.01 * results[-1]


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        (verification.OFF, one_element),
        (verification.OFF, the_second_result),
        (verification.FIRST, one_row_unwritten),
        (verification.FIRST, the_second_result),
    ],
    indirect=["mode"],
)
def test_a_wrong_kernel_never_wins(timed, monkeypatch, mode, change):

    def spoil(plan, results):
        results = list(results)
        if plan and plan.gemm:
            change(results)
        return results

    resolved(monkeypatch, spoil)
    timed.of = lambda plan: 0.1 if plan and plan.gemm else 1.0
    found = tuned()
    assert {line.best for line in found.lines} == {"fused"}
    assert [steps[:2] for steps in timed.steps] == [[IN_PLACE, FUSED]] * 2
    assert len(found.notes) == 4
    said = ("times what rounding explains", "with the same tensors made other bits")
    assert all(any(words in note for words in said) for note in found.notes)
    assert found.notes[0].startswith(f"{PRODUCTS[0]}, fused, 32x32x16, 4 warps, 3 stages, group 2")


def test_plans_that_do_not_compile_are_dropped(timed, monkeypatch, mode, recwarn):
    real = kernels.capture_call

    def capture(*call):
        if plan.forced == FUSED:
            raise RuntimeError("PassManager::run failed")
        return real(*call)

    monkeypatch.setattr(kernels, "capture_call", capture)
    found = tuned()
    assert [FUSED in steps for steps in timed.steps] == [False, False]
    assert {line.default_seconds for line in found.lines} == {None}
    assert "PassManager::run failed" in found.notes[0]
    assert not recwarn.list


def test_a_product_that_nothing_computes_has_no_row(timed, monkeypatch, tmp_path):
    def fails(*call):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernels, "capture_call", fails)
    found = tuned()
    assert (found.lines, found.path, len(found.notes)) == ((), "", 8)
    assert files(tmp_path) == {}


def test_the_time_is_shared_out_and_kept_to(timed, monkeypatch):
    """A product's plans are always measured; tiles only while its share of the time lasts."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(tuning, "monotonic", lambda: clock.now)
    monkeypatch.setattr(tuning, "_MOST_TILES", 8)
    taken = {}

    def spend(plan, results):
        clock.now += 2.0 if plan not in taken else 0.0
        taken[plan] = True
        return results

    resolved(monkeypatch, spend)
    tuned(seconds=20.0)
    tiles = [len([step for step in steps if type(step) is Plan]) for steps in timed.steps]
    # The forward has ten seconds; seven are for trying plans: the two plans and two more tiles.
    assert tiles[0] == 4
    assert timed.rounds[0] == 9
    before = len(timed.steps)
    timed.of = lambda plan: setattr(clock, "now", clock.now + 3.0) or 1.0
    clock.now, limit = 0.0, 4.0
    found = tuned(seconds=limit)
    assert timed.rounds[before:] == [3]
    assert found.notes == (f"{PRODUCTS[1]} wasn't measured: the time was over",)
    assert len(found.lines) == 1


def test_a_first_product_is_measured_by_a_real_clock_although_the_time_ends(monkeypatch):
    looks = iter([0.0, 0.0])  # at the start of the call, and of the first product
    monkeypatch.setattr(tuning, "monotonic", lambda: next(looks, 1.0))
    found = tuned(seconds=1e-3)
    assert [line.product for line in found.lines] == PRODUCTS[:1]
    (line,) = found.lines
    assert min(line.seconds, line.default_seconds) > 0


def test_an_interrupted_call_leaves_all_as_it_was(timed, tmp_path, monkeypatch):
    tuned()
    before, model = files(tmp_path), adapt(tiny_llama(num_hidden_layers=1), r=R)
    model.train()
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    state, grads = (
        snapshot(model),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    )
    random, edition = torch.get_rng_state(), plan.edition

    def interrupt(plan):
        if len(timed.steps) > 3:
            raise KeyboardInterrupt
        return 0.5 if plan == FUSED else 1.0

    timed.of = interrupt
    with pytest.raises(KeyboardInterrupt):
        fastlora.tune(model, ROWS, progress=False)
    assert files(tmp_path) == before
    assert planned() == IN_PLACE
    assert (plan.forced, plan.edition) == (None, edition)
    assert_untouched(model, state)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    for name, gradient in grads.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)


def test_without_a_writable_folder_only_this_process_uses_the_result(timed, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", os.devnull)
    found = tuned()
    assert found.path == ""
    assert found.notes == (
        "/dev/null/tuning/A-GPU.json can't be written: only this process uses it",
    )
    assert planned() == IN_PLACE


TILES = {
    "block_m": 32, "block_n": 32, "block_k": 16, "warps": 4, "stages": 2, "group": 2,
    "descriptors": False,
}  # fmt: skip


def of_tiles(**changes):
    return {"plan": {"fused": True, "gemm": TILES | changes, "unpacks": False}}


@pytest.mark.parametrize(
    ("change", "why_not"),
    [
        ({"triton": "3.5.1"}, f"it is of Triton 3.5.1, and this is {triton.__version__}"),
        ({"rows": 3}, "it can't be read (TypeError"),
        ({"unknown": 1}, "it can't be read (TypeError"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_unusable_file_is_ignored_with_a_reason(change, why_not):
    row = Row(GPU, ROWS, OUT, IN, R, itemsize=4, masked=False, projections=1, plan=IN_PLACE)
    whole = json.loads(measured.as_text(GPU, [row]))
    loaded(json.dumps(whole))
    assert planned() == IN_PLACE
    if not change.keys() & whole.keys():
        change = {"rows": [whole["rows"][0] | change, *whole["rows"][1:]]}
    measured._rows.clear()
    use_rows(())
    path = loaded(json.dumps(whole | change))
    assert planned() == FUSED
    said = measured.described(GPU)
    assert said.startswith(f"{path} isn't used, {why_not}")
    assert said.endswith("python -m fastlora tune makes a new one")


def loaded(text: str) -> Path:
    """Write this text to the device's file and load it, as at the start of a process."""
    path = measured.path_of(GPU)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    measured.load()
    return path


def test_tuning_replaces_a_file_that_is_not_used(timed):
    loaded("{")
    tuned()
    assert planned() == IN_PLACE
    assert measured.described(GPU).startswith("2 products, 20")


def test_a_file_of_another_device_and_tiles_that_do_not_fit_are_passed_over(timed, tmp_path):
    tuned()
    found = json.loads(files(tmp_path)["A-GPU.json"])
    rows = [row | {"device": "Another"} | of_tiles() for row in found["rows"]]
    sent = found | {"device": "Another", "rows": rows}
    (tmp_path / "tuning" / "sent.json").write_text(json.dumps(sent))
    measured.load()
    assert planned() == IN_PLACE
    assert planned(name="Another").gemm.descriptors is False
    assert measured.written("A third") is None


def test_doctor_reports_the_measurements(timed, monkeypatch):
    def said():
        return examine().sections["compiled kernels"]["tuned on cpu"]

    monkeypatch.setattr("fastlora.doctor._self_tests", lambda *_: {})  # self-tests take long
    assert said() == "nothing was measured: python -m fastlora tune"
    path = tuned().path
    assert said().startswith("2 products, 20")
    assert said().endswith(path)
    monkeypatch.setattr(target, "_of_cpu", target.TARGETS["interpreter"])
    assert said() == "not possible: it runs no compiled kernels"


def test_the_command_takes_a_model_and_shows_a_bar(timed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "_MOST_TILES", 0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    tiny_llama(**sizes).config.save_pretrained(tmp_path / "llama")
    options = ("--tokens", "33", "--r", "2", "--dropout", "0.1")
    assert main(["tune", str(tmp_path / "llama"), *options]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == f"on {GPU}"
    assert lines[-1] == f"written to {tmp_path / 'tuning' / 'A-GPU.json'}"
    assert "tuning:" in printed.err
    products = [line.partition("  ")[0] for line in lines[2:-1]]
    assert [each for each in products if each.startswith("dx")] == [
        f"dx 33x{sizes}, bfloat16, dropout"
        for sizes in ("32x32, r 2", "32x16, r 2", "32x48+48, r 2+2", "48x32, r 2")
    ]
    assert len(products) == 8


def test_on_a_cpu_there_is_nothing_to_tune(monkeypatch, tmp_path):
    said = "there is nothing to tune on cpu: it runs no compiled Triton kernels"
    with fastlora.use_backend("torch"):
        assert str(tuned()) == said
    monkeypatch.setattr(target, "_of_cpu", target.TARGETS["interpreter"])
    assert str(tuned()) == said
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"tokens": 0}, "tokens is 0, but must be a whole number of at least 1"),
        ({"dtype": torch.int8}, "dtype is torch.int8, but must be a floating dtype"),
        ({"seconds": 0}, "seconds is 0, but must be a number above 0"),
        ({"progress": 1}, "progress is 1"),
        ({"model": Mlp()}, "this Mlp has no LoRA layers: fastlora.get_peft_model"),
        ({"model": "llama"}, "model is a str, but must be a torch.nn.Module"),
    ],
)
def test_invalid_arguments_are_refused(call, message):
    layer = fastlora.LoRALinear(IN, OUT)
    with pytest.raises((ValueError, TypeError), match=message):
        fastlora.tune(**{"model": layer, "tokens": ROWS} | call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "required: MODEL"),
        ("x --r 0", "r is 0, but the rank must be"),
        ("x --dtype int8", "invalid choice: 'int8'"),
        ("nowhere/at/all", "nowhere/at/all"),
    ],
)
def test_a_wrong_command_is_an_error(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *options.split()])
    assert stop.value.code in (1, 2)
    assert message in capsys.readouterr().err


def test_unsupported_dtypes_are_noted(timed):
    found = fastlora.tune(fastlora.LoRALinear(IN, OUT, dtype=torch.float64), ROWS, progress=False)
    assert found.lines == ()
    assert "wasn't measured: the Triton kernels don't have torch.float64" in found.notes[0]
