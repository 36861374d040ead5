"""The rest of diffusers' text-to-image classes, as small pipelines that need no package for pictures."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import torch
import transformers as t

from tests.engine.tiny import families, others, tokens

JOINT = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
FLUX_LIKE = {**JOINT, "in_channels": 16, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)}
UNSAFE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}


def as_class(name: str, make: Callable[[], Any], **options: Any) -> Any:
    """The components of another pipeline in class `name`."""
    made = getattr(d, name)
    wanted = inspect.signature(made.__init__).parameters
    components = {key: part for key, part in make().components.items() if key in wanted}
    return made(**components, **options)


def small(config: type, **more: Any) -> Any:
    """A decoder of two layers, as most configurations of transformers spell it."""
    return config(
        **{
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": 256,
            "pad_token_id": 256,
            **more,
        }
    )


def flow() -> Any:
    return d.FlowMatchEulerDiscreteScheduler()


def flux2_autoencoder() -> Any:
    return families.flux2_klein().vae


def mistral3() -> Any:
    vision = t.PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    return t.Mistral3Config(text_config=small(t.MistralConfig), vision_config=vision, image_token_index=10)


def bria() -> Any:
    return d.BriaPipeline(
        transformer=d.BriaTransformer2DModel(**FLUX_LIKE),
        scheduler=flow(),
        vae=families.flow_autoencoder(),
        text_encoder=families.t5_text(),
        tokenizer=tokens.t5(),
    )


def bria_fibo() -> Any:
    return d.BriaFiboPipeline(
        transformer=d.BriaFiboTransformer2DModel(
            **{**FLUX_LIKE, "in_channels": 4, "joint_attention_dim": 64, "text_encoder_dim": 32}
        ),
        scheduler=flow(),
        vae=d.AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **_four_statistics()),
        text_encoder=t.SmolLM3ForCausalLM(small(t.SmolLM3Config, vocab_size=129000)),
        tokenizer=tokens.qwen2(),
    )


def _four_statistics() -> dict[str, Any]:
    return {"latents_mean": [0.0, 0.1, -0.1, 0.2], "latents_std": [1.0, 1.1, 0.9, 1.2]}


def ernie() -> Any:
    return d.ErnieImagePipeline(
        transformer=d.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=64,
            in_channels=16,
            out_channels=16,
            text_in_dim=32,
            rope_axes_dim=(4, 4, 8),
        ),
        vae=flux2_autoencoder(),
        text_encoder=t.Mistral3Model(mistral3()),
        tokenizer=tokens.qwen2(),
        scheduler=flow(),
        pe=t.Qwen3ForCausalLM(families.qwen3_config()),
        pe_tokenizer=tokens.qwen2(48),
    )


class NoGuardrail(d.ModelMixin, d.ConfigMixin):  # type: ignore[misc]
    """In place of Cosmos' safety checker, which is a package of its own; Cosmos does not draw without one."""

    config_name = "config.json"

    @d.configuration_utils.register_to_config  # type: ignore[untyped-decorator]
    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos2() -> Any:
    return d.Cosmos2TextToImagePipeline(
        text_encoder=families.t5_text(),
        tokenizer=tokens.t5(),
        transformer=d.CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            mlp_ratio=2,
            text_embed_dim=32,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            extra_pos_embed_type=None,
        ),
        vae=d.AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            num_res_blocks=1,
            temperal_downsample=[True, True, False],
            **_four_statistics(),
        ),
        scheduler=flow(),
        safety_checker=NoGuardrail(),
    )


def hidream() -> Any:
    llama = t.LlamaForCausalLM(small(t.LlamaConfig, head_dim=16))
    return d.HiDreamImagePipeline(
        scheduler=flow(),
        vae=families.flow_autoencoder(shift_factor=0.1),
        text_encoder=families.clip_text(projection_dim=32),
        tokenizer=tokens.clip(),
        text_encoder_2=families.clip_text(projection_dim=32),
        tokenizer_2=tokens.clip(),
        text_encoder_3=families.t5_text(),
        tokenizer_3=tokens.t5(),
        text_encoder_4=llama,
        tokenizer_4=tokens.plain(),
        transformer=d.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[32, 32],
            text_emb_dim=64,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(32, 32),
            llama_layers=[0, 1],
            force_inference_output=True,
        ),
    )


def hunyuan_image() -> Any:
    qwen = families.qwen_image()
    byt5 = t.T5EncoderModel(
        t.T5Config(vocab_size=1510, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )
    guidance = d.AdaptiveProjectedMixGuidance
    return d.HunyuanImagePipeline(
        scheduler=flow(),
        vae=d.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=16,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=32,
            scaling_factor=0.5,
        ),
        text_encoder=qwen.text_encoder,
        tokenizer=qwen.tokenizer,
        text_encoder_2=byt5,
        tokenizer_2=t.ByT5Tokenizer(),
        transformer=d.HunyuanImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=32,
            text_embed_2_dim=32,
            rope_axes_dim=(8, 8),
        ),
        guider=guidance(adaptive_projected_guidance_start_step=1),
        ocr_guider=guidance(adaptive_projected_guidance_start_step=1),
    )


def deepfloyd() -> Any:
    return d.IFPipeline(
        tokenizer=tokens.t5(77),
        text_encoder=families.t5_text(),
        unet=families.unet(
            sample_size=32,
            in_channels=3,
            out_channels=6,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            encoder_hid_dim=32,
            class_embed_type=None,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
            cross_attention_norm="group_norm",
            only_cross_attention=True,
            attention_head_dim=8,
        ),
        scheduler=d.DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2"),
        watermarker=None,
        **UNSAFE,
    )


def qwen3_vl(num_layers: int = 2) -> Any:
    return t.Qwen3VLConfig(
        text_config=small(
            t.Qwen3VLTextConfig,
            num_hidden_layers=num_layers,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        ).to_dict(),
        vision_config={**VISION, "deepstack_visual_indexes": [0], "patch_size": 16},
        image_token_id=258,
        video_token_id=258,
        vision_start_token_id=258,
        vision_end_token_id=258,
    )


def ideogram4() -> Any:
    def transformer() -> Any:
        return d.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=64,
            adaln_dim=16,
            llm_features_dim=13 * 32,
            mrope_section=(4, 2, 2),
        )

    return d.Ideogram4Pipeline(
        scheduler=flow(),
        vae=flux2_autoencoder(),
        text_encoder=t.Qwen3VLModel(qwen3_vl(36)),
        tokenizer=tokens.qwen2(),
        transformer=transformer(),
        unconditional_transformer=transformer(),
    )


def prior(**config: Any) -> Any:
    return d.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        embedding_dim=32,
        num_embeddings=77,
        additional_embeddings=4,
        **config,
    )


def clip_vision() -> Any:
    return t.CLIPVisionModelWithProjection(
        t.CLIPVisionConfig(
            hidden_size=32,
            projection_dim=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    )


def kandinsky_parts() -> dict[str, Any]:
    return {
        "scheduler": d.DDPMScheduler(),
        "movq": others.kandinsky3().movq,
        "prior_prior": prior(),
        "prior_image_encoder": clip_vision(),
        "prior_text_encoder": families.clip_text(projection_dim=32),
        "prior_tokenizer": tokens.clip(),
        "prior_scheduler": d.UnCLIPScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            num_train_timesteps=1000,
            clip_sample_range=5.0,
        ),
        "prior_image_processor": t.CLIPImageProcessor(
            size=32, crop_size={"height": 32, "width": 32}, do_center_crop=True
        ),
    }


KANDINSKY_UNET = {
    "sample_size": 8,
    "out_channels": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 8,
    "encoder_hid_dim": 32,
}


def kandinsky() -> Any:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        transformerDimSize=32,
        imageDimSize=32,
        vocab_size=1005,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
    )
    parts = {**kandinsky_parts(), "scheduler": d.DDIMScheduler(clip_sample=False, steps_offset=1)}
    return d.KandinskyCombinedPipeline(
        text_encoder=MultilingualCLIP(config),
        tokenizer=tokens.roberta(),
        unet=families.unet(
            **KANDINSKY_UNET,
            encoder_hid_dim_type="text_image_proj",
            addition_embed_type="text_image",
            addition_embed_type_num_heads=2,
        ),
        **parts,
    )


def kandinsky22() -> Any:
    return d.KandinskyV22CombinedPipeline(
        unet=families.unet(**KANDINSKY_UNET, encoder_hid_dim_type="image_proj", addition_embed_type="image"),
        **kandinsky_parts(),
    )


def kolors() -> Any:
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=512,
        hidden_size=32,
        ffn_hidden_size=64,
        kv_channels=16,
        num_attention_heads=2,
        seq_length=512,
        original_rope=True,
    )
    text_encoder = ChatGLMModel(config)
    for parameter in text_encoder.parameters():  # its own are what lay in memory
        torch.nn.init.ones_(parameter)
    sdxl = families.stable_diffusion_xl()
    return d.KolorsPipeline(
        vae=sdxl.vae,
        text_encoder=text_encoder,
        tokenizer=tokens.chatglm(),
        unet=families.unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
            use_linear_projection=True,
            encoder_hid_dim=32,
            encoder_hid_dim_type="text_proj",
        ),
        scheduler=sdxl.scheduler,
    )


def krea2() -> Any:
    return d.Krea2Pipeline(
        scheduler=flow(),
        vae=families.qwen_image().vae,
        text_encoder=t.Qwen3VLModel(qwen3_vl()),
        tokenizer=tokens.qwen2(),
        transformer=d.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            timestep_embed_dim=16,
            text_hidden_dim=32,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=64,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 4, 8),
        ),
        text_encoder_select_layers=(1, 2),
    )


def latent_diffusion() -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = LDMBertConfig(
        vocab_size=256,
        max_position_embeddings=77,
        encoder_layers=1,
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        head_dim=16,
        d_model=32,
    )
    return d.LDMTextToImagePipeline(
        vqvae=families.autoencoder(),
        bert=LDMBertModel(config),
        tokenizer=tokens.bert(),
        unet=families.unet(),
        scheduler=d.DDIMScheduler(clip_sample=False, steps_offset=1),
    )


def lumina() -> Any:
    return d.LuminaPipeline(
        transformer=d.LuminaNextDiT2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=32,
            scaling_factor=1.0,
        ),
        scheduler=flow(),
        vae=families.autoencoder(block_out_channels=(16, 16, 16, 32)),
        text_encoder=t.GemmaModel(small(t.GemmaConfig)),
        tokenizer=tokens.starting(tokens.gemma()),
    )


def prx(pixel: bool = False) -> Any:
    transformer = {
        "in_channels": 3 if pixel else 4,
        "context_in_dim": 32,
        "hidden_size": 32,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [8, 8],
        **({"patch_size": 4, "bottleneck_size": 16, "resolution_embeds": True} if pixel else {}),
    }
    if pixel:
        return d.PRXPixelPipeline(
            transformer=d.PRXTransformer2DModel(**transformer),
            scheduler=flow(),
            text_encoder=t.Qwen3VLTextModel(qwen3_vl().text_config),
            tokenizer=tokens.qwen2(),
            default_sample_size=32,
        )
    from diffusers.pipelines.prx import T5GemmaEncoder

    module = small(t.T5GemmaModuleConfig, query_pre_attn_scalar=16, layer_types=["full_attention"] * 2)
    text_encoder = T5GemmaEncoder(t.T5GemmaConfig(encoder=module, decoder=module).encoder)
    return d.PRXPipeline(
        transformer=d.PRXTransformer2DModel(**transformer),
        scheduler=flow(),
        text_encoder=text_encoder,
        tokenizer=tokens.gemma(),
        vae=families.flow_autoencoder(shift_factor=0.1),
        default_sample_size=32,
    )


def publish_prx(pipe: Any, folder: Path) -> None:
    """Its encoder comes from transformers, with the configuration of the whole model."""
    index = folder / "model_index.json"
    known = json.loads(index.read_text())
    index.write_text(json.dumps({**known, "text_encoder": ["transformers", "T5GemmaEncoder"]}))
    module = pipe.text_encoder.config
    t.T5GemmaConfig(encoder=module, decoder=module, vocab_size=384).save_pretrained(folder / "text_encoder")


def sana_sprint() -> Any:
    return families.sana(
        d.SanaSprintPipeline, d.SCMScheduler(), guidance_embeds=True, qk_norm="rms_norm_across_heads"
    )


def cascade() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    def unet(**config: Any) -> Any:
        return d.StableCascadeUNet(
            conditioning_dim=32,
            block_out_channels=(16, 16),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            clip_text_pooled_in_channels=32,
            timestep_ratio_embedding_dim=16,
            **config,
        )

    return d.StableCascadeCombinedPipeline(
        tokenizer=tokens.clip(),
        text_encoder=families.clip_text(projection_dim=32),
        decoder=unet(
            in_channels=4,
            out_channels=4,
            patch_size=2,
            effnet_in_channels=16,
            timestep_conditioning_type=("sca",),
        ),
        scheduler=d.DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=16),
        prior_prior=unet(
            in_channels=16,
            out_channels=16,
            clip_image_in_channels=32,
            clip_text_in_channels=32,
            switch_level=(False,),
        ),
        prior_text_encoder=families.clip_text(projection_dim=32),
        prior_tokenizer=tokens.clip(),
        prior_scheduler=d.DDPMWuerstchenScheduler(),
    )


def wuerstchen() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenPrior
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt

    return d.WuerstchenCombinedPipeline(
        tokenizer=tokens.clip(),
        text_encoder=families.clip_text(),
        decoder=WuerstchenDiffNeXt(
            c_cond=32,
            c_hidden=[16, 16],
            nhead=[2, 2],
            blocks=[1, 1],
            level_config=["CT", "CTA"],
            inject_effnet=[True, True],
            effnet_embd=16,
            clip_embd=32,
        ),
        scheduler=d.DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=16),
        prior_tokenizer=tokens.clip(),
        prior_text_encoder=families.clip_text(),
        prior_prior=WuerstchenPrior(c_in=16, c=16, c_cond=32, c_r=16, depth=1, nhead=2),
        prior_scheduler=d.DDPMWuerstchenScheduler(),
    )


def unclip() -> Any:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    return d.StableUnCLIPPipeline(
        prior_tokenizer=tokens.clip(),
        prior_text_encoder=families.clip_text(projection_dim=32),
        prior=prior(),
        prior_scheduler=d.DDPMScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            num_train_timesteps=1000,
            clip_sample=True,
            clip_sample_range=5.0,
            beta_schedule="squaredcos_cap_v2",
        ),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=32),
        image_noising_scheduler=d.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokens.clip(),
        text_encoder=families.clip_text(),
        unet=families.unet(class_embed_type="projection", projection_class_embeddings_input_dim=64),
        scheduler=d.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        vae=families.autoencoder(),
    )


def z_image_omni() -> Any:
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return as_class(
        "ZImageOmniPipeline",
        lambda: families.z_image(siglip_feat_dim=32),
        siglip=t.Siglip2VisionModel(t.Siglip2VisionConfig(**config)),
        siglip_processor=t.Siglip2ImageProcessor(),
    )
