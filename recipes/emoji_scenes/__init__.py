"""EmojiScenes: a renderer of captioned compositions of emoji, and the models trained on it."""
