"""Writes the tiny models in the layout of huggingface_hub's cache, where tests find them offline.

python -m suites.hub SUITE FOLDER
"""

import argparse
import hashlib
import inspect
import shutil
import sys
import textwrap
from pathlib import Path

from .models import CHAT_TEMPLATE, VOCABULARY, Adapter, Model
from .suite import SUITES, Suite

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def snapshot(hub: Path, name: str, revisions: tuple[str, ...] = ("main",)) -> Path:
    """Make the folder of one repository's files, to which all its revisions point."""
    repository = hub / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    for revision in revisions:
        (repository / "refs" / revision).write_text(commit)
    return folder


def trained_tokenizer():
    """A byte-level BPE tokenizer, trained on the text of two of Python's modules."""
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    text = [inspect.getsource(argparse), inspect.getsource(textwrap)]
    options = {"special_tokens": [*SPECIAL.values(), "<mask>"], "show_progress": False}
    tokenizer.train_from_iterator(text, vocab_size=VOCABULARY, **options)
    return tokenizer


def write_tokenizer(folder: Path, tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    options = {"mask_token": "<mask>", "model_max_length": 100, "chat_template": CHAT_TEMPLATE}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, **SPECIAL, **options
    ).save_pretrained(folder)


def new_model(model: Model):
    import torch
    import transformers

    torch.manual_seed(0)
    architecture = getattr(transformers, model.architecture)
    config = architecture.config_class(**({"vocab_size": VOCABULARY} | model.settings))
    for part in (config, config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            number = getattr(part, name, None)
            if isinstance(number, int) and number >= VOCABULARY:
                setattr(part, name, 2)  # </s>
    return architecture(config).to(getattr(torch, model.dtype))


def write_adapter(folder: Path, adapter: Adapter, base: Model) -> None:
    import peft
    import torch

    model = new_model(base)
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **adapter.settings)
    model = peft.get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = adapter.base
    model.save_pretrained(folder)


def write_pipeline(folder: Path, tokenizer) -> None:
    """A Stable Diffusion pipeline: a text encoder, an autoencoder and a denoiser of two blocks."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4}
    text = CLIPTextConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)
    text.bos_token_id, text.eos_token_id = 0, 2
    files = tokenizer.save_model(str(folder))
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 2}
    attention = {"cross_attention_dim": 32, "attention_head_dim": 4}
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        **blocks,
        **attention,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    autoencoder = diffusers.AutoencoderKL(
        **blocks,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    diffusers.StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(*files, **SPECIAL, model_max_length=77),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def build(suite: Suite, hub: Path) -> None:
    """Write everything into a new folder, which appears when it is complete."""
    part = hub.with_name(hub.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer = trained_tokenizer()
    for name, model in suite.models.items():
        try:
            made = new_model(model)
        except Exception as error:  # an older transformers has another config
            print(f"{name} is left out, so its tests fail: {error}", file=sys.stderr)
            continue
        folder = snapshot(part, name, model.revisions)
        made.save_pretrained(folder)
        write_tokenizer(folder, tokenizer)
    for name, adapter in suite.adapters.items():
        write_adapter(snapshot(part, name), adapter, suite.models[adapter.base])
    for name in suite.pipelines:
        write_pipeline(snapshot(part, name), tokenizer)
    part.rename(hub)


if __name__ == "__main__":
    build(SUITES[sys.argv[1]], Path(sys.argv[2]))
