"""From the MODEL argument to a loaded model: locate, check, load, offload, quantize and inspect."""
