"""One training step of every pipeline stage without a cluster: see `python -m archscale_megatron.dryrun --help`."""
