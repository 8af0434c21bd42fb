"""The imports of the server process that forks commands; none of them starts a thread."""

import matplotlib.backends.backend_agg  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

import lrcompress.cli.display
import lrcompress.training.pretrain
import lrcompress.workflows.run.pipeline
import lrcompress.workflows.sweep.sweep  # noqa: F401
