"""Load models and tokenizers with transformers, from checked files only and without running their code.

In an untrusted folder transformers may find other weights than the checked ones, such as pickles, or an adapter,
kernels to download, or code. So it gets a temporary folder with the sanitized config, links to the checked shards, and
copies of the small files.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from adapterkit.base.checkpoint import CONFIG, INDEX_SUFFIX, SINGLE, Checkpoint
from adapterkit.base.models.quantized_layers import has_scales, is_quantized
from adapterkit.base.models.tokenizing import check_loading
from adapterkit.errors import FormatError, MissingPackageError, UnsafeFileError
from adapterkit.files.jsonfile import read_json
from adapterkit.files.opening import open_inside, read_up_to
from adapterkit.files.staging import map_os_errors
from adapterkit.packages import needed

MAX_GROWTH = 100  # of a text by a normalizer; real ones grow it a few times
MAX_ERROR_CHARS = 240
# Files of tokenizers, and generation_config.json.
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".codes", ".spm", ".tiktoken", ".tokenizer", ".vocab")
TEMPLATES = Path("additional_chat_templates")
MAX_SMALL_BYTES = 1 << 28
# Config keys that make transformers load code or other weights.
UNSAFE_KEYS = ("auto_map", "transformers_weights")
KERNELS = re.compile("_implementation(_internal)?$")  # of attention or experts; a value with a slash is a Hub id


def load_tokenizer(base: Checkpoint) -> Any:
    """Load the tokenizer of `base`; raises FormatError if it has none, UnsafeFileError if it needs its own code."""
    with quiet():
        from transformers import AutoTokenizer

        with _folder_for(base) as folder:
            check_loading(folder, base.name)
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            except Exception as error:  # untrusted files can make transformers raise anything
                _check_needs_code(base, error)
                reason = _shorten(error, folder, base)
                raise FormatError(f"{base.path}: transformers cannot load a tokenizer from it: {reason}") from error
    _check_growth(tokenizer, base)
    tokenizer.name_or_path = base.name
    if not isinstance(tokenizer.model_max_length, int | float):
        tokenizer.model_max_length = int(1e30)  # transformers' default
    return tokenizer


def load_causal(base: Checkpoint, **options: Any) -> Any:
    """Load the causal language model of `base` with transformers, passing it `options`.

    Raises FormatError if the weights don't match the config, UnsafeFileError if the model needs its own code.
    """
    with quiet():
        from transformers import AutoModelForCausalLM

        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that they are reported below
        with _folder_for(base) as folder:
            try:
                model, found = cast(Any, AutoModelForCausalLM).from_pretrained(
                    folder, use_safetensors=True, trust_remote_code=False, **options
                )
            except ImportError as error:  # for example of bitsandbytes, which only some models need
                reason = _shorten(error, folder, base)
                raise MissingPackageError(
                    f"{base.path}: transformers needs another package to load it: {reason}"
                ) from error
            except Exception as error:
                reason = _shorten(error, folder, base)
                raise FormatError(f"{base.path}: transformers cannot load a model from it: {reason}") from error
    # transformers fills missing and mismatched tensors with random numbers.
    for name, stored, expected in found["mismatched_keys"]:
        raise FormatError(f"{base.path}: {name} has shape {tuple(stored)}, but its config expects {tuple(expected)}")
    if missing := sorted(found["missing_keys"]):
        count = f"{len(missing)} tensor{'s' * (len(missing) > 1)}"
        raise FormatError(f"{base.path}: lacks {count} that its config requires, such as {missing[0]}")
    for name, layer in model.named_modules():
        if is_quantized(layer) and not has_scales(layer):
            raise FormatError(
                f"{base.path}: {name}.weight is not quantized, but the config says so; remove quantization_config"
            )
    model.config.name_or_path, model.config.return_dict = base.name, True
    model.config.output_hidden_states = model.config.output_attentions = False  # unused
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, logs and warnings; raises MissingPackageError if it isn't installed."""
    logging = needed("transformers.utils.logging", "running a model")
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL + 1)  # it logs pages about errors that it also raises
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _folder_for(base: Checkpoint) -> Iterator[Path]:
    """Yield a temporary folder with the files of `base` that transformers may load."""
    check_model_type(base)
    with TemporaryDirectory(prefix="adapterkit-") as name:
        with map_os_errors(Path(name)):
            _fill(Path(name), base)
        yield Path(name)


def _fill(folder: Path, base: Checkpoint) -> None:
    (folder / CONFIG).write_text(json.dumps(sanitized(base.config)), "utf-8")
    several = len(base.shards) > 1
    for shard in base.shards:
        (folder / (shard.file.name if several else SINGLE)).symlink_to(shard.file.resolve())
    if several:
        weight_map = {name: info.file.name for name, info in base.tensors.items()}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"model{INDEX_SUFFIX}").write_text(json.dumps(index), "utf-8")
    for file in base.other_files()[0]:
        if file.suffix in SMALL_FILES and file.parent in (Path(), TEMPLATES):
            (folder / file).parent.mkdir(exist_ok=True)
            with open_inside(base.path, file) as stream:
                (folder / file).write_bytes(read_up_to(stream, MAX_SMALL_BYTES, base.path / file))


def sanitized(config: Any) -> Any:
    """Return `config` without keys that make transformers load code, other weights, or kernels from the Hub."""
    if not isinstance(config, dict):
        return config
    return {
        key: sanitized(value)
        for key, value in config.items()
        if key not in UNSAFE_KEYS and not (KERNELS.search(key) and "/" in json.dumps(value))
    }


def check_model_type(base: Checkpoint) -> None:
    """Raise FormatError if transformers doesn't support the model, UnsafeFileError if it needs its own code."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = base.config.get("model_type")
    if kind not in CONFIG_MAPPING:
        problem = f"model_type is {kind!r}, which transformers {transformers.__version__} does not support"
        if "auto_map" in base.config:
            raise UnsafeFileError(f"{base.path / CONFIG}: {problem}; the model's own code (auto_map) is never run")
        raise FormatError(f"{base.path / CONFIG}: {problem}")


def _check_growth(tokenizer: Any, base: Checkpoint) -> None:
    """Raise FormatError if a normalizer could make a text many times longer."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    growth, nodes = 1, [json.loads(normalizer.__getstate__())] if normalizer is not None else []
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            growth *= max(1, len(str(node.get("content", ""))))
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node
    if growth > MAX_GROWTH:
        raise FormatError(
            f"{base.path / 'tokenizer.json'}: its normalizer makes text more than {MAX_GROWTH} times longer"
        )


def _check_needs_code(base: Checkpoint, error: Exception) -> None:
    """Raise UnsafeFileError if the tokenizer failed to load because it needs its own code."""
    file = base.path / "tokenizer_config.json"
    if file.is_file() and "auto_map" in read_json(file):
        raise UnsafeFileError(f"{file}: needs the tokenizer's own code (auto_map), which is never run") from error


def _shorten(error: Exception, folder: Path, base: Checkpoint) -> str:
    """Return transformers' message in one line, with the base's path for the temporary folder's."""
    text = " ".join(str(error).replace(str(folder), str(base.path)).split()) or type(error).__name__
    return text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + " …"
