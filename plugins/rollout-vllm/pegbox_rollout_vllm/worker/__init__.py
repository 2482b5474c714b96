"""What vLLM's workers import: this folder is put on the PYTHONPATH of a server that takes weights by broadcast."""
