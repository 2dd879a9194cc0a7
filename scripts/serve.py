# SPDX-License-Identifier: Apache-2.0
"""Serves a model over HTTP as OpenAI does: completions, chats, streams, log-probs; docs/serving.md tells the rest.

  python scripts/serve.py SmolLM2-135M-Instruct.Q4_1.gguf --slots 4 --size 512
  SERVER_KEY=... python scripts/serve.py runs/quickstart --host 0.0.0.0 --port 8080 --key-variable SERVER_KEY

It is seen by this machine only unless --host says otherwise, and stops on SIGTERM or Ctrl-C.
"""

import pathlib

from jaxlm.command import Parser, call


def main() -> int:
    """Reads the arguments, loads the model, serves until it is told to stop."""
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="a Hugging Face folder, a .gguf file or a run directory")
    parser.add_argument("--name", help="of the model in requests (default: the file's or folder's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--slots", type=int, default=16, help="samples that are decoded at once (default 16)")
    parser.add_argument("--size", type=int, help="tokens of prompt and completion together (default: the model's)")
    parser.add_argument("--dtype", default="float32", help="of the computation: float32 or bfloat16")
    parser.add_argument("--key-variable", metavar="NAME", help="environment variable with the key clients must show")
    parser.add_argument("--quiet", action="store_true", help="do not tell each request on stderr")
    arguments = parser.parse_args()
    # Late, because they import jax, and --help must not.
    from jaxlm.generate.from_disk import open_sampler
    from jaxlm.generate.server import Server, serve_until_signalled

    sampler = open_sampler(arguments.model, slots=arguments.slots, size=arguments.size, dtype=arguments.dtype)
    server = Server(
        sampler,
        arguments.name or pathlib.Path(arguments.model).name,
        host=arguments.host,
        port=arguments.port,
        key_variable=arguments.key_variable,
        log=not arguments.quiet,
    )
    print(f"serving {server.model} at {server.url}", flush=True)
    serve_until_signalled(server)
    print("stopped", flush=True)
    return 0


if __name__ == "__main__":
    call(main)
