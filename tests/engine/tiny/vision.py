"""Pipelines whose text goes through a processor for pictures, which needs torchvision (extra `vision`)."""

from __future__ import annotations

from typing import Any

import diffusers as d
import transformers as t

from tests.engine.tiny import families, tokens, wider


def qwen_processor(kind: str = "Qwen3VLProcessor") -> Any:
    tokenizer = tokens.qwen2()
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    third = kind == "Qwen3VLProcessor"
    images = {"patch_size": 16, "size": {"shortest_edge": 56 * 56, "longest_edge": 2**24}} if third else {}
    parts = {"image_processor": t.Qwen2VLImageProcessor(**images), "tokenizer": tokenizer}
    video = t.Qwen3VLVideoProcessor() if third else t.Qwen2VLVideoProcessor()
    return getattr(t, kind)(**parts, video_processor=video, chat_template=tokens.PARTS_TEMPLATE)


def qwen3_vl(num_layers: int = 2) -> Any:
    config, tokens_of = wider.qwen3_vl(num_layers), qwen_processor().tokenizer.convert_tokens_to_ids
    config.image_token_id, config.video_token_id = tokens_of(["<|image_pad|>", "<|video_pad|>"])
    config.vision_start_token_id, config.vision_end_token_id = tokens_of(
        ["<|vision_start|>", "<|vision_end|>"]
    )
    return t.Qwen3VLForConditionalGeneration(config)


def bria_fibo2() -> Any:
    return d.BriaFibo2Pipeline(
        transformer=d.BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=96,
            injection_layer_ids=(1,),
            perceiver_num_layers=1,
            min_num_gist_tokens=16,
            max_num_gist_tokens=32,
            gist_step=16,
            gist_min_text_len=16,
            gist_max_text_len=64,
            axes_dims=(4, 4, 8),
            axes_lens=(2048, 64, 64),
        ),
        scheduler=wider.flow(),
        vae=wider.flux2_autoencoder(),
        text_encoder=qwen3_vl(36),
        processor=qwen_processor(),
    )


def dreamlite(pipeline: Any = d.DreamLitePipeline) -> Any:
    return pipeline(
        text_encoder=qwen3_vl(),
        tokenizer=tokens.qwen2(),
        processor=qwen_processor(),
        vae=d.AutoencoderTiny(
            encoder_block_out_channels=(16, 16, 16, 16),
            decoder_block_out_channels=(16, 16, 16, 16),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        ),
        unet=d.DreamLiteUNetModel(
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=32,
            attention_head_dim=8,
        ),
        scheduler=wider.flow(),
    )


def flux2() -> Any:
    tokenizer = tokens.qwen2()
    marks = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    processor = t.PixtralProcessor(
        image_processor=t.PixtralImageProcessor(), tokenizer=tokenizer, chat_template=tokens.PARTS_TEMPLATE
    )
    klein = families.flux2_klein()
    config = {**klein.transformer.config, "guidance_embeds": True}
    config.pop("_use_default_values", None)
    return d.Flux2Pipeline(
        scheduler=wider.flow(),
        vae=klein.vae,
        text_encoder=t.Mistral3ForConditionalGeneration(wider.mistral3()),
        tokenizer=processor,
        transformer=d.Flux2Transformer2DModel.from_config(config),
    )


def qwen_image_edit(pipeline: Any = d.QwenImageEditPipeline) -> Any:
    parts, processor = families.qwen_image().components, qwen_processor("Qwen2_5_VLProcessor")
    tokens_of = processor.tokenizer.convert_tokens_to_ids
    config = parts["text_encoder"].config
    config.image_token_id = parts["text_encoder"].model.config.image_token_id = tokens_of("<|image_pad|>")
    config.video_token_id = parts["text_encoder"].model.config.video_token_id = tokens_of("<|video_pad|>")
    return pipeline(**{**parts, "processor": processor})


def kandinsky5() -> Any:
    qwen = families.qwen_image()
    return d.Kandinsky5T2IPipeline(
        transformer=d.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=32,
            in_text_dim2=32,
            time_dim=16,
            model_dim=32,
            ff_dim=64,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 4, 8),
        ),
        vae=families.flow_autoencoder(
            shift_factor=0.1, block_out_channels=(16,)
        ),  # it draws 1024x1024 at least
        text_encoder=qwen.text_encoder,
        tokenizer=qwen_processor("Qwen2VLProcessor"),
        text_encoder_2=families.clip_text(),
        tokenizer_2=tokens.clip(),
        scheduler=wider.flow(),
    )


def longcat() -> Any:
    qwen = families.qwen_image()
    return d.LongCatImagePipeline(
        scheduler=wider.flow(),
        vae=families.flow_autoencoder(latent_channels=16, shift_factor=0.1),
        text_encoder=qwen.text_encoder,
        tokenizer=tokens.qwen2(),
        text_processor=qwen_processor("Qwen2VLProcessor"),
        transformer=d.LongCatImageTransformer2DModel(
            **{**wider.FLUX_LIKE, "in_channels": 64}, pooled_projection_dim=32
        ),
    )


def nucleus() -> Any:
    return d.NucleusMoEImagePipeline(
        transformer=d.NucleusMoEImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            num_experts=4,
            moe_intermediate_dim=32,
            mlp_ratio=6,
            capacity_factors=[2.0, 2.0],
        ),
        scheduler=wider.flow(),
        vae=families.qwen_image().vae,
        text_encoder=qwen3_vl(10),
        processor=qwen_processor(),
    )


def omnigen() -> Any:
    return d.OmniGenPipeline(
        transformer=d.OmniGenTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            num_layers=2,
            pad_token_id=0,
            vocab_size=384,
            max_position_embeddings=1024,
            rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            pos_embed_max_size=64,
            time_step_dim=16,
        ),
        scheduler=wider.flow(),
        vae=families.autoencoder(block_out_channels=(16, 16, 16, 32)),
        tokenizer=tokens.llama(),
    )


def qwen_image21() -> Any:
    return d.QwenImage21Pipeline(
        scheduler=wider.flow(),
        vae=d.AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=16,
            dim_mult=[1, 1, 2, 2, 2],
            num_res_blocks=1,
            latents_mean=[0.1] * 16,
            latents_std=[1.0] * 16,
        ),
        text_encoder=qwen3_vl(),
        processor=qwen_processor(),
        transformer=d.QwenImage21Transformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def glm_image() -> Any:
    """Its language model draws 256 tokens of a preview before those of the picture."""
    return d.GlmImagePipeline(
        tokenizer=t.ByT5Tokenizer(),
        processor=t.GlmImageProcessor(
            image_processor=t.GlmImageImageProcessor(
                patch_size=16,
                temporal_patch_size=1,
                merge_size=1,
                size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128},
            ),
            tokenizer=tokens.glm_image(),
            chat_template=tokens.GLM_TEMPLATE,
        ),
        text_encoder=t.T5EncoderModel(
            t.T5Config(vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
        ),
        vision_language_encoder=t.GlmImageForConditionalGeneration(
            t.GlmImageConfig(
                text_config={
                    "vocab_size": 384,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "vision_vocab_size": 64,
                    "pad_token_id": 256,
                    "eos_token_id": 256,
                    "rope_parameters": {
                        "rope_type": "default",
                        "mrope_section": [2, 3, 3],
                        "rope_theta": 10000.0,
                    },
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_heads": 2,
                    "image_size": 128,
                },
                vq_config={"embed_dim": 16, "num_embeddings": 64, "latent_channels": 32},
                image_token_id=260,
                image_start_token_id=257,
                image_end_token_id=261,
            )
        ),
        vae=families.autoencoder(
            block_out_channels=(16, 16, 16, 32), latents_mean=[0.1] * 4, latents_std=[1.1] * 4
        ),
        transformer=d.GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=32,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=64,
        ),
        scheduler=wider.flow(),
    )


def qwen_image_layered() -> Any:
    """Its autoencoder makes 1/32, because it draws 640x640 at least; four channels would be a picture."""
    parts = qwen_image_edit().components
    layered = {"in_channels": 32, "out_channels": 8, "use_additional_t_cond": True, "use_layer3d_rope": True}
    transformer = {**parts["transformer"].config, **layered}
    transformer.pop("_use_default_values", None)
    vae = d.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, False, False, False, True],
        input_channels=4,
        latents_mean=[0.1] * 8,
        latents_std=[1.1] * 8,
    )
    made = {**parts, "vae": vae, "transformer": d.QwenImageTransformer2DModel.from_config(transformer)}
    return d.QwenImageLayeredPipeline(**made)
