"""Files of ``tqkv calibrate``: what a model's keys are like, measured once, so that caches store them better."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._native import Error, _xxh3_128

__all__ = ["Calibration", "CalibrationError"]

VERSION = 1
ENTRY = "tqkv.calibration"


class CalibrationError(Error):
    """A file that is no calibration, is damaged, or is another model's."""


@dataclass(frozen=True)
class Calibration:
    """What ``tqkv calibrate`` wrote.

    ``channels`` has the shift and scale of each layer's keys, float32 [kv_heads, head_dim], as :class:`tqkv.KvCache` takes them.
    ``origin`` says which model (by the fingerprint of its files), texts and tokens it was made from; ``plan`` which codecs
    ``tqkv calibrate --budget`` found best, if it was asked."""

    channels: dict[int, tuple[np.ndarray, np.ndarray]]
    origin: dict[str, Any]
    plan: dict[str, Any] | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads a file. Raises ``OSError``, and :class:`CalibrationError` for one that is damaged, of another version, or of something else."""
        with open(path, "rb") as file:
            data = file.read()
        try:
            return cls._of(data)
        except CalibrationError as error:
            raise CalibrationError(f"{os.fspath(path)}: {error}") from None
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CalibrationError(f"{os.fspath(path)} is no calibration: {error!r}") from None

    @classmethod
    def _of(cls, data: bytes) -> Calibration:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        found = re.fullmatch(r'\{"checksum":"([^"]*)","about":(\{.*\})\}', header.pop("__metadata__", {}).get(ENTRY, ""), re.S)
        if found is None:
            raise CalibrationError(f"no calibration: its metadata lacks {ENTRY}")
        expected, text = found.groups()
        about = json.loads(text)
        if about["version"] != VERSION:
            raise CalibrationError(f"version {about['version']}: expected {VERSION}")
        hashed, tensors, end = [text.encode()], {}, start
        # Tensors are in the order of their places, and the checksum's in that of their names.
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, stop), shape = tensor["data_offsets"], tensor["shape"]
            if start + begin != end or stop - begin != 4 * math.prod(shape) or tensor["dtype"] != "F32" or len(shape) != 2:
                raise CalibrationError(f"tensor {name} is {tensor}: expected F32 [kv_heads, head_dim] after the one before")
            end = start + stop
            tensors[name] = np.frombuffer(data, "<f4", math.prod(shape), start + begin).reshape(shape)
        for name, values in sorted(tensors.items()):
            hashed += [f"\n{name} F32 [{values.shape[0]}, {values.shape[1]}] ".encode(), values.tobytes()]
        got = f"xxh3-128:{_xxh3_128(hashed):032x}"
        if got != expected or end != len(data):
            raise CalibrationError(f"damaged: checksum {got} over {end} bytes of {len(data)}, expected {expected}")
        layers = range(about["layers"])
        channels = {i: (tensors.pop(f"layers.{i}.shift"), tensors.pop(f"layers.{i}.scale")) for i in layers}
        if tensors:
            raise CalibrationError(f"tensors {sorted(tensors)} belong to none of the {len(layers)} layers")
        return cls(channels, about["origin"], about.get("plan"))

    def expect(self, layers: int, kv_heads: int, head_dim: int) -> None:
        """Raises :class:`CalibrationError` unless it is for a model of this shape."""
        shapes = {(len(self.channels), *x.shape) for pair in self.channels.values() for x in pair}
        if shapes != {(layers, kv_heads, head_dim)}:
            raise CalibrationError(
                f"made for (layers, kv_heads, head_dim) {sorted(shapes)}: expected {(layers, kv_heads, head_dim)} as the model has"
            )
