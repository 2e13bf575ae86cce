"""How the bundled models are made, runnable end to end: scenes, training steps, and a judge of the pictures."""
