"""The workers: one shard in, results out. Benchmarks, evaluation, scoring and the loop of one worker."""
