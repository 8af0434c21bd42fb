"""What commands import, for the server that forks them: nothing of it starts a thread."""

import matplotlib.backends.backend_agg
import transformers.models.llama.modeling_llama
import transformers.trainer

import lrcompress.console
import lrcompress.pipeline
import lrcompress.pretrain
import lrcompress.sweep  # noqa: F401
