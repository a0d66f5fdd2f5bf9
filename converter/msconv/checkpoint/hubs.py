"""Which hubs there are, and how a model is named on one."""

from __future__ import annotations

import re
from typing import Literal

Hub = Literal["huggingface", "modelscope"]
HUBS: tuple[Hub, ...] = ("huggingface", "modelscope")
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]{0,99}/[\w.-]{1,100})(?:@([\w][\w./-]{0,199}))?", re.ASCII)
