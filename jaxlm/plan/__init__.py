# SPDX-License-Identifier: Apache-2.0
"""What a run would take of every device, before anyone pays for one: by shapes, and by compiling its step.

Files: outline (a run as shapes), activations (a model of the step), memory (the table), compiled (XLA's own figures),
hlo (collectives and products of a compiled program), bounds (time and MFU from those).
"""
