"""Serves a GGUF file by xllamacpp until it is stopped: MODEL PORT CONTEXT PARALLEL THREADS.

Run by the Python of the user's environment, which has xllamacpp and not lrcompress. THREADS 0
leaves them to llama.cpp.
"""

from __future__ import annotations

import signal
import sys


def main(model: str, port: int, context: int, parallel: int, threads: int) -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.hostnames, parameters.port = ["127.0.0.1"], port
    parameters.n_ctx, parameters.n_parallel = context, parallel
    if threads:
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)  # serves for as long as it lives
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del server


if __name__ == "__main__":
    # blocked before threads start: these inherit the mask, and `sigwait` alone takes the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(sys.argv[1], *map(int, sys.argv[2:]))
