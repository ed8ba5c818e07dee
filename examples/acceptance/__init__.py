"""The program behind examples/gpu_acceptance.sh: parts.py says what is run, and what must hold."""
