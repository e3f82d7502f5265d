"""Studies: what the paper measured once, measured again on any problem, and judged by the data."""
