"""Stock Diffusers pipelines as functions of their noise, and what is done to such a function."""
