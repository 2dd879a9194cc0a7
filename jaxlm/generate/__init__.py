# SPDX-License-Identifier: Apache-2.0
"""Sampling and scoring: one protocol, an embedded sampler that shares the parameters of training, a server."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Completion": "engine",
        "Engine": "engine",
        "Patience": "http_client",
        "RemoteEngine": "remote",
        "Sampler": "sampler",
        "Sampling": "engine",
        "Server": "server",
        "harness_class": "harness",
        "harness_model": "harness",
        "open_sampler": "from_disk",
    },
)
