"""More examples from those there are: words replaced, slips of typing, texts rewritten, and examples newly written."""

from luthier.data.augmentation.augmentation import Augmentation
from luthier.data.augmentation.noise import noise_injection
from luthier.data.augmentation.report import AugmentationReport, render_augmentation
from luthier.data.augmentation.rewriting import back_translation, paraphrase
from luthier.data.augmentation.self_instruct import Generated, self_instruct
from luthier.data.augmentation.synonyms import synonym_replacement
from luthier.data.augmentation.ways import Augmenter, AugmenterInfo, augmenters

__all__ = [
    "Augmentation",
    "AugmentationReport",
    "Augmenter",
    "AugmenterInfo",
    "Generated",
    "augmenters",
    "back_translation",
    "noise_injection",
    "paraphrase",
    "render_augmentation",
    "self_instruct",
    "synonym_replacement",
]
