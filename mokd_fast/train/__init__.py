"""The trainer: recipe, schedules, optimizers, loop, checkpoints."""
