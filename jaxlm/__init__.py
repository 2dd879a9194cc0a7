# SPDX-License-Identifier: Apache-2.0
"""jaxlm: adapting language models in JAX, fourteen methods on one train step.  Importing it imports nothing heavy."""

__version__ = "0.1.0"
