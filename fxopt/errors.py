"""Everything that fxopt raises on purpose: one small tree, each error one line that says what to do."""


class FxoptError(Exception):
    """The root of the tree: whatever fxopt refuses, it refuses with one of these."""


class UsageError(FxoptError, ValueError):
    """An argument is wrong: it names what was given, what was expected and what to do."""


class CaptureError(FxoptError):
    """No part of a model could be captured as a graph, or the example inputs do not fit the model."""


class TransformationError(FxoptError):
    """A transformation failed; the graph module is as it was before."""


class IrreversibleEdit(TransformationError):
    """A transformation changed something that no delta can put back, such as a parameter in place."""


class VerificationError(FxoptError):
    """A transformed graph module does not compute what the original computes."""


class Conflict(FxoptError):
    """An undo would lose somebody else's edits; nothing was changed."""


class BenchmarkError(FxoptError):
    """A measurement could not be made: the function failed, or the device is not there."""


class StoreError(FxoptError):
    """A saved result cannot be written, read, or replayed to what was saved."""
