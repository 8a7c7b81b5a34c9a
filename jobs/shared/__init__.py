"""What all jobs share: the command line, progress, metrics."""
