"""Files, text, images and JSON of users; signals and child processes."""
