"""python -m lrcompress: the same as the command lrcompress, for torchrun and the like."""

from lrcompress.cli.app import main

main(prog_name="lrcompress")
