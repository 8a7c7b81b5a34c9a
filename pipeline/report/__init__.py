"""A run's report page, and what all report pages share."""
