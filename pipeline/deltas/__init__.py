"""What is added to a picture: deltas, what makes them, and the protection file that holds it."""
