"""Progressive Staged Training (ST): stages by layer, its colour views, and ACM."""
