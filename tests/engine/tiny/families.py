"""The nine families that merge, as small pipelines. Picture tokens and text tokens are multiples of 16."""

from __future__ import annotations

from typing import Any

import diffusers as d
import transformers as t

from tests.engine.tiny import tokens


def autoencoder(latent_channels: int = 4, **config: Any) -> Any:
    """Factor 4 unless `block_out_channels` says otherwise."""
    widths = config.pop("block_out_channels", (16, 16, 32))
    return d.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=32,
        **config,
    )


def flow_autoencoder(**config: Any) -> Any:
    """As Flux and SD3 have it: a shift factor, no quant convolutions."""
    return autoencoder(use_quant_conv=False, use_post_quant_conv=False, **config)


def clip_text(hidden_size: int = 32, projection_dim: int | None = None) -> Any:
    config = t.CLIPTextConfig(
        vocab_size=514,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection_dim or hidden_size,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return t.CLIPTextModelWithProjection(config) if projection_dim else t.CLIPTextModel(config)


def t5_text(d_model: int = 32) -> Any:
    config = t.T5Config(
        vocab_size=128,
        d_model=d_model,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return t.T5EncoderModel(config)


def gemma2_text() -> Any:
    config = t.Gemma2Config(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
    )
    return t.Gemma2Model(config)


def qwen3_config() -> Any:
    return t.Qwen3Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )


def flux(guidance_embeds: bool = True) -> Any:
    return d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=flow_autoencoder(shift_factor=0.1, scaling_factor=0.5),
        text_encoder=clip_text(),
        tokenizer=tokens.clip(),
        text_encoder_2=t5_text(),
        tokenizer_2=tokens.t5(),
        transformer=d.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        ),
    )


def flux_schnell() -> Any:
    """As FLUX.1-schnell: no guidance embedding, so guidance has no effect."""
    return flux(guidance_embeds=False)


def flux2_klein() -> Any:
    return d.Flux2KleinPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=d.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 16, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=32,
        ),
        text_encoder=t.Qwen3ForCausalLM(qwen3_config()),
        tokenizer=tokens.qwen2(),
        transformer=d.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    )


def unet(**config: Any) -> Any:
    usual = {
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
    }
    return d.UNet2DConditionModel(**{**usual, **config})


def stable_diffusion() -> Any:
    return d.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_text(),
        tokenizer=tokens.clip(),
        unet=unet(),
        scheduler=d.PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    return d.StableDiffusionXLPipeline(
        vae=autoencoder(force_upcast=False),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(projection_dim=32),
        tokenizer=tokens.clip(),
        tokenizer_2=tokens.clip(),
        unet=unet(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
            use_linear_projection=True,
        ),
        scheduler=d.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    )


def stable_diffusion_3(latent_channels: int = 4) -> Any:
    return d.StableDiffusion3Pipeline(
        transformer=d.SD3Transformer2DModel(
            sample_size=16,
            in_channels=latent_channels,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=latent_channels,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        ),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_autoencoder(latent_channels=latent_channels, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip_text(projection_dim=32),
        tokenizer=tokens.clip(),
        text_encoder_2=clip_text(projection_dim=32),
        tokenizer_2=tokens.clip(),
        text_encoder_3=t5_text(64),
        tokenizer_3=tokens.t5(),
    )


def stable_diffusion_3_wide() -> Any:
    """With the 16 channels without which diffusers' inpainting class refuses it."""
    return stable_diffusion_3(latent_channels=16)


def pixart_transformer() -> Any:
    return d.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=16,
        caption_channels=32,
    )


def pixart_sigma() -> Any:
    return d.PixArtSigmaPipeline(
        tokenizer=tokens.t5(),
        text_encoder=t5_text(),
        vae=autoencoder(),
        transformer=pixart_transformer(),
        scheduler=d.DPMSolverMultistepScheduler(),
    )


def sana(pipeline: Any = d.SanaPipeline, scheduler: Any = None, **config: Any) -> Any:
    return pipeline(
        tokenizer=tokens.gemma(),
        text_encoder=gemma2_text(),
        vae=d.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            scaling_factor=0.41,
        ),
        transformer=d.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=16,
            **config,
        ),
        scheduler=scheduler or d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def qwen_image() -> Any:
    text = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 256,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    return d.QwenImagePipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=d.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0, 0.1, -0.1, 0.2],
            latents_std=[1.0, 1.1, 0.9, 1.2],
        ),
        text_encoder=t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(
                text_config=text,
                vision_config=vision,
                image_token_id=258,
                video_token_id=258,
                vision_start_token_id=258,
                vision_end_token_id=258,
            )
        ),
        tokenizer=tokens.qwen2(),
        transformer=d.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def z_image(**config: Any) -> Any:
    return d.ZImagePipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=flow_autoencoder(shift_factor=0.1, scaling_factor=0.5),
        text_encoder=t.Qwen3Model(qwen3_config()),
        tokenizer=tokens.qwen2(),
        transformer=d.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 4, 8],
            axes_lens=[256, 64, 64],
            **config,
        ),
    )
