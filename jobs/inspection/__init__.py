"""Steps of doctor, status and verify, which look at what is there."""
