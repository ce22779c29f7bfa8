"""A picture of what a run kept of each image; it needs Pillow and numpy alone."""

from adavit.drawing.draw import MOST_IMAGES, draw
from adavit.drawing.pictures import normalised
from adavit.drawing.sample import Sample

__all__ = ["MOST_IMAGES", "Sample", "draw", "normalised"]
