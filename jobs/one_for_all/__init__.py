"""Options and steps of train_one_for_all."""
