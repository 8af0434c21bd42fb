"""Speed of a model where it is served: through the HTTP API of vLLM or llama.cpp."""
