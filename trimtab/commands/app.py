"""``trimtab app``: the app in a browser."""

import argparse
import os
from typing import Any

from trimtab.commands.errors import UsageError
from trimtab.commands.model import check_model

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "app",
        help="the app in a browser",
        description="Opens the Gradio app on this machine. Its limits are environment variables: TRIMTAB_MODEL, "
        "TRIMTAB_ALLOWED_MODELS, TRIMTAB_ALLOWED_REWARDS, TRIMTAB_LARGEST_PICTURE, TRIMTAB_LARGEST_UPLOAD, "
        "TRIMTAB_LONGEST_RUN and TRIMTAB_QUEUE_LENGTH.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="MODEL", help="a Diffusers folder or a Hub id (default: TRIMTAB_MODEL, or the bundled one)")
    add("--host", default="127.0.0.1", metavar="NAME", help="0.0.0.0 lets other machines in (default: 127.0.0.1)")
    add("--port", type=int, metavar="PORT", help="default: the first free one from 7860")
    add("--browser", action="store_true", help="open a browser")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the app until it is interrupted.

    Raises:
        UsageError: if gradio is missing, or the model or a limit cannot be used.
    """
    if args.model is not None:
        check_model(args.model)
        os.environ["TRIMTAB_MODEL"] = args.model
    try:
        from trimtab.studio import build, launch_options

        page = build()
    except ImportError as error:
        raise UsageError(f"the app needs gradio: pip install 'trimtab[app]' ({error.name} is missing)") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    page.launch(server_name=args.host, server_port=args.port, inbrowser=args.browser, **launch_options())
