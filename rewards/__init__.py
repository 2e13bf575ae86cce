"""Rewards: frozen, differentiable functions of pictures and prompts, higher is better."""

from .aesthetic import AestheticReward
from .base import RewardModel
from .clip import CLIPReward
from .contrast import ContrastReward
from .function import CallableReward
from .head_tuning import TunedHead, tune_personal_reward
from .hps import HPSReward, clip_model_from_open_clip
from .image_reward import ImageReward
from .load import REWARDS, load_reward, save_weights, weights_folder
from .palette import PaletteReward
from .personal import PersonalReward, fit_personal_reward
from .resize import Preprocessing, center_crop, resize
from .similarity import ImageSimilarityReward
from .weighted import PRESETS, WeightedReward

__all__ = [
    "PRESETS",
    "REWARDS",
    "AestheticReward",
    "CLIPReward",
    "CallableReward",
    "ContrastReward",
    "HPSReward",
    "ImageReward",
    "ImageSimilarityReward",
    "PaletteReward",
    "PersonalReward",
    "Preprocessing",
    "RewardModel",
    "TunedHead",
    "WeightedReward",
    "center_crop",
    "clip_model_from_open_clip",
    "fit_personal_reward",
    "load_reward",
    "resize",
    "save_weights",
    "tune_personal_reward",
    "weights_folder",
]
