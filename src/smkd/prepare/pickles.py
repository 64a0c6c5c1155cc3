"""A restricted unpickler for the two kinds of pickle that data sets come in: it knows dicts, lists, text, numbers and
NumPy arrays of integers, and imports and calls nothing.

Large arrays stay in the file: what comes back says where their bytes are.
"""

from __future__ import annotations

import pickle
from math import prod
from typing import IO, Any, ClassVar, NamedTuple

from smkd.errors import DataError

LARGE = 64 * 1024
"""Bytes from which an array's content is left in the file."""
DTYPES = ("u1", "i4", "i8")


class Span(NamedTuple):
    """Where in the file bytes are; a tuple, which no opcode can change."""

    offset: int
    size: int


class PickledArray:
    """A C-ordered array: its shape, its type (as in `DTYPES`) and its content."""

    shape: tuple[int, ...] = ()
    dtype: str = ""
    content: Span | bytes = b""

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple() as shape, _Dtype(code=code), fortran, Span() | bytes() as content) if not fortran:
                size = content.size if isinstance(content, Span) else len(content)
                if not all(isinstance(n, int) and n >= 0 for n in shape) or prod(shape) * int(code[1]) != size:
                    raise pickle.UnpicklingError(f"an array of shape {shape} and type {code} has {size} bytes")
                self.shape, self.dtype, self.content = shape, code, content
            case _:
                raise pickle.UnpicklingError("an array is not a plain C-ordered array of integers")


class _Dtype:
    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) > 1 and _text(state[1]) in ("<", "|")):
            raise pickle.UnpicklingError("an array type is not little-endian")


class _MakeArray:
    __slots__ = ()

    def __call__(self, kind: object, shape: object, code: object) -> PickledArray:
        if not isinstance(kind, _ArrayKind) or shape != (0,):
            raise pickle.UnpicklingError("an array is built in an unusual way")
        return PickledArray()


class _ArrayKind:
    """Stands for `numpy.ndarray`; it cannot be called."""

    __slots__ = ()


class _MakeDtype:
    __slots__ = ()

    def __call__(self, code: object, align: object = False, copy: object = True) -> _Dtype:
        name = _text(code)
        if name not in DTYPES:
            raise pickle.UnpicklingError(f"an array is of type {name!r}; known: {', '.join(DTYPES)}")
        return _Dtype(name)


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _MakeArray,
    ("numpy._core.multiarray", "_reconstruct"): _MakeArray,
    ("numpy", "ndarray"): _ArrayKind,
    ("numpy", "dtype"): _MakeDtype,
}


# The Python version of the standard unpickler, because the C version reads an 800 MB array into memory twice.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, fix_imports=False, encoding="bytes")
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which data does not need")
        return _ALLOWED[module, name]()

    def _bytes(self, width: int) -> None:
        size = int.from_bytes(self.read(width), "little")  # type: ignore[attr-defined]
        framed = self._unframer.current_frame  # type: ignore[attr-defined]
        if size < LARGE or (framed is not None and framed.tell() < len(framed.getbuffer())):
            self._push(self.read(size), size)  # type: ignore[attr-defined]
            return
        offset = self._file.tell()
        end = self._file.seek(0, 2)
        if offset + size > end:
            raise pickle.UnpicklingError("it is cut short")
        self._file.seek(offset + size)
        self._push(Span(offset, size), size)

    def _push(self, value: Span | bytes, size: int) -> None:
        if isinstance(value, bytes) and len(value) != size:
            raise pickle.UnpicklingError("it is cut short")
        self.append(value)  # type: ignore[attr-defined]

    dispatch[pickle.BINSTRING[0]] = lambda self: self._bytes(4)
    dispatch[pickle.BINBYTES[0]] = lambda self: self._bytes(4)
    dispatch[pickle.BINBYTES8[0]] = lambda self: self._bytes(8)


def read_pickle(file: IO[bytes], label: str) -> dict[str, Any]:
    """The dict a pickle holds, its keys as text.

    Args:
        file: binary file that can seek.
        label: what messages call it.

    Raises:
        DataError: it would run code, is damaged, or is not a dict.
    """
    try:
        value = _Unpickler(file).load()
    except Exception as error:  # a hostile pickle can make the machine stumble in any way
        raise DataError(f"pickle '{label}' is refused: {str(error) or type(error).__name__}") from error
    if not isinstance(value, dict):
        raise DataError(f"pickle '{label}' holds a {type(value).__name__}; a dict is expected")
    return {_text(key): item for key, item in value.items()}


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
