"""Names of the number formats that networks may compute in."""

from __future__ import annotations

import torch

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}  # name to autocast type
