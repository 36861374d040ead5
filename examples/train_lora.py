"""Trains a small LoRA on a Flux model: the model's own pictures, printed in one ink on cream paper.

python examples/train_lora.py FOLDER ink.safetensors [STEPS]

Replace `pictures` by a function that reads pictures of your own, each with its caption.
"""

import sys
from pathlib import Path

import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps

CAPTIONS = (
    "a red apple", "a rocket", "an octopus", "a pizza", "a ghost", "a cactus", "a robot", "a fox", "a crown",
    "a happy cat", "a mushroom", "a penguin", "a hamburger", "a snowman", "a bee", "a whale",
)  # fmt: skip
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "ff.net.0.proj", "ff.net.2"]
SIZE, WORDS, GUIDANCE = 128, 24, 3.5
"""Pixels of a side, tokens of a prompt, and guidance, as the built-in model has them."""
RANK, BATCH, RATE = 16, 8, 2e-3
INK, PAPER = "#1b2a4a", "#f4ead2"


def pictures(pipe: FluxPipeline) -> list[Image.Image]:
    """What the model is to draw for each caption."""
    drawn = []
    for number, caption in enumerate(CAPTIONS):
        made = pipe(
            caption, height=SIZE, width=SIZE, num_inference_steps=8, guidance_scale=GUIDANCE,
            max_sequence_length=WORDS, generator=torch.Generator().manual_seed(number),
        )  # fmt: skip
        drawn.append(ImageOps.colorize(ImageOps.autocontrast(made.images[0].convert("L")), INK, PAPER))
    return drawn


@torch.no_grad()
def latents(pipe: FluxPipeline, images: list[Image.Image]) -> torch.Tensor:
    """The pictures as the denoiser sees them: (pictures, tokens, channels)."""
    pixels = pipe.image_processor.preprocess(images)
    found = pipe.vae.encode(pixels).latent_dist.mode()
    found = (found - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    packed: torch.Tensor = pipe._pack_latents(found, *found.shape)
    return packed


def train(pipe: FluxPipeline, wanted: torch.Tensor, steps: int) -> None:
    """Flow matching: the adapter learns the way from noise to the wanted pictures."""
    with torch.no_grad():
        text, pooled, text_ids = pipe.encode_prompt(list(CAPTIONS), None, max_sequence_length=WORDS)
        _, image_ids = pipe.prepare_latents(
            1, pipe.transformer.config.in_channels // 4, SIZE, SIZE, wanted.dtype, wanted.device, None
        )
    weights = [weight for weight in pipe.transformer.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, RATE, weight_decay=0.0)
    for step in range(1, steps + 1):
        chosen = torch.randperm(len(wanted))[:BATCH]
        noise, time = torch.randn_like(wanted[chosen]), torch.rand(len(chosen), 1, 1)
        velocity = pipe.transformer(
            hidden_states=wanted[chosen] + time * (noise - wanted[chosen]),
            timestep=time.flatten(),
            guidance=torch.full((len(chosen),), GUIDANCE),
            encoder_hidden_states=text[chosen],
            pooled_projections=pooled[chosen],
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        loss = torch.nn.functional.mse_loss(velocity, noise - wanted[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


def main(model: str, file: str, steps: str = "120") -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the server works as well, and threads that wait for a core slow all others
    pipe = FluxPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    wanted = latents(pipe, pictures(pipe))
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    train(pipe, wanted, int(steps))
    made = get_peft_model_state_dict(pipe.transformer)
    path = Path(file)
    FluxPipeline.save_lora_weights(path.parent, transformer_lora_layers=made, weight_name=path.name)
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:4])
