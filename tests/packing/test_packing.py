"""fastlora.pack packs dense weights in place; fastlora.load_packed loads packed checkpoints."""

import json
import math
import shutil
import sys

import peft
import pytest
import torch
from models import refused
from moe_models import base_model, logits, parameters_of, train
from packed_experts import SIZES, bits_of, dense_model, experts_modules, fp8_model, packed_model
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
from transformers.quantizers.auto import AutoHfQuantizer

import fastlora
from fastlora.formats.packing import pack_weight, packing_error
from fastlora.layers.experts_module import read_module, weight_in

KINDS = {"nf4": "NF4", "mxfp4": "MXFP4", "nvfp4": "NVFP4", "fp8": "float8"}
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def mixture(name: str = "gpt-oss") -> nn.Module:
    torch.manual_seed(0)
    return base_model(name, **SIZES).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt-oss", "mixtral", "nemotron"])
def test_experts_are_packed_in_place_and_train(name, kind):
    model, dense = mixture(name), mixture(name)
    report = fastlora.pack(model, kind)
    names = [n for n, _ in dense.named_parameters() if n.endswith(tuple(parameters_of(name)))]
    assert [weight.name for weight in report.weights] == names
    for record in report.weights:
        owner, _, own = record.name.rpartition(".")
        weight = weight_in(model.get_submodule(owner), own)
        before = dense.get_parameter(record.name)
        before = before.mT if name == "gpt-oss" else before
        assert (record.format, record.before) == (KINDS[kind], before.nbytes)
        assert record.after == sum(tensor.nbytes for tensor in weight.tensors)
        assert record.error == packing_error(before, weight)
        assert 0.005 < record.error < 0.15
    bits = bits_of(model)
    assert report.after == sum(map(len, bits.values())) < report.before / 2
    lines = str(report).splitlines()
    assert len(lines) == len(names) + 2
    assert lines[-1].split()[:2] == [str(len(names)), "weights"]
    assert lines[-1].endswith(f"{100 * max(w.error for w in report.weights):.2f}")
    close(logits(model), logits(dense_model(model, name)))
    config = LoraConfig(target_modules=[], target_parameters=parameters_of(name))
    adapted = fastlora.get_peft_model(model, config)
    first, second, *_ = train(adapted, 2)
    assert second < first
    assert all(torch.equal(one, bits[key]) for key, one in bits_of(adapted.unload()).items())


def test_linear_layers_are_bitsandbytes_s():
    bnb = pytest.importorskip("bitsandbytes")
    model, dense = mixture("qwen3").bfloat16(), mixture("qwen3").bfloat16()
    report = fastlora.pack(model, "nf4", ["experts", "q_proj", "layers.1.self_attn.o_proj"])
    assert len(report.weights) == 7
    for record in report.weights:
        if "self_attn" in record.name:
            layer, own = model.get_submodule(record.name), dense.get_submodule(record.name)
            assert type(layer) is bnb.nn.Linear4bit
            how = {"quant_type": "nf4", "compress_statistics": False}
            theirs = bnb.nn.Params4bit(own.weight.detach(), **how).to("cpu")
            assert torch.equal(layer.weight, theirs)
            assert torch.equal(layer.weight.quant_state.absmax, theirs.quant_state.absmax)
            assert 0.05 < record.error < 0.15
    assert not experts_modules(model)[0]._parameters
    targets = {"target_modules": ["q_proj", "k_proj"], "target_parameters": parameters_of("qwen3")}
    fastlora.get_peft_model(model, LoraConfig(**targets))
    report = fastlora.coverage(model)
    assert (len(report.fast), sum(bool(layer.packed) for layer in report.fast)) == (8, 6)
    assert all(one.isfinite().all() for one in train(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_meta_model_is_packed_by_shape(kind):
    with torch.device("meta"):
        lost = base_model("gpt-oss", **SIZES)
    found, expected = fastlora.pack(lost, kind), fastlora.pack(mixture(), kind)
    assert (found.after, found.before) == (expected.after, expected.before)
    assert all(weight.error is None for weight in found.weights)
    assert all(buffer.is_meta for buffer in lost.buffers())


def _wrap(model: nn.Module) -> None:
    layer = model.model.layers[1]
    layer.__class__ = type("Wrapped", (type(layer), FSDPModule), {})


BEFORE = {  # the change of a model before it is packed, by the case's name
    "adapters": lambda model: fastlora.get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
    "numbers": lambda model: experts_modules(model)[-1].down_proj.data[3, 1, 2].fill_(math.inf),
    "a head": lambda model: model.lm_head.weight.data[5, 1].fill_(math.inf),
    "an int8 head": lambda model: model.lm_head.weight.data[5, 1].fill_(math.inf),
    "no linear": lambda model: fastlora.pack(model, "int8"),
    "again": lambda model: fastlora.pack(model, "nf4"),
    "an int8 layer": lambda model: fastlora.pack(model, "int8"),
    "none": lambda model: fastlora.pack(model, "nf4"),
    "fsdp": _wrap,
    "compiled": lambda model: setattr(model, "lm_head", torch.compile(model.lm_head)),
    "tied": lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight),
}
HEAD = {"kind": "nf4", "modules": ["lm_head"]}
REFUSED = {
    "kind": ({"kind": "int3"}, "'int3', but must be one of nf4, mxfp4, nvfp4, fp8"),
    "nothing": ({"modules": ["experts", "quux"]}, "'quux', which matches no module"),
    "pattern": ({"modules": "quux"}, "'quux', which matches no module: a string is a regular"),
    "neither": ({"modules": ["norm"]}, "a GptOssRMSNorm is neither experts that fastlora knows"),
    "linear": ({"modules": ["experts", "q_proj"]}, "torchao's mxfp4 linear layers"),
    "adapters": ({}, "has an adapter already"),
    "numbers": ({}, r"1\.mlp\.experts\.down_proj can't .* as mxfp4: .*NaN"),
    "a head": (HEAD, "lm_head can.*NaN"),
    "an int8 head": (HEAD | {"kind": "int8"}, "lm_head can't be packed as int8: .*NaN"),
    "no linear": ({"kind": "int8"}, "no dense linear layers.*: it is packed already"),
    "again": ({"modules": ["experts"]}, "packed already"),
    "an int8 layer": ({"kind": "int8", "modules": ["q_proj"]}, "q_proj can.*packed already"),
    "none": ({}, "no dense experts that fastlora knows.*: it is packed already"),
    "fsdp": ({}, r"layers\.1\.mlp\.experts can't be packed: FSDP or DDP has it"),
    "compiled": (HEAD, "lm_head can't be packed: it is compiled, or"),
    "tied": (HEAD, "tied to a module that isn't packed"),
    "a list": ({"kind": ["nf4"]}, "kind is .'nf4'., but must be one of"),
    "a number": ({"modules": 3}, "modules is 3, but must be a list of names"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unpackable_modules_are_refused_and_the_model_is_unchanged(case):
    how, words = REFUSED[case]
    model = mixture()
    BEFORE.get(case, lambda model: None)(model)
    bits = bits_of(model)
    with refused(model, words):
        fastlora.pack(model, **{"kind": "mxfp4"} | how)
    assert bits_of(model).keys() == bits.keys()


def test_blocks_and_packages_that_are_not_there_are_named(monkeypatch):
    odd = base_model("qwen3", moe_intermediate_size=24)
    with refused(odd, r"0\.mlp\.experts\.down_proj can't .* has 24 numbers"):
        fastlora.pack(odd, "mxfp4")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with refused(odd, "q_proj can't be packed as fp8 without torchao", ImportError):
        fastlora.pack(odd, "fp8", ["experts", "q_proj"])
    with pytest.raises(ValueError, match="q_proj can't be packed as int8: it is on meta"):
        fastlora.pack(odd.to("meta"), "int8")
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        fastlora.pack([], "nf4")


@pytest.mark.parametrize(("kind", "is_beyond"), [("mxfp4", True), ("nvfp4", False), ("fp8", False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_that_float16_holds_and_not_once_packed_are_refused(kind, is_beyond, dtype):
    model = mixture("mixtral").to(dtype)
    with torch.no_grad():  # 2¹⁶ is the nearest number of MXFP4
        experts_modules(model)[1].down_proj[2, 3, 5] = 65504 if dtype == torch.float16 else 2e38
        experts_modules(model)[1].down_proj[2, 3, 20] = 64512
    if is_beyond and dtype == torch.float16:
        with refused(model, r"1.mlp.experts.down_proj can't .* beyond 65504"):
            fastlora.pack(model, kind)
        return
    fastlora.pack(model, kind)
    assert weight_in(experts_modules(model)[1], "down_proj").dense(dtype).isfinite().all()


def test_a_checkpoint_beyond_float16_is_refused_by_a_model_of_that_dtype(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "large")
    _put("layers.1.mlp.experts.down_proj_scales", lambda old: old + 20)(folder)
    model = empty(folder, torch.float16)
    with pytest.raises(ValueError, match=r"1\.mlp\.experts\.down_proj can't be MXFP4 in float16"):
        fastlora.load_packed(model, folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    fastlora.load_packed(empty(folder, torch.bfloat16), folder)


def test_weights_that_are_tied_are_packed_together():
    model = mixture("mixtral")
    one, other = experts_modules(model)
    other.down_proj = one.down_proj
    with pytest.raises(ValueError, match="tied to a module that isn't packed"):
        fastlora.pack(model, "fp8", ["0.mlp.experts"])
    fastlora.pack(model, "fp8")
    bits = [bits_of(experts) for experts in (one, other)]
    assert torch.equal(*[each[".down_proj.0"] for each in bits])


# Checkpoints.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder in the layout of transformers' MXFP4 serialization, in several files."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    model = mixture().bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    state = load_file(folder / ONE)
    (folder / ONE).unlink()
    for key in [key for key in state if key.endswith(("gate_up_proj", "down_proj"))]:
        packed, scales = pack_weight(state.pop(key).mT, "mxfp4").tensors
        state |= {f"{key}_blocks": packed.unflatten(2, (-1, 16)), f"{key}_scales": scales}
    places = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
    for name in set(places.values()):
        part = {key: value.contiguous() for key, value in state.items() if places[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dense_of(folder, dtype=torch.float32) -> nn.Module:
    """The model as transformers reads it, with every block dequantized."""
    how = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=dtype)


def empty(folder, dtype=torch.float32, device="meta") -> nn.Module:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    return model.eval()


class Largest(TorchDispatchMode):
    """Records the most bytes of a floating tensor that an operation makes off the meta device."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {memory for memory, _ in floating(args)}
        sizes = [size for memory, size in floating(made) if memory not in given]  # no views
        self.bytes = max([self.bytes, *sizes])
        return made


def floating(tree) -> list[tuple[int, int]]:
    """The address and size of every floating tensor that isn't on the meta device."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    here = [each for each in tensors if each.is_floating_point() and not each.is_meta]
    return [(each.untyped_storage().data_ptr(), each.nbytes) for each in here]


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_checkpoint_is_loaded_without_dense_copies(checkpoint, device, dtype):
    model = empty(checkpoint, dtype, device)
    with Largest() as largest:
        report = fastlora.load_packed(model, checkpoint)
    dense = dense_of(checkpoint, dtype)
    experts = dense.model.layers[0].mlp.experts
    assert largest.bytes < experts.down_proj.nbytes
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    same = dict(dense.named_buffers())
    assert all(torch.equal(own, same[n]) for n, own in model.named_buffers() if n in same)
    for name, own in model.named_parameters():
        assert torch.equal(own, dense.get_parameter(name))
        assert own.dtype == dtype
    if dtype == torch.float32:
        close(logits(model), logits(dense))
    for one, other in zip(experts_modules(model), experts_modules(dense), strict=True):
        for name in read_module(one).names:
            exact = weight_in(one, name).dense(dtype)
            assert torch.equal(exact.mT, getattr(other, name))
    assert report.before == 2 * (experts.gate_up_proj.nbytes + experts.down_proj.nbytes)
    assert report.after == sum(map(len, bits_of(model).values()))
    assert report.others == sum(parameter.nbytes for parameter in model.parameters())
    assert f"read from 2 files in {checkpoint}" in str(report)


def _put(end, how):
    """Replace each tensor whose key ends with ``end``."""

    def change(state):
        for key in [key for key in state if key.endswith(end)]:
            state[key] = how(state[key]).clone()

    return _edit(change)


def _edit(change):
    """A checkpoint in one file, with changed tensors."""

    def make(folder):
        state = {}
        for path in folder.glob("*.safetensors"):
            state |= load_file(path)
            path.unlink()
        (folder / INDEX).unlink()
        change(state)
        save_file(state, folder / ONE)

    return make


def _index(change):
    def make(folder):
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(change(index) or json.dumps(index))

    return make


def _cut(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def _dense(state):
    for key in [key for key in state if key.endswith(("_blocks", "_scales"))]:
        del state[key]


UP = "model.layers.0.mlp.experts.gate_up_proj"
TORN = {
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "doesn't exist: give"),
    "no part": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "doesn't exist: give"),
    "cut": (_cut, "is damaged"),
    "no JSON": (_index(lambda index: "{"), "is not valid JSON"),
    "no map": (_index(lambda index: "[]"), "has no weight_map"),
    "outside": (_index(lambda index: index["weight_map"].update(a="../a")), "has no weight_map"),
    "no scales": (_edit(lambda state: state.pop(UP + "_scales")), f"it lacks {UP}_scales, which"),
    "no norm": (
        _edit(lambda state: state.pop("model.norm.weight")),
        "it lacks model.norm.weight, which the model has",
    ),
    "more": (
        _edit(lambda state: state.update(quux=torch.ones(1))),
        "it has quux, which the model lacks",
    ),
    "shape": (_put("model.norm.weight", lambda old: old[1:]),
              r"norm.weight of shape \(31,\), but the model's is \(32,\)"),
    "blocks": (_put("gate_up_proj_blocks", lambda old: old[:, :2]),
               r"_blocks of shape \(4, 2, 1, 16\), but the model's is \(4, 128, 1, 16\)"),
    "dtype": (_put("_scales", torch.Tensor.char), "_scales of torch.int8, but the model"),
    "codes": (_put("model.norm.weight", lambda old: old.to(torch.float8_e4m3fn)),
              "norm.weight of torch.float8_e4m3fn, but the model's is torch.float32"),
    "dense": (_edit(_dense), "has no packed weights of this model"),
}  # fmt: skip


@pytest.mark.parametrize("case", TORN)
def test_a_torn_checkpoint_is_refused_and_the_model_stays(checkpoint, tmp_path, case):
    tear, words = TORN[case]
    folder = shutil.copytree(checkpoint, tmp_path / "torn")
    model = empty(checkpoint, device="cpu")
    tear(folder)
    with refused(model, words, (ValueError, FileNotFoundError)):
        fastlora.load_packed(model, folder)


def save_packed(folder, kind) -> None:
    """Save a checkpoint with experts and linear layers packed in this kind."""
    pytest.importorskip({"nf4": "bitsandbytes", "fp8": "torchao", "int8": "torch"}[kind])
    packed = mixture("qwen3")
    fastlora.pack(packed, kind, ["experts", "q_proj"])
    packed.save_pretrained(folder)


LAYER = "model.layers.1.self_attn.q_proj"
CUT = {  # the kind, the change of the checkpoint, and the error
    "nf4": (
        "nf4",
        lambda state: state.update({f"{LAYER}.weight.absmax": torch.ones(1)}),
        rf"{LAYER} can't be loaded: .* broken",
    ),
    "fp8": (
        "fp8",
        lambda state: state.pop(f"{LAYER}._weight_scale"),
        rf"the file has only {LAYER}\._weight_qdata of",
    ),
    "int8": (
        "int8",
        lambda state: state.pop(f"{LAYER}.scale"),
        rf"the file has only {LAYER}\.codes of",
    ),
    "int8-codes": (
        "int8",
        lambda state: state.update({f"{LAYER}.codes": torch.ones(4, 32).byte()}),
        rf"{LAYER} can't be loaded: its int8 weight is broken",
    ),
    "int8-scale": (
        "int8",
        lambda state: state.update({f"{LAYER}.scale": torch.ones(4).byte()}),
        rf"{LAYER} can't be loaded: its int8 weight is broken",
    ),
    "int8-nan": (
        "int8",
        lambda state: state[f"{LAYER}.scale"].view(torch.float32)[3:4].fill_(torch.nan),
        rf"{LAYER} can't be packed: the weight has infinities or NaN",
    ),
}


@pytest.mark.parametrize(("kind", "change", "words"), CUT.values(), ids=CUT)
def test_a_linear_layer_whose_tensors_are_cut_is_refused_and_the_model_stays(
    kind, change, words, tmp_path
):
    save_packed(tmp_path, kind)
    state = load_file(tmp_path / ONE)
    with safe_open(tmp_path / ONE, "pt") as file:
        about = file.metadata()
    change(state)
    save_file(state, tmp_path / ONE, about)
    model = empty(tmp_path, device="cpu")
    with refused(model, words):
        fastlora.load_packed(model, tmp_path)


def test_a_failing_quantizer_config_leaves_the_model_unchanged(tmp_path, monkeypatch):
    save_packed(tmp_path, "nf4")
    model = empty(tmp_path, device="cpu")

    def fail(config):
        raise ImportError("no accelerate")

    monkeypatch.setattr(AutoHfQuantizer, "from_config", fail)
    with refused(model, "no accelerate", ImportError):
        fastlora.pack(model, "nf4", ["experts", "q_proj"])
    with refused(model, "no accelerate", ImportError):
        fastlora.load_packed(model, tmp_path)


def test_buffers_and_models_that_don_t_fit_are_refused(checkpoint):
    model = empty(checkpoint)
    model.model.norm.register_buffer("odd", torch.ones(2, device="meta"), persistent=False)
    with pytest.raises(
        ValueError, match=r"model\.norm's odd is on meta, checkpoints don't hold it"
    ):
        fastlora.load_packed(model, checkpoint)
    assert all(parameter.is_meta for parameter in model.parameters())
    model = empty(checkpoint)
    fastlora.load_packed(model, checkpoint)
    expected = logits(model)
    fastlora.load_packed(model, checkpoint)  # a packed model is packed anew
    assert torch.equal(logits(model), expected)
    fastlora.get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has an adapter already"):
        fastlora.load_packed(model, checkpoint)
    with pytest.raises(ValueError, match=r"doesn.t fit the model: it lacks .*; it has "):
        fastlora.load_packed(mixture("qwen3"), checkpoint)
    with pytest.raises(ValueError, match="has no packed weights of this model"):
        fastlora.load_packed(nn.Linear(2, 2), checkpoint)
    with pytest.raises(TypeError, match="folder is"):
        fastlora.load_packed(mixture(), 3)


def test_a_tied_head_stays_tied(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    _edit(lambda state: state.pop("lm_head.weight"))(folder)
    model = empty(folder)
    fastlora.load_packed(model, folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    close(logits(model), logits(dense_of(folder)))


def test_the_report_for_peft_explains_packed_experts():
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        model = peft.get_peft_model(packed_model("qwen3", "mxfp4"), config)
    report = fastlora.coverage(fastlora.optimize(model))
    assert len(report.fast) == 2
    assert "2 modules of experts are packed: PEFT's target_parameters passes" in str(report)
    model = peft.get_peft_model(fp8_model(), config)  # PEFT has given these experts adapters
    assert not fastlora.coverage(fastlora.optimize(model)).not_fast
