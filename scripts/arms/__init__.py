# SPDX-License-Identifier: Apache-2.0
"""What `scripts/benchmark.py` compares: each file with a `build` is one way to make a training step."""
