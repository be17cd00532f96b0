"""Input and output: files, text, images and JSON from users; signals and child processes."""
