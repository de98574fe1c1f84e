"""The faults of a data file, each with its own code. All of them are `DataError`."""

from __future__ import annotations

from engine.errors import DataError


class FileError(DataError):
    """There is no such file, it is a folder, or it cannot be opened."""

    code = "data-file"


class KindError(DataError):
    """The name ends in something we do not read, or the content is not what the name says."""

    code = "data-kind"


class EmptyError(DataError):
    """Nothing in the file, only white space, or only a header."""

    code = "data-empty"


class TooLargeError(DataError):
    """More bytes, rows, columns or nested values than the limits allow."""

    code = "data-too-large"


class EncodingError(DataError):
    """The bytes are not the text encoding that they should be."""

    code = "data-encoding"


class DelimiterError(DataError):
    """A csv whose cells cannot be told apart with confidence."""

    code = "data-delimiter"


class JsonError(DataError):
    """JSON that cannot be parsed, is nested too deeply, or is no list of rows."""

    code = "data-json"


class ParquetError(DataError):
    """A file named .parquet that is no readable Parquet file."""

    code = "data-not-parquet"


class ArchiveError(DataError):
    """A zip that cannot be read, is encrypted, or holds names that lead out of it."""

    code = "data-zip"


class PictureError(DataError):
    """A picture that is not there, damaged, or too large to open."""

    code = "picture"

    def __init__(self, message: str, hint: str = "", code: str | None = None) -> None:
        super().__init__(message, hint)
        if code:
            self.code = code


class FormatError(DataError):
    """No known format fits the columns, or the format asked for does not exist."""

    code = "data-format"


class ColumnError(DataError):
    """A column that is needed or was asked for is not there."""

    code = "data-column"


class NothingLeftError(DataError):
    """Every row was skipped."""

    code = "data-nothing-left"


class FixError(DataError):
    """A fix that does not exist, or not for this cause."""

    code = "data-fix"


class NotTakenError(FormatError):
    """The data's format is clear, and nothing that the run can learn from.

    Args:
        found: the data's format.
    """

    def __init__(self, message: str, hint: str = "", found: str = "") -> None:
        super().__init__(message, hint)
        self.found = found


class ClassesError(DataError):
    """The labels are no classes: all rows have the same one, or each row has its own."""

    code = "data-classes"
