"""A Hugging Face model as blocks of prunable matrices, from a folder or from memory."""

from topiarist.models.derive import family_of
from topiarist.models.families import FAMILIES, Family, Matrix, matrices_of

__all__ = ["FAMILIES", "Family", "Matrix", "family_of", "matrices_of"]
