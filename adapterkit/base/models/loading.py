"""Models and tokenizers as transformers loads them: from the files that were checked alone, and without their code.

transformers looks for what it loads by itself, and in a stranger's folder may find other weights than those that were
checked, pickles among them, an adapter, kernels to download, or code. So it is given a folder of ours: the config as it
was read, links to the checked shards, and copies of the small files beside them.
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
from adapterkit.base.models.tokenizing import check_loading
from adapterkit.base.quant.bnb_layers import has_scales, is_quantized
from adapterkit.errors import FormatError, MissingPackageError, UnsafeFileError
from adapterkit.files.jsonfile import read_json
from adapterkit.files.opening import open_inside, read_up_to
from adapterkit.files.staging import map_os_errors
from adapterkit.packages import needed

GROWN = 100  # times that a normalizer may make a text longer; of real ones a few
SHOWN = 240  # characters of an error of transformers'
# What tokenizers are made of, and generation_config.json.
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".codes", ".spm", ".tiktoken", ".tokenizer", ".vocab")
TEMPLATES = Path("additional_chat_templates")
MAX_SMALL_BYTES = 1 << 28
# Keys of a config by which transformers loads code, or other weights.
LOADS_MORE = ("auto_map", "transformers_weights")
KERNELS = re.compile("_implementation(_internal)?$")  # of attention or experts; with a slash in it, it is on the Hub


def load_tokenizer(base: Checkpoint) -> Any:
    """Load the tokenizer of `base`. Raises FormatError if it has none, UnsafeFileError if loading it would run code."""
    with quiet():
        from transformers import AutoTokenizer

        with _folder_for(base) as folder:
            check_loading(folder, base.name)
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            except Exception as error:  # of strangers' files transformers raises all kinds
                _refuse_code(base, error)
                reason = _shortened(error, folder, base)
                raise FormatError(f"{base.path}: transformers finds no tokenizer there: {reason}") from error
    _check_growth(tokenizer, base)
    tokenizer.name_or_path = base.name
    if not isinstance(tokenizer.model_max_length, int | float):
        tokenizer.model_max_length = int(1e30)  # as transformers has it where none is said
    return tokenizer


def load_causal(base: Checkpoint, **options: Any) -> Any:
    """The causal language model of `base`, loaded by transformers with `options`.

    Raises FormatError where the weights do not make the model that the config describes, UnsafeFileError where that is
    code of its own.
    """
    with quiet():
        from transformers import AutoModelForCausalLM

        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that they are told here
        with _folder_for(base) as folder:
            try:
                model, found = cast(Any, AutoModelForCausalLM).from_pretrained(
                    folder, use_safetensors=True, trust_remote_code=False, **options
                )
            except ImportError as error:  # of bitsandbytes, say, which only some models need
                reason = _shortened(error, folder, base)
                raise MissingPackageError(
                    f"{base.path}: transformers needs another package for it: {reason}"
                ) from error
            except Exception as error:
                reason = _shortened(error, folder, base)
                raise FormatError(f"{base.path}: transformers loads no model from there: {reason}") from error
    # What is missing or of another shape, transformers would fill with random numbers.
    for name, stored, wanted in found["mismatched_keys"]:
        raise FormatError(f"{base.path}: {name} is {tuple(stored)}, its config makes it {tuple(wanted)}")
    if missing := sorted(found["missing_keys"]):
        count = f"{len(missing)} tensor{'s' * (len(missing) > 1)}"
        raise FormatError(f"{base.path}: lacks {count} that its config speaks of, such as {missing[0]}")
    for name, layer in model.named_modules():
        if is_quantized(layer) and not has_scales(layer):
            raise FormatError(
                f"{base.path}: {name}.weight is not quantized, as the config says it is; remove quantization_config"
            )
    model.config.name_or_path, model.config.return_dict = base.name, True
    model.config.output_hidden_states = model.config.output_attentions = False  # of which neither is looked at
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars, logs and warnings from the terminal; raises MissingPackageError where it is missing."""
    logging = needed("transformers.utils.logging", "running a model")
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL + 1)  # it logs pages for an error that it then raises
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _folder_for(base: Checkpoint) -> Iterator[Path]:
    """A folder with what transformers may load of `base`, for as long as it loads."""
    refuse_unknown(base)
    with TemporaryDirectory(prefix="adapterkit-") as name:
        with map_os_errors(Path(name)):
            _fill(Path(name), base)
        yield Path(name)


def _fill(folder: Path, base: Checkpoint) -> None:
    (folder / CONFIG).write_text(json.dumps(harmless(base.config)), "utf-8")
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


def harmless(config: Any) -> Any:
    """`config` without what has transformers load other weights or code, kernels from the Hub among it."""
    if not isinstance(config, dict):
        return config
    return {
        key: harmless(value)
        for key, value in config.items()
        if key not in LOADS_MORE and not (KERNELS.search(key) and "/" in json.dumps(value))
    }


def refuse_unknown(base: Checkpoint) -> None:
    """Raise, before anything is loaded, where transformers has no code of its own for the model."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = base.config.get("model_type")
    if kind not in CONFIG_MAPPING:
        what = f"model_type is {kind!r}, which transformers {transformers.__version__} does not know"
        if "auto_map" in base.config:
            raise UnsafeFileError(f"{base.path / CONFIG}: {what}; the model's own code (auto_map) is never run")
        raise FormatError(f"{base.path / CONFIG}: {what}")


def _check_growth(tokenizer: Any, base: Checkpoint) -> None:
    """Raise FormatError where a normalizer would write a text many times as long, before it gets one."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    grown, nodes = 1, [json.loads(normalizer.__getstate__())] if normalizer is not None else []
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            grown *= max(1, len(str(node.get("content", ""))))
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node
    if grown > GROWN:
        raise FormatError(
            f"{base.path / 'tokenizer.json'}: its normalizer makes a text more than {GROWN} times as long"
        )


def _refuse_code(base: Checkpoint, error: Exception) -> None:
    """Raise UnsafeFileError where the tokenizer failed to load for want of its own code."""
    file = base.path / "tokenizer_config.json"
    if file.is_file() and "auto_map" in read_json(file):
        raise UnsafeFileError(f"{file}: needs the tokenizer's own code (auto_map), which is never run") from error


def _shortened(error: Exception, folder: Path, base: Checkpoint) -> str:
    """What transformers says, in one line, of the base's folder."""
    text = " ".join(str(error).replace(str(folder), str(base.path)).split()) or type(error).__name__
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"
