"""The parts of scripts/reproduce_sparse_kd.py."""
