"""Fixtures of the operations' tests."""

from __future__ import annotations

from tests.plugins_trt.triton_support import interpreter

__all__ = ["interpreter"]
