"""What the user asks for by ``additional_config={"tqkv": {...}}``."""

from __future__ import annotations

import tqkv

_kept: tqkv.Codec | None = None


def options() -> dict | None:
    """The options of the configuration at hand; None if it, or it in them, is not there."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    additional = config.additional_config if config is not None else None
    return additional.get("tqkv") if isinstance(additional, dict) else None


def codec() -> tqkv.Codec:
    """The codec, which vLLM asks for where a configuration is at hand and where none is: kept once for the process."""
    global _kept
    asked = options()
    if asked is not None:
        unknown = set(asked) - {"codec"}
        if unknown:
            raise ValueError(f"tqkv's options have {sorted(unknown)}: expected codec alone")
        _kept = tqkv.Codec(asked.get("codec", "k5v4"))
        if _kept.sinks or _kept.recent:
            raise NotImplementedError(f"tqkv's codec is {_kept}: in vLLM all positions are stored alike")
    if _kept is None:
        raise RuntimeError("vLLM asks for tqkv's codec before any configuration is there")
    return _kept
