"""Microbenchmarks: every op beside its peers and the machine's limits, in one run. See bench/README.md."""
