"""EmojiScenes: a renderer of captioned compositions of emoji, its edits, and a judge of pictures of them."""

from typing import TYPE_CHECKING, Any

from .alteration import ATTRIBUTES, alter_facts, alterable_attributes, altered_captions
from .breakage import break_scene
from .captions import SceneFacts, parse_caption, write_caption
from .edit import edit
from .layout import CATEGORIES, sample_facts, sample_scene
from .scene import CANVAS, Scene, SceneObject, relation_of
from .vocabulary import BACKGROUNDS, COLOURS, OBJECTS, RELATIONS, ObjectKind, caption_words

if TYPE_CHECKING:
    from .detector import Detection
    from .judge import Verdict, check_scene, summarize

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "CANVAS",
    "CATEGORIES",
    "COLOURS",
    "OBJECTS",
    "RELATIONS",
    "Detection",
    "ObjectKind",
    "Scene",
    "SceneFacts",
    "SceneObject",
    "Verdict",
    "alter_facts",
    "alterable_attributes",
    "altered_captions",
    "break_scene",
    "caption_words",
    "check_scene",
    "edit",
    "parse_caption",
    "relation_of",
    "sample_facts",
    "sample_scene",
    "summarize",
    "write_caption",
]


def __getattr__(name: str) -> Any:
    """The judge, whose torch takes seconds to import, when it is first asked for (PEP 562)."""
    if name == "Detection":
        from .detector import Detection

        return Detection
    if name in ("Verdict", "check_scene", "summarize"):
        from . import judge

        return getattr(judge, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
