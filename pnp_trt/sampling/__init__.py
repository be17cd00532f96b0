"""From noise to latents with numpy alone: schedules, methods and loops."""
