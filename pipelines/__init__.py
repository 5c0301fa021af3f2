"""The pipeline around the library: configuration, plan, run and command line."""
