"""Classes of diffusers' text-to-image mapping that have no rule: they run, and are never merged."""

from __future__ import annotations

from typing import Any

import diffusers as d
import transformers as t

from tests.engine.tiny import families, tokens


def latent_consistency() -> Any:
    return d.LatentConsistencyModelPipeline(
        vae=families.autoencoder(),
        text_encoder=families.clip_text(),
        tokenizer=tokens.clip(),
        unet=families.unet(time_cond_proj_dim=16),
        scheduler=d.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixart_alpha() -> Any:
    return d.PixArtAlphaPipeline(
        tokenizer=tokens.t5(),
        text_encoder=families.t5_text(),
        vae=families.autoencoder(),
        transformer=families.pixart_transformer(),
        scheduler=d.DPMSolverMultistepScheduler(),
    )


def lumina2() -> Any:
    return d.Lumina2Pipeline(
        transformer=d.Lumina2Transformer2DModel(
            sample_size=16,
            in_channels=4,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 4, 8),
            axes_lens=(512, 64, 64),
            cap_feat_dim=32,
        ),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=families.autoencoder(4, shift_factor=0.1, block_out_channels=(16, 16, 16, 32)),
        text_encoder=families.gemma2_text(),
        tokenizer=tokens.gemma(),
    )


def aura_flow() -> Any:
    config = t.UMT5Config(vocab_size=128, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return d.AuraFlowPipeline(
        tokenizer=tokens.t5(),
        text_encoder=t.UMT5EncoderModel(config),
        vae=families.autoencoder(),
        transformer=d.AuraFlowTransformer2DModel(
            sample_size=16,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        ),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
    )


def cogview3_plus() -> Any:
    return d.CogView3PlusPipeline(
        tokenizer=tokens.t5(),
        text_encoder=families.t5_text(),
        vae=families.autoencoder(),
        transformer=d.CogView3PlusTransformer2DModel(
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=32,
            time_embed_dim=32,
            condition_dim=8,
            pos_embed_max_size=16,
            sample_size=16,
        ),
        scheduler=d.CogVideoXDDIMScheduler(),
    )


def cogview4() -> Any:
    config = t.GlmConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=256,
        eos_token_id=256,
    )
    return d.CogView4Pipeline(
        tokenizer=tokens.plain(),
        text_encoder=t.GlmModel(config),
        vae=families.autoencoder(),
        transformer=d.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=32,
            condition_dim=8,
            pos_embed_max_size=16,
            sample_size=16,
            rope_axes_dim=(16, 16),
        ),
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def hunyuan_dit() -> Any:
    config = t.BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return d.HunyuanDiTPipeline(
        vae=families.autoencoder(block_out_channels=(16, 16, 16, 32)),
        text_encoder=t.BertModel(config),
        tokenizer=tokens.bert(),
        transformer=d.HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            patch_size=2,
            sample_size=16,
            hidden_size=32,
            num_layers=2,
            cross_attention_dim=32,
            cross_attention_dim_t5=32,
            pooled_projection_dim=32,
        ),
        scheduler=d.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=families.t5_text(),
        tokenizer_2=tokens.t5(),
    )


def chroma() -> Any:
    return d.ChromaPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=families.flow_autoencoder(shift_factor=0.1),
        text_encoder=families.t5_text(),
        tokenizer=tokens.t5(),
        transformer=d.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
    )


def kandinsky3() -> Any:
    return d.Kandinsky3Pipeline(
        tokenizer=tokens.t5(),
        text_encoder=families.t5_text(),
        unet=d.Kandinsky3UNet(
            time_embedding_dim=4,
            groups=2,
            attention_head_dim=4,
            layers_per_block=2,
            block_out_channels=(16, 32),
            cross_attention_dim=4,
            encoder_hid_dim=32,
        ),
        scheduler=d.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="squaredcos_cap_v2"),
        movq=d.VQModel(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=(*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
            latent_channels=4,
            norm_num_groups=8,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
    )


def ovis_image() -> Any:
    return d.OvisImagePipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=families.flow_autoencoder(shift_factor=0.1),
        text_encoder=t.Qwen3Model(families.qwen3_config()),
        tokenizer=tokens.qwen2(),
        transformer=d.OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
    )
