"""A plug-in of vLLM that serves the checkpoints of lrcompress as they are."""


def register() -> None:
    """The entry point `vllm.general_plugins`, which vLLM calls once or more in every process."""
    from vllm_lrcompress import config

    config.register()
