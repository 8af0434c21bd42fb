"""A sweep: several variants at several keep ratios, and the trade-off of quality and cost."""
