"""python -m lrcompress.lm_eval ...: lm-eval's own command line, with low-rank models loadable."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
