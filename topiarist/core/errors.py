"""The few typed errors. Each carries one line: the cause, then the cure. The CLI prints it and exits with code 2."""


class TopiaristError(Exception):
    """Base of every error a user can cause or cure."""


class PatternError(TopiaristError, ValueError):
    """A pattern that cannot be parsed, or that does not fit a weight's shape."""


class CalibrationError(TopiaristError, ValueError):
    """Calibration or evaluation text that is missing, too short, or shared between the two."""


class NumericalError(TopiaristError, ArithmeticError):
    """NaN or Inf in weights, activations or Grams, or a factorisation that no damping repairs."""


class DamagedWeights(NumericalError):
    """NaN or Inf in the weights of a model: nothing that was made of it is of use."""


class CheckpointError(TopiaristError, OSError):
    """A model folder that cannot be read safely, or an output folder that cannot be written."""


class QuantizationError(TopiaristError, ValueError):
    """A grid that does not fit a weight, or quantised tensors that cannot be read."""


class UnsupportedModel(TopiaristError, NotImplementedError):
    """A model type, or a part of one, that topiarist has no row of knowledge about."""


class DeviceError(TopiaristError, RuntimeError):
    """A device that is not here."""


class ProcessError(TopiaristError, RuntimeError):
    """Processes of one run that cannot share it, do not agree on it, or have lost one another."""


class LostProcess(ProcessError):
    """A process of a run that cannot be reached any more, because it ended or the network did."""


class NumericalWarning(UserWarning):
    """Numerical trouble that was repaired; the message names the value used."""


class CalibrationWarning(UserWarning):
    """Calibration data so thin that the result may suffer; the message gives both numbers."""


def first_line(error: BaseException) -> str:
    """What another library's error says, for a line of ours: the first of its own, or its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
