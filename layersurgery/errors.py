"""What can go wrong, by whose hand it is mended.

Every error this package raises on purpose is a `LayerSurgeryError`. Its text says what was asked, where, what was
found instead and what to do; the command line prints it without a traceback.
"""


class LayerSurgeryError(Exception):
    """Base of all errors raised on purpose."""


class PlanError(LayerSurgeryError, ValueError):
    """A plan, an edit or a route that cannot be meant as written. Mended by writing another plan."""


class SourceError(LayerSurgeryError):
    """A model that cannot be found or read: missing, damaged, or in a format that is not read."""


class UnsupportedEditError(LayerSurgeryError):
    """An edit whose result no Hugging Face checkpoint of this architecture can say."""


class OutputError(LayerSurgeryError):
    """A place that cannot be written: it exists, is full, forbidden, or inside the source."""


class UndoError(LayerSurgeryError):
    """An edit of a live model that is not undone, because somebody else has edited the model since."""


class MeasurementError(LayerSurgeryError):
    """A model that cannot be measured as asked: its numbers are no numbers, or there is not enough memory or text."""
