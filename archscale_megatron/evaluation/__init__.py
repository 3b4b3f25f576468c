"""How good is a model? Benchmarks, long context and reasoning, of a checkpoint or an export."""
