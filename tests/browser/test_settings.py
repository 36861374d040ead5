"""Settings come back from picture files, ours and others'; a model's card, and why there is a wait."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from playwright.sync_api import Browser, expect

from mezzotint.images import Parameters, encode
from tests.browser.conftest import PATIENCE_MS, Visit, open_page
from tests.server.hosting import Host, endpoint, hosting, settings_for

OURS: dict[str, Any] = {
    "model": "one:glow",
    "prompt": 'an "owl", ünïcode 猫',
    "num_inference_steps": 9,
    "seed": 2**60 + 1,
    "guidance_scale": 2.5,
    "negative_prompt": "text",
    "width": 40,
    "height": 24,
    "adapters": [{"route": "glow", "scale": 0.5}, {"route": "ink"}],
}
FORGE = """an owl, <lora:ink:0.75>
on a branch
Negative prompt: blurry,
text
Steps: 80, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 4158183252, \
Size: 40x24, Model hash: 3cd5ccf1ba, Model: flux1-dev, Lora hashes: "ink: b75b64b701c4", Version: f2.0.1"""


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """One node of ComfyUI's graph."""
    return {"class_type": kind, "inputs": inputs}


COMFY_DEFAULT = {
    "3": node(
        "KSampler",
        seed=(2**64 - 1) // 3,
        steps=20,
        cfg=8.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
        model=["10", 0],
        positive=["6", 0],
        negative=["7", 0],
        latent_image=["5", 0],
    ),
    "4": node("CheckpointLoaderSimple", ckpt_name="sd/v1-5-pruned-emaonly.safetensors"),
    "5": node("EmptyLatentImage", width=40, height=24, batch_size=1),
    "6": node("CLIPTextEncode", text="an owl", clip=["4", 1]),
    "7": node("CLIPTextEncode", text="blurry", clip=["4", 1]),
    "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
    "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    "10": node("LoraLoader", lora_name="ink.safetensors", strength_model=0.75, model=["4", 0], clip=["4", 1]),
}
"""ComfyUI's default workflow, with a LoRA in between."""
COMFY_FLUX = {
    "6": node("CLIPTextEncode", text="an owl", clip=["11", 0]),
    "8": node("VAEDecode", samples=["13", 0], vae=["10", 0]),
    "12": node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
    "13": node(
        "SamplerCustomAdvanced",
        noise=["25", 0],
        guider=["22", 0],
        sampler=["16", 0],
        sigmas=["17", 0],
        latent_image=["27", 0],
    ),
    "16": node("KSamplerSelect", sampler_name="euler"),
    "17": node("BasicScheduler", scheduler="simple", steps=20, denoise=1.0, model=["30", 0]),
    "22": node("BasicGuider", model=["30", 0], conditioning=["26", 0]),
    "25": node("RandomNoise", noise_seed=219670278747233),
    "26": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
    "27": node("EmptySD3LatentImage", width=40, height=24, batch_size=1),
    "30": node("ModelSamplingFlux", max_shift=1.15, width=40, height=24, model=["12", 0]),
}
"""Its workflow for Flux."""


def png(**texts: str) -> bytes:
    """A PNG with texts as Pillow writes them, which is what those programs use."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text, zip=name == "zipped")
    return saved("PNG", pnginfo=info)


def jpeg(infotext: str) -> bytes:
    """A JPEG with the text in EXIF's UserComment, as Forge writes it."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + infotext.encode("utf-16-be")
    return saved("JPEG", exif=exif.tobytes())


def saved(form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, form, **options)
    return file.getvalue()


def ours(form: str) -> bytes:
    return encode(form, bytes(8 * 8 * 3), 8, 8, parameters=Parameters.from_dict(OURS))


def restored(visit: Visit, name: str, data: bytes) -> dict[str, str]:
    """The form after the file was given to it."""
    visit.page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})
    visit.hear("restored", selector="#status")
    ids = ["prompt", "negative", "steps", "guidance", "seed", "width", "height", "adapter", "adapter-scale"]
    found = {name: visit.page.locator(f"#{name}").input_value() for name in ids}
    second = visit.page.locator("[aria-label='Adapter 2']")
    return found | {"second": second.input_value() if second.count() else ""}


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_our_own_files_give_everything_back(visit: Visit, form: str) -> None:
    assert restored(visit, f"a.{form}", ours(form)) == {
        "prompt": 'an "owl", ünïcode 猫',
        "negative": "text",
        "steps": "9",
        "guidance": "2.5",
        "seed": str(2**60 + 1),
        "width": "40",
        "height": "24",
        "adapter": "glow",
        "adapter-scale": "0.5",
        "second": "ink",
    }


@pytest.mark.parametrize("kind", ["png", "jpeg", "a1111"])
def test_files_of_forge_are_read(visit: Visit, kind: str) -> None:
    data = {"png": png(parameters=FORGE), "jpeg": jpeg(FORGE), "a1111": png(parameters=FORGE + " – ü")}[kind]
    found = restored(visit, "forge.png", data)
    assert found == {
        "prompt": "an owl,\non a branch",
        "negative": "blurry,\ntext",
        "steps": "50",
        "guidance": "3.5",
        "seed": "4158183252",
        "width": "40",
        "height": "24",
        "adapter": "ink",
        "adapter-scale": "0.75",
        "second": "",
    }
    assert visit.text("#warnings") == "flux1-dev is not to be had with this key, so this is for one:ink."


@pytest.mark.parametrize(
    ("graph", "wanted"),
    [
        (COMFY_DEFAULT, ("blurry", "8", "6148914691236517205", "ink", "0.75")),
        (COMFY_FLUX, ("", "3.5", "219670278747233", "", "")),
    ],
)
def test_files_of_comfyui_are_read(visit: Visit, graph: dict[str, Any], wanted: tuple[str, ...]) -> None:
    found = restored(visit, "ComfyUI_00001_.png", png(prompt=json.dumps(graph), workflow="{}"))
    assert [found[name] for name in ("prompt", "steps", "width", "height")] == ["an owl", "20", "40", "24"]
    assert (
        tuple(found[name] for name in ("negative", "guidance", "seed", "adapter", "adapter-scale")) == wanted
    )


def test_a_damaged_file_is_told_so(visit: Visit) -> None:
    for name, data in (
        ("cut.jpg", jpeg(FORGE)[:60]),
        ("cut.webp", ours("webp")[:40]),
        ("odd.png", png(prompt="{}")),
    ):
        visit.page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})
        visit.hear(f"{name} has no settings in it that this page can read.", selector="#error")


def test_the_card_says_what_the_model_is(visit: Visit) -> None:
    visit.page.click("#card summary")
    assert visit.text("#card-about") == "Coloured noise, the same for the same request."
    facts = visit.text("#card-facts")
    for text in (
        "fake:step_s=0.002,size=32",
        "Apache-2.0",
        "a step",
        "1 parameters, fp32, on cpu",
        "FakePipeline",
    ):
        assert text in facts
    assert visit.text("#card-state") == ""


def test_a_model_that_loads_says_so_and_one_that_failed_says_why(browser: Browser, tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    one = endpoint(f"fake:load_until={loaded}", id="one")
    broken = endpoint("fake:fail_load=permanent", id="broken")
    with hosting(settings_for(tmp_path, one, broken, auth=False), ready=False) as host:
        visit = open_page(browser, host)
        visit.ask("an owl", endpoint="one")
        visit.hear("loading")
        visit.hear("Loading", selector="#card-state")
        loaded.touch()
        visit.done()
        expect(visit.page.locator("#card-state")).to_have_text("", timeout=PATIENCE_MS)
        visit.page.select_option("#endpoint", "broken")
        visit.hear("Failed: ", selector="#card-state")
        visit.hear("the fake model cannot be loaded", selector="#card-state")
        visit.ask("an owl", endpoint="broken")
        visit.hear("the fake model cannot be loaded", selector="#error")
        visit.page.context.close()


def test_a_restored_model_that_is_not_here_is_named(visit: Visit, host: Host) -> None:
    elsewhere = encode(
        "png", bytes(8 * 8 * 3), 8, 8, parameters=Parameters.from_dict(OURS | {"model": "other"})
    )
    restored(visit, "a.png", elsewhere)
    assert visit.text("#warnings") == "other is not to be had with this key, so this is for one:glow."
