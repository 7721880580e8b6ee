"""Scripts that the command line runs."""
