"""Export formats, which load without lrcompress."""
