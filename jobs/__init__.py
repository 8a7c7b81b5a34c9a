"""What people start: flags, the order of the stages, exit codes."""
