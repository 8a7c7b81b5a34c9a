"""Options and steps of evaluate_relearning."""
