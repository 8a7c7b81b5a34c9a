"""Ray plumbing: connection, placement, streams, failures, metrics."""
