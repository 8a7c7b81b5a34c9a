"""Options and steps of protect_imagenet."""
