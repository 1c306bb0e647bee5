"""What experiments/fuzz.py runs: changes to valid files, readers, and the process that reads."""
