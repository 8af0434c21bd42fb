"""What commands import, for the server that forks them: nothing of it starts a thread."""

import matplotlib.backends.backend_agg  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

import lrcompress.console
import lrcompress.pipeline
import lrcompress.pretrain
import lrcompress.sweep  # noqa: F401
