"""Read pickled tensors without running their code."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import FormatError, UnsafeFileError
from adapterkit.files.opening import open_regular
from adapterkit.files.safetensors import TORCH_NAMES, check_tensor_name

if TYPE_CHECKING:
    import torch

# The globals in pickles of plain tensors. torch's weights_only unpickler runs no code, but allows more, such as
# bytearray, with which a file of a hundred bytes can allocate any amount of memory.
PLAIN = re.compile(
    r"collections OrderedDict|torch (?:\w+Storage|Size|[a-z]\w*)|torch\.storage UntypedStorage"
    r"|torch\._utils _rebuild_(?:tensor(?:_v2|_v3)?|parameter(?:_with_state)?|meta_tensor_no_storage)"
    r"|torch\._tensor _rebuild_from_type_v2|torch\.nn\.parameter Parameter"
)
MAX_OPERATIONS = 1_000_000  # of a pickle; a tensor takes about thirty


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a legacy `.bin` with torch's weights_only unpickler, which runs no code."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 6):  # CVE-2025-32434: code execution despite weights_only
        raise UnsafeFileError(f"{file}: pickled weights are only safe to read with torch 2.6 or newer")
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            if zipfile.is_zipfile(stream):
                with zipfile.ZipFile(stream) as archive:
                    inflated = sum(entry.file_size for entry in archive.infolist())
                if inflated > size:
                    raise UnsafeFileError(
                        f"{file}: its contents decompress to {inflated:,} bytes, more than the file's {size:,}; "
                        "torch writes no such file. Ask its author for a .safetensors file."
                    )
            _check_operations(stream)
            stream.seek(0)
            with warnings.catch_warnings(action="ignore"):  # about unusual pickles, which are harmless or refused
                state = torch.load(stream, map_location="cpu", weights_only=True)
    except FormatError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0][:200]
        raise UnsafeFileError(
            f"{file}: is not a plain dictionary of tensors ({reason}); it was not loaded and none of its code was run. "
            "Ask its author for a .safetensors file."
        ) from error
    except Exception as error:  # torch raises many kinds for corrupt archives
        reason = (str(error) or type(error).__name__).split("\n")[0][:200]
        raise FormatError(f"{file}: cannot be read as a torch file: {reason}. Is it complete?") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise FormatError(f"{file}: expected a dictionary of named tensors, found {type(state).__name__}")
    for name, tensor in state.items():
        check_tensor_name(file, name)
        if not isinstance(tensor, torch.Tensor):
            raise FormatError(f"{file}: {name} is a {type(tensor).__name__}, expected a tensor")
        if tensor.numel() * tensor.element_size() > size:
            raise UnsafeFileError(f"{file}: {name} is {tuple(tensor.shape)}, more than fits in {size:,} bytes")
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or str(tensor.dtype).removeprefix("torch.") not in TORCH_NAMES.values():
            raise FormatError(
                f"{file}: {name} is {tensor.layout}, {tensor.dtype} on {tensor.device}, expected a plain CPU tensor"
            )
    return {name: tensor.detach() for name, tensor in state.items()}


def _check_operations(stream: BufferedReader) -> None:
    """Raise UnpicklingError if a torch file uses globals that plain tensors don't need, before it is unpickled.

    Also if its pickles have more operations, each of which can allocate an object, than any adapter needs.
    """
    import torch

    pickles: Any
    left = MAX_OPERATIONS
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] == b"PK\x03\x04":
            stream.seek(0)
            pickles, count = io.BytesIO(torch._C.PyTorchFileReader(stream).get_record("data.pkl")), 1
        else:  # before torch 1.6: three pickles of metadata, the tensors, and the keys of their storages
            pickles, count = data, 5
        for _ in range(count):
            for code, name, _ in pickletools.genops(pickles):
                left -= 1
                if left < 0:
                    raise pickle.UnpicklingError(f"it has more than {MAX_OPERATIONS:,} operations")
                if code.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not PLAIN.fullmatch(str(name)):
                    raise pickle.UnpicklingError(f"it uses {str(name)[:60]!r}")
