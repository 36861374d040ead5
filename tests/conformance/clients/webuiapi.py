"""webuiapi, a client of AUTOMATIC1111's API."""

from __future__ import annotations

from typing import Any

from webuiapi import WebUIApi

from tests.conformance.clients.target import (
    LITTLE,
    PROMPT,
    SEED,
    STEPS,
    Server,
    check_nearly_red,
    check_outside,
    hole,
    red_square,
    run,
)


def client(server: Server) -> Any:
    host, port = server.address
    return WebUIApi(host=host, port=port, username="anyone", password=server.key)


def generate(server: Server) -> None:
    api = client(server)
    width, height = server.image.size
    api.util_set_model(server.model)
    assert api.util_get_current_model() == server.model
    made = api.txt2img(prompt=PROMPT, steps=STEPS, seed=SEED, cfg_scale=4, width=width, height=height)
    assert made.image.size == server.image.size
    assert made.info["seed"] == SEED
    assert made.info["infotexts"][0].startswith(PROMPT)
    again = api.txt2img(prompt=PROMPT, steps=STEPS, seed=SEED, cfg_scale=4, width=width, height=height)
    assert again.image.tobytes() == made.image.tobytes()
    assert PROMPT in api.png_info(made.image).info


def own_defaults(server: Server) -> None:
    """512x512 in 20 steps, guidance 7, and every other field of the original."""
    made = client(server).txt2img(prompt=PROMPT, negative_prompt="blurry, text")
    assert made.image.size == server.image.size
    assert any("512x512" in text for text in made.info["warnings"]), made.info["warnings"]
    edited = client(server).img2img(images=[red_square()], prompt=PROMPT)
    assert edited.image.size == server.image.size


def lists(server: Server) -> None:
    api = client(server)
    assert api.get_progress()["state"]["job_count"] == 0
    assert api.interrupt() == {}
    for ask in (
        api.get_samplers, api.get_schedulers, api.get_loras, api.get_sd_models, api.get_upscalers,
        api.get_hypernetworks, api.get_face_restorers, api.get_realesrgan_models, api.get_prompt_styles,
        api.get_embeddings, api.get_scripts, api.get_memory, api.get_cmd_flags, api.get_options,
        api.get_sd_vae, api.get_latent_upscale_modes, api.refresh_checkpoints,
    ):  # fmt: skip
        assert isinstance(ask(), list | dict), ask
    assert api.util_get_sampler_names()
    assert api.util_get_scheduler_names()


def edits(server: Server) -> None:
    api = client(server)
    common: dict[str, Any] = {
        "images": [red_square()],
        "prompt": PROMPT,
        "steps": 20,
        "seed": SEED,
        "width": 128,
        "height": 128,
    }
    little = api.img2img(**common, denoising_strength=LITTLE)
    check_nearly_red(little.image.convert("RGB"))
    masked = api.img2img(**common, mask_image=hole("L"), mask_blur=0)
    check_outside(masked.image.convert("RGB"))


if __name__ == "__main__":
    run(
        [
            ("txt2img, options, png-info", generate),
            ("its own defaults: 512x512, a negative prompt", own_defaults),
            ("lists, progress, interrupt", lists),
            ("img2img with little strength, and with a mask", edits),
        ]
    )
