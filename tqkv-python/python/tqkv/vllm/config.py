"""What the user asks for by ``additional_config={"tqkv": {...}}``."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import get_current_vllm_config_or_none

import tqkv


@dataclass(frozen=True)
class Asked:
    """The options, read and checked."""

    codec: tqkv.Codec
    calibration: tqkv.Calibration | None


_kept: Asked | None = None


def options() -> dict | None:
    """The options of the configuration at hand; None if it, or it in them, is not there."""
    config = get_current_vllm_config_or_none()
    additional = config.additional_config if config is not None else None
    return additional.get("tqkv") if isinstance(additional, dict) else None


def asked() -> Asked:
    """What vLLM asks for where a configuration is at hand and where none is: kept once for the process."""
    global _kept
    given = options()
    if given is not None:
        unknown = set(given) - {"codec", "calibration"}
        if unknown:
            raise ValueError(f"tqkv's options have {sorted(unknown)}: expected codec and calibration alone")
        codec = tqkv.Codec(given.get("codec", "k5v4"))
        if codec.sinks or codec.recent:
            raise NotImplementedError(f"tqkv's codec is {codec}: in vLLM all positions are stored alike")
        file = given.get("calibration")
        calibration = None if file is None else tqkv.Calibration.load(file)
        if calibration is not None:
            model = get_current_vllm_config_or_none().model_config
            layers = model.hf_text_config.num_hidden_layers
            calibration.expect(layers, model.get_total_num_kv_heads(), model.get_head_size())
        _kept = Asked(codec, calibration)
    if _kept is None:
        raise RuntimeError("vLLM asks for tqkv's codec before any configuration is there")
    return _kept


def rank() -> tuple[int, int]:
    """This process among those that share a layer's heads, and their number."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
