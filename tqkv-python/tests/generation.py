"""The model that generation is tested with: its prompts, inputs and caches."""

import pathlib

import torch
import transformers

from tqkv.transformers import TqkvCache

MODEL = pathlib.Path(__file__).parents[2] / "tqkv-cli" / "assets" / "byte-llama-4m"
PROMPTS = [
    "The quick brown fox jumps over the lazy dog, and then",
    "It was",
    "In the beginning of the year there was a great deal of snow upon the hills, and",
    "He said to her, he said to her, he said to",
]


def load(implementation):
    return transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation=implementation
    ).eval()


def padded(texts):
    """Tokens and their mask, padded on the left."""
    rows = [list(t.encode()) for t in texts]
    width = max(map(len, rows))
    return (
        torch.tensor([[0] * (width - len(r)) + r for r in rows]),
        torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    )


def generate(model, tokens, mask=None, cache=None, **kwargs):
    """The new tokens; samples are the same in every call."""
    kwargs = {"do_sample": False, "pad_token_id": 0} | kwargs
    if cache is not None:
        kwargs["past_key_values"] = cache
    mask = torch.ones_like(tokens) if mask is None else mask
    torch.manual_seed(5)
    return model.generate(tokens, attention_mask=mask, **kwargs)[:, tokens.shape[1] :].tolist()


def cache(model, codec="f32", **kwargs):
    return TqkvCache(model.config, codec, **{"page_size": 8, "capacity": 64} | kwargs)
