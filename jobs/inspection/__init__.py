"""Steps of doctor, status and verify, which inspect an output or a machine."""
