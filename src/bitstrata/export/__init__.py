"""Networks for microcontrollers: a plan as self-contained C99. Needs numpy and bitstrata_runtime, no torch."""

from .model import Exported, export_c

__all__ = ["Exported", "export_c"]
