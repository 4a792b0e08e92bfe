"""Train a LoRA of a diffusion transformer as diffusers' recipes do, with fastlora's layers.

    pip install -e '.[recipes]'  # in a clone
    python examples/diffusion.py --model black-forest-labs/FLUX.1-dev --data encoded.pt --out folder

Without --model it trains a tiny Flux with random weights.  --data is a torch file of encoded
pictures: "latents" [n, 16, height / 8, width / 8], "prompt_embeds" [n, tokens, 4096] and "pooled"
[n, 768].
"""

from argparse import ArgumentParser, Namespace

import torch
from diffusers import FluxPipeline
from diffusers import FluxTransformer2DModel as Flux
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import LoraConfig, get_peft_model_state_dict

import fastlora

GPU = torch.cuda.is_available()
TARGETS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out net.0.proj net.2"
TINY = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
TINY |= {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}


def main() -> None:
    options = parse_options()
    device, dtype = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
    transformer, data = load(options, dtype)
    transformer.requires_grad_(False).to(device)
    transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS.split()))
    cast_training_params(transformer)  # the adapter in float32
    fastlora.optimize(transformer)
    print(fastlora.coverage(transformer))
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=1e-4)
    for step in range(1, options.steps + 1):
        chosen = torch.randint(len(data["latents"]), (options.batch,))
        batch = {name: each[chosen].to(device, dtype) for name, each in data.items()}
        loss = flow_loss(transformer, **batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    about = _collate_lora_metadata({"transformer": transformer})  # such as alpha
    FluxPipeline.save_lora_weights(options.out, get_peft_model_state_dict(transformer), **about)


def flow_loss(model, latents, pooled, prompt_embeds) -> torch.Tensor:
    """The flow matching loss: the velocity from picture to noise, at a random time between."""
    noise = torch.randn_like(latents)
    t = torch.sigmoid(torch.randn_like(latents[:, :1, :1, :1]))
    n, _, height, width = shape = latents.shape
    like = latents.device, latents.dtype
    pictures = FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, *like)
    texts = torch.zeros(prompt_embeds.shape[1], 3).to(*like)
    noisy = FluxPipeline._pack_latents((1 - t) * latents + t * noise, *shape)
    guidance = torch.ones(n).to(*like) if model.config.guidance_embeds else None
    inputs = noisy, prompt_embeds, pooled, t.flatten(), pictures, texts, guidance
    velocity = FluxPipeline._pack_latents(noise - latents, *shape)
    return torch.nn.functional.mse_loss(model(*inputs).sample.float(), velocity.float())


def load(options: Namespace, dtype: torch.dtype) -> tuple[torch.nn.Module, dict]:
    if options.model:
        model = Flux.from_pretrained(options.model, subfolder="transformer", torch_dtype=dtype)
        return model, torch.load(options.data)
    sizes = {"latents": (4, 8, 8), "pooled": (32,), "prompt_embeds": (6, 32)}
    model = Flux(**TINY, axes_dims_rope=(4, 6, 6)).to(dtype)
    return model, {name: torch.randn(8, *size) for name, size in sizes.items()}


def parse_options() -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    defaults = {"model": "", "data": "", "out": "out/diffusion", "steps": 100, "batch": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    return parser.parse_args()


if __name__ == "__main__":
    main()
