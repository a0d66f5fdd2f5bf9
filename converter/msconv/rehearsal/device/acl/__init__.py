"""CANN's acl, as far as SGLang asks at start: which architecture the device has."""

from __future__ import annotations

from torch_npu.settings import SETTINGS


class rt:
    @staticmethod
    def get_device_info(device: int, what: int) -> tuple[int, int]:
        """(value, error code)."""
        return SETTINGS.arch, 0
