"""Progressive Staged Training (ST): layer stages, colour views and ACM."""
