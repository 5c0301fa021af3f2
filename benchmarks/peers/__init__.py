"""Other tools beside which ours are measured, a module for each, run in its own environment."""
