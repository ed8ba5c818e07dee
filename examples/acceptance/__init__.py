"""The program behind examples/gpu_acceptance.sh; parts.py has the table of its parts and their conditions."""
