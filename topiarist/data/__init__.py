"""Text in: documents from files of every kind, tokenizers, calibration and evaluation windows that never overlap."""

from topiarist.data.overlap import MAX_SHARED
from topiarist.data.text import TextFiles, check_heeded, read_documents, text_files
from topiarist.data.tokenizer import Bos, load_tokenizer, start_tokens
from topiarist.data.windows import Windows, calibration_windows, check_vocabulary, evaluation_windows

__all__ = [
    "MAX_SHARED",
    "Bos",
    "TextFiles",
    "Windows",
    "calibration_windows",
    "check_heeded",
    "check_vocabulary",
    "evaluation_windows",
    "load_tokenizer",
    "read_documents",
    "start_tokens",
    "text_files",
]
