"""EmojiScenes: a renderer of captioned compositions of emoji, its edits, and a judge of pictures of them."""

from .alteration import ATTRIBUTES, alter_facts, alterable_attributes, altered_captions
from .breakage import break_scene
from .captions import SceneFacts, parse_caption, write_caption
from .detector import Detection
from .edit import edit
from .judge import Verdict, check_scene, summarize
from .layout import CATEGORIES, sample_facts, sample_scene
from .scene import CANVAS, Scene, SceneObject, relation_of
from .vocabulary import BACKGROUNDS, COLOURS, OBJECTS, RELATIONS, ObjectKind, caption_words

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
