"""The app as a Hugging Face Space, or on this machine: ``python app.py``."""

import contextlib

with contextlib.suppress(ImportError):
    import spaces  # noqa: F401  # before anything that starts CUDA

from trimtab.studio import build, launch_options

demo = build()

if __name__ == "__main__":
    demo.launch(**launch_options())
