"""Cleaning rows: built-in cleaners and filters, a user's own, and an account of what each of them did."""

from luthier.data.cleaning.personal import PersonalData, find_personal_data
from luthier.data.cleaning.pipeline import Cleaning
from luthier.data.cleaning.registry import Cleaner, Option, cleaners
from luthier.data.cleaning.report import Sample, StepReport, render_cleaners, render_cleaning

__all__ = [
    "Cleaner",
    "Cleaning",
    "Option",
    "PersonalData",
    "Sample",
    "StepReport",
    "cleaners",
    "find_personal_data",
    "render_cleaners",
    "render_cleaning",
]
