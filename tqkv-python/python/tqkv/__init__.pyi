"""See `_native.pyi`."""

from ._native import *
from ._native import __version__ as __version__
from .calibration import Calibration as Calibration, CalibrationError as CalibrationError
