"""The commands of ``trimtab``, one file each.

A command's file has ``add_parser(subparsers)`` and ``run(args)``. Parsing must not wait for torch, so
what needs it is imported in ``run``.
"""
