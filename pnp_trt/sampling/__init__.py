"""Sampling latents from noise with numpy alone: schedules, methods and loops."""
