"""The official training step in plain PyTorch: baseline of the benchmarks, oracle of the tests."""
