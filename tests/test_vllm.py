"""``MergedSampling`` where vLLM samples: TRL's own synchronization, with stand-ins for vLLM.

The stand-ins keep what TRL sends.  TRL comes with the extra ``recipes``: ``make recipes``.
"""

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from marks import pairwise
from models import randomize, tiny_llama
from pages import tiny_tokenizer
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner
from peft_models import adapted
from torch import Tensor, nn
from vendor_layers import BITSANDBYTES

import fastlora
from fastlora.trainer import MergedSampling

pytest.importorskip("trl", reason="the synchronization is TRL's")
generation = pytest.importorskip("trl.generation.vllm_generation", reason="TRL 1.16 has it")

METHODS = ("merge_adapter", "unmerge_adapter")
ARGUMENTS = SimpleNamespace(use_vllm=True)
SAMPLES = [[5, 6, 7, 8], [9, 8, 7, 6]]


class Receiver:
    """What TRL sends: for each synchronization, the tensors by name, in order."""

    def __init__(self, *_: Any, **settings: Any) -> None:
        self.sent, self.now = [], {}

    def take(self, name: str, tensor: Tensor) -> None:
        assert name not in self.now
        self.now[name] = tensor.clone()

    def reset_prefix_cache(self) -> None:
        self.sent.append(self.now)
        self.now = {}


class Client(Receiver):
    """In place of ``trl.generation.vllm_client.VLLMClient``, without a server."""

    def init_communicator(self, device: torch.device) -> None: ...

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata: list, named: Any) -> None:
        for (name, dtype, shape), (sent, tensor) in zip(metadata, named, strict=True):
            facts = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
            assert (name, dtype, shape) == (sent, *facts)
            self.take(sent, tensor)

    def generate(self, prompts: list, n: int, **settings: Any) -> dict[str, list]:
        found = SAMPLES * (n * len(prompts) // 2)
        logprobs = [[[-1.0] for _ in words] for words in found]
        given = {"prompt_ids": prompts, "completion_ids": found, "logprobs": logprobs}
        return given | {"logprob_token_ids": [[[word] for word in words] for words in found]}


class LLM(Receiver):
    """In place of ``vllm.LLM``: the engine, its executor, its worker and its model are one."""

    def __getattr__(self, name: str) -> Any:
        if name in ("llm_engine", "model_executor", "driver_worker", "model_runner", "model"):
            return self
        raise AttributeError(name)

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            self.take(name, tensor)

    def generate(self, prompts: list, sampling_params: Any, use_tqdm: bool) -> list:
        sampled = SimpleNamespace(rank=1, logprob=-1.0)
        found = [
            SimpleNamespace(token_ids=words, logprobs=[{word: sampled} for word in words])
            for words in SAMPLES * len(prompts)
        ]
        n = sampling_params.n
        return [
            SimpleNamespace(prompt_token_ids=[3, 4], outputs=found[n * i : n * (i + 1)])
            for i in range(len(prompts))
        ]


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """The modules of TRL see the stand-ins in place of vLLM."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # TRL sets them
        monkeypatch.delenv(name)
    online = importlib.import_module("trl.experimental.online_dpo.online_dpo_trainer")
    for module in (generation, online):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)
        for name, stand_in in (("VLLMClient", Client), ("LLM", LLM)):
            monkeypatch.setattr(module, name, stand_in, raising=False)
        monkeypatch.setattr(module, "SamplingParams", SimpleNamespace, raising=False)


def synchronizer(model: nn.Module, mode: str) -> tuple[Any, Receiver]:
    """TRL's object that sends the weights, and where they arrive."""
    made = generation.VLLMGeneration(model, accelerate.Accelerator(cpu=True), None, mode)
    return made, made.vllm_client if mode == "server" else made.llm


def by_peft(model: nn.Module) -> dict[str, Tensor]:
    """What TRL sends after PEFT's own merge of a copy of the model."""
    copied = copy.deepcopy(model)
    for name in METHODS:
        vars(copied.base_model).pop(name, None)
    made, received = synchronizer(copied, "colocate")
    made.sync_weights()
    return received.sent[0]


def assert_equal(sent: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [*sent] == [*expected]
    for name, tensor in expected.items():
        assert sent[name].dtype == tensor.dtype, name
        assert torch.equal(sent[name], tensor), name


def begin(model: nn.Module, **settings: Any) -> MergedSampling:
    sampling = MergedSampling(**settings)
    sampling.on_train_begin(ARGUMENTS, None, None, model=model)
    return sampling


def bits(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Every parameter that isn't trained: the object, and its numbers."""
    return [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]


def assert_restored(model: nn.Module, before: list[tuple[nn.Parameter, Tensor]]) -> None:
    now = [p for p in model.parameters() if not p.requires_grad]
    for found, (parameter, numbers) in zip(now, before, strict=True):
        assert found is parameter
        assert torch.equal(found, numbers)
    assert not any(getattr(module, "merged", False) for module in model.modules())


def nf4() -> nn.Module:
    """A Llama whose linear layers are bitsandbytes', but for the head."""
    model = tiny_llama()
    fastlora.pack(model, "nf4", modules=r"model\.layers.*_proj")
    model.is_loaded_in_4bit = True  # PEFT reads it
    return model


def mixture() -> nn.Module:
    moe_models = pytest.importorskip("moe_models")
    return moe_models.base_model("mixtral", vocab_size=40)


def bfloat16(**settings: Any) -> nn.Module:
    return tiny_llama(torch.bfloat16, **settings)


ALL = {"target_modules": "all-linear"}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
KINDS = {
    "lora": lambda: adapted(bfloat16(), **ALL),
    "16-bit-adapters": lambda: adapted(bfloat16(), **ALL).bfloat16(),
    "dora": lambda: adapted(bfloat16(), use_dora=True, **ALL),
    "bias": lambda: adapted(
        bfloat16(attention_bias=True), target_modules=["q_proj", "o_proj"], lora_bias=True
    ),
    "several": lambda: adapted(bfloat16(), ("default", "other"), **ALL),
    "several-dora": lambda: adapted(bfloat16(), ("default", "other"), use_dora=True, **ALL),
    "embedding-and-head": lambda: adapted(
        bfloat16(), target_modules=["embed_tokens", "q_proj", "lm_head"]
    ),
    "tied-and-not-adapted": lambda: adapted(bfloat16(tie_word_embeddings=True), **ALL),
    "modules-to-save": lambda: adapted(
        bfloat16(), target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "experts": lambda: adapted(
        mixture().bfloat16(), target_modules=["q_proj"], target_parameters=PARAMETERS
    ),
}


@pytest.mark.filterwarnings("ignore")
@pairwise(
    {
        "name": {name: name for name in KINDS},
        "optimized": [False, True],
        "mode": ["server", "colocate"],
        "keep": ["corrections", "device", "cpu"],
    }
)
def test_names_and_values_are_peft_s_and_the_original_bits_return(name, optimized, mode, keep):
    model = KINDS[name]()
    if optimized:
        fastlora.optimize(model)
    before, expected = bits(model), by_peft(model)
    sampling = begin(model, keep=keep)
    made, received = synchronizer(model, mode)
    for _ in range(2):
        made.sync_weights()
        assert_equal(received.sent.pop(), expected)
        assert_restored(model, before)
    randomize(model, 0.1)
    made.sync_weights()
    assert_equal(received.sent.pop(), by_peft(model))
    sampling.put_back()
    assert_restored(model, before)
    for method in METHODS:
        assert getattr(model, method).__func__ is getattr(BaseTuner, method)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not BITSANDBYTES, reason="bitsandbytes isn't installed")
def test_a_packed_base_is_sent_dense_and_its_bits_return():
    model = adapted(nf4(), **ALL)
    before, names = bits(model), by_peft(model).keys()
    sampling = begin(model, keep="corrections")
    made, received = synchronizer(model, "server")
    made.sync_weights()
    sent = received.sent.pop()
    assert sent.keys() == names
    assert all(tensor.is_floating_point() for tensor in sent.values())
    assert_restored(model, before)
    sampling.put_back()


TRAINERS = {  # the module, the trainer's name, vLLM's mode, gradient checkpointing
    "grpo": ("trl.trainer.grpo_trainer", "GRPO", "server", False),
    "rloo": ("trl.trainer.rloo_trainer", "RLOO", "colocate", True),
    "online-dpo": ("trl.experimental.online_dpo", "OnlineDPO", "colocate", False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRAINERS)
def test_trl_s_trainers_send_peft_s_merge_in_each_step(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="TRL's trainers read datasets")
    place, kind, mode, checkpointing = TRAINERS[name]
    trl = importlib.import_module(place)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-1}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    settings |= {"use_vllm": True, "vllm_mode": mode, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"gradient_checkpointing": checkpointing, "output_dir": str(tmp_path)}
    lengths = {"max_new_tokens": 4} if kind == "OnlineDPO" else {"max_completion_length": 4}
    if kind != "OnlineDPO":
        lengths["num_generations"] = 2
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    base = bfloat16(vocab_size=len(tokenizer))
    trainer = getattr(trl, f"{kind}Trainer")(
        model=base,
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=getattr(trl, f"{kind}Config")(**settings | lengths),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["one two"] * 4}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM", **ALL),
    )
    model = trainer.model
    fastlora.optimize(model)
    owner = getattr(trainer, "vllm_generation", trainer)
    received = owner.vllm_client if mode == "server" else owner.llm
    before, checked = bits(model), []
    reset = received.reset_prefix_cache

    def check() -> None:
        assert_restored(model, before)
        checked.append(by_peft(model))
        assert_equal(received.now, checked[-1])
        reset()

    received.reset_prefix_cache = check
    trainer.add_callback(MergedSampling())
    trainer.train()
    assert_restored(model, before)
    assert len(checked) == 2
    assert not all(torch.equal(t, checked[0][name]) for name, t in checked[1].items())
    for method in METHODS:
        assert getattr(model, method).__func__ is getattr(BaseTuner, method)
