"""Text in: documents from files, tokenizers, calibration and evaluation windows that never overlap."""

from topiarist.data.text import (
    TextFiles,
    Windows,
    calibration_windows,
    evaluation_windows,
    load_tokenizer,
    read_documents,
    text_files,
)

__all__ = [
    "TextFiles",
    "Windows",
    "calibration_windows",
    "evaluation_windows",
    "load_tokenizer",
    "read_documents",
    "text_files",
]
