"""verl: its entry point, and the real function that makes the FSDP engine's LoRA model."""

CODE = """
import sys
from types import SimpleNamespace
import verl
from transformers import AutoModelForCausalLM
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

config = {"lora_adapter_path": None, "lora_rank": 4, "lora_alpha": 8, "target_parameters": None}
config |= {"target_modules": "all-linear", "exclude_modules": None, "use_shm": False}
engine = SimpleNamespace(model_config=SimpleNamespace(**config))
model = FSDPEngine._build_lora_module(engine, AutoModelForCausalLM.from_pretrained(sys.argv[1]))
print({type(m).__module__ for m in model.modules() if hasattr(m, "lora_A")})
"""


def test_the_engine_s_layers_are_fast_only_with_the_variable(tiny, run):
    printed = run("-c", CODE, tiny / "model", FASTLORA="1")
    assert "fastlora: 14 of 14 layers fast" in printed
    assert printed.splitlines()[-1] == "{'fastlora.peft.layer'}"
    assert run("-c", CODE, tiny / "model").splitlines()[-1] == "{'peft.tuners.lora.layer'}"
