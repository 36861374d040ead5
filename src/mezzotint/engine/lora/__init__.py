"""LoRA adapters as rows: files, resident weights and the layers that apply them."""
