# SPDX-License-Identifier: Apache-2.0
"""The methods, one file each. METHODS is the explicit table: to be in it is to be tested."""

from jaxlm.methods.cpi_ft import CpiFt
from jaxlm.methods.dpi import Dpi
from jaxlm.methods.dpo import Dpo
from jaxlm.methods.epi import Epi
from jaxlm.methods.ewc import Ewc
from jaxlm.methods.grpo import Grpo
from jaxlm.methods.multi_stage import MultiStage
from jaxlm.methods.r_capsule import RCapsule
from jaxlm.methods.sft import Sft

METHODS = {
    "sft": Sft,
    "multi_stage": MultiStage,
    "epi": Epi,
    "dpi": Dpi,
    "cpi_ft": CpiFt,
    "ewc": Ewc,
    "grpo": Grpo,
    "dpo": Dpo,
    "r_capsule": RCapsule,
}

__all__ = ["METHODS", "CpiFt", "Dpi", "Dpo", "Epi", "Ewc", "Grpo", "MultiStage", "RCapsule", "Sft"]
