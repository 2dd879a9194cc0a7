# SPDX-License-Identifier: Apache-2.0
"""The script that wrote the golden values needs mergekit, which no test does."""

collect_ignore = ["make_golden.py"]
