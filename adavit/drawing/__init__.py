"""A picture of what a run kept of each image; it needs Pillow and numpy alone."""

from adavit.drawing.draw import MOST_IMAGES, draw
from adavit.drawing.pictures import normalised

__all__ = ["MOST_IMAGES", "draw", "normalised"]
