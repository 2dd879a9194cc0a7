# SPDX-License-Identifier: Apache-2.0
"""The methods, one file each. METHODS is the explicit table: to be in it is to be tested."""

from jaxlm.methods.sft import Sft

METHODS = {"sft": Sft}

__all__ = ["METHODS", "Sft"]
