"""A plugin for vLLM 0.32 on the CPU and on NVIDIA GPUs: its pages hold keys and values as tqkv stores them, and attention reads them there.

    LLM(model, attention_backend="CUSTOM", additional_config={"tqkv": {"codec": "k5v4", "calibration": FILE}})

vLLM finds the plugin by its entry point. Who asks for tqkv in one of both places only, or for what it does not do, gets an error at
the start: nothing else is taken in its place.
"""

from __future__ import annotations

__all__ = ["register"]

VERSIONS = ("0.32",)
BACKEND = "tqkv.vllm.backend.TqkvBackend"


def register() -> None:
    """Called by vLLM in each of its processes."""
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    platform = type(current_platform)
    stock = platform.get_attn_backend_cls.__func__
    if getattr(stock, "_tqkv", False):
        return

    def get_attn_backend_cls(cls, selected_backend, *args, **kwargs):
        from .config import options

        custom = selected_backend is not None and selected_backend.name == "CUSTOM"
        asked = options() is not None
        if not custom and not asked:
            return stock(cls, selected_backend, *args, **kwargs)
        if not asked:
            raise ValueError('attention_backend="CUSTOM" is tqkv\'s: say additional_config={"tqkv": {"codec": "k5v4"}}')
        if not custom:
            other = selected_backend.name if selected_backend is not None else "vLLM's own choice"
            raise ValueError(f'additional_config asks for tqkv, attention_backend is {other}: say attention_backend="CUSTOM"')
        if not any(vllm.__version__ == v or vllm.__version__.startswith(f"{v}.") for v in VERSIONS):
            raise ValueError(f"tqkv's plugin is for vLLM {' and '.join(VERSIONS)}: this is {vllm.__version__}")
        if current_platform.device_type not in ("cpu", "cuda"):
            raise NotImplementedError(f"tqkv's plugin runs on the CPU and on CUDA: this platform is {current_platform.device_type}")
        return BACKEND

    get_attn_backend_cls._tqkv = True
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
