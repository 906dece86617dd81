"""Quantized weights against references written from the formats, and against libraries where they are right."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import factors
from handmade import adapterkit as run_adapterkit
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.algebra.counter_rng import uniform_at
from adapterkit.base import quant
from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.base.quant.codebooks import CODES, dynamic_code
from adapterkit.base.quant.rounding import Rounding, choose_codes, search
from adapterkit.base.quant.schemes import bnb8
from adapterkit.base.quant.schemes.bnb4.quantizer import Spec4bit
from adapterkit.errors import ChangedError, FitError, FormatError, LossError, UsageError
from adapterkit.files.safetensors import read_header
from adapterkit.merging.blocks import device
from adapterkit.merging.run import pieces

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

SHAPES = [(64, 64), (33, 62), (7, 4304), (5, 33), (3, 128)]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def packed_4bit(
    weight: torch.Tensor, kind: str = "nf4", blocksize: int = 64, nested: bool = False, storage: Any = torch.uint8
) -> tuple[dict[str, torch.Tensor], Any]:
    """Return `weight` as bitsandbytes quantizes it and transformers stores it, by suffix; and its quant_state."""
    stored, state = functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    parts = {f".{name}": value.contiguous() for name, value in state.as_dict(packed=True).items()}
    return {"": stored} | parts, state


def dequantized_4bit(stored: torch.Tensor, state: Any) -> torch.Tensor:
    """Dequantize by the definition of the format: float32 throughout, in numpy, one element at a time."""
    count = int(np.prod(state.shape))
    raw = stored.reshape(-1).view(torch.uint8).numpy()
    nibbles = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)[:count]
    absmax = state.absmax.numpy()
    if state.nested:
        scale = np.repeat(state.state2.absmax.numpy(), state.state2.blocksize)[: len(absmax)]
        absmax = state.state2.code.numpy()[absmax] * scale + np.float32(state.offset.item())
    values = state.code.numpy()[nibbles] * np.repeat(absmax, state.blocksize)[:count]
    assert values.dtype == np.float32
    return torch.from_numpy(values).view(state.shape).to(state.dtype)


def read(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> torch.Tensor:
    """Return `m.weight` as adapterkit dequantizes it from a file, in two parts."""
    save_file(tensors, folder / "packed.safetensors")
    weight = quant.weights(read_header(folder / "packed.safetensors").tensors, config or {})["m.weight"]
    assert isinstance(weight, quant.QuantizedWeight)
    depth, columns = weight.shape
    rows = weight.open(columns)
    return torch.cat([rows(0, depth // 2), rows(depth // 2, depth)])


def named(parts: dict[str, torch.Tensor], module: str = "m") -> dict[str, torch.Tensor]:
    return {f"{module}.weight{suffix}": tensor for suffix, tensor in parts.items()}


# --- one weight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKS)
def test_4bit_is_dequantized_bit_for_bit(tmp_path: Path, kind: str, nested: bool, blocksize: int) -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            parts, state = packed_4bit(torch.randn(shape).to(dtype), kind, blocksize, nested)
            got = read(tmp_path, named(parts))
            assert got.dtype == dtype and torch.equal(got, dequantized_4bit(parts[""], state)), (shape, dtype)
            if shape[1] % blocksize == 0 or blocksize >= 2048:  # the cases in which the library's kernels are right
                assert torch.equal(got, functional.dequantize_4bit(parts[""], state))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_4bit_weights_stored_as_another_dtype(tmp_path: Path, storage: torch.dtype) -> None:
    parts, state = packed_4bit(torch.randn(48, 32).bfloat16(), storage=storage)
    assert parts[""].dtype == storage
    assert torch.equal(read(tmp_path, named(parts)), dequantized_4bit(parts[""], state))


def test_bitsandbytes_is_wrong_on_avx512_if_blocks_span_rows(tmp_path: Path) -> None:
    """Its CPU kernel looks up scales by row; its own generic code agrees with the format, and with us."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no AVX-512")
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    parts, state = packed_4bit(torch.randn(7, 4304).bfloat16())
    got, kernel = read(tmp_path, named(parts)), functional.dequantize_4bit(parts[""], state)
    raw, generic = parts[""].view(-1), inspect.unwrap(_dequantize_4bit_compute)
    assert torch.equal(got, generic(raw, state.absmax, state.code, 64, state.shape, state.dtype))
    if torch.equal(got, kernel):
        pytest.skip("this bitsandbytes has it fixed")
    assert (got.float() - kernel.float()).abs().max() > 0.1


def test_int8_is_dequantized_bit_for_bit(tmp_path: Path) -> None:
    q, scale, _ = functional.int8_vectorwise_quant(torch.randn(33, 47).half())
    tensors = {"m.weight": q, "m.SCB": scale, "m.weight_format": torch.tensor(0, dtype=torch.uint8)}
    got = read(tmp_path, tensors, {"torch_dtype": "float16"})
    assert torch.equal(got, functional.int8_vectorwise_dequant(q, scale).half())


def fp8(shape: tuple[int, int], block: int) -> tuple[torch.Tensor, torch.Tensor]:
    grid = tuple(-(-size // block) for size in shape)
    return torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(grid) + 0.5


@pytest.mark.parametrize(("shape", "block"), [((256, 128), 128), ((96, 200), 32), ((130, 70), 128)])
def test_fp8_is_dequantized_bit_for_bit(tmp_path: Path, shape: tuple[int, int], block: int) -> None:
    q, scale = fp8(shape, block)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [block, block]}, "dtype": "bfloat16"}
    got = read(tmp_path, {"m.weight": q, "m.weight_scale_inv": scale}, config)
    for i, j in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3), (block - 1, block - 1)]:
        if i < shape[0] and j < shape[1]:
            assert got[i, j] == (q[i, j].float() * scale[i // block, j // block]).bfloat16()
    whole = scale.numpy().repeat(block, axis=0).repeat(block, axis=1)[: shape[0], : shape[1]]
    assert torch.equal(got, (q.float() * torch.from_numpy(whole)).bfloat16())
    if shape[0] % block == 0 and shape[1] % block == 0:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        assert torch.equal(got, Fp8Dequantize(None)._dequantize_one(q, scale, torch.bfloat16))


def test_fp8_blocks_that_do_not_divide_are_wrong_in_transformers(tmp_path: Path) -> None:
    """192 rows in blocks of 128 have two scales; transformers assumes two blocks of 96."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    q, scale = fp8((192, 128), 128)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "dtype": "bfloat16"}
    got = read(tmp_path, {"m.weight": q, "m.weight_scale_inv": scale}, config)
    theirs = Fp8Dequantize(None)._dequantize_one(q, scale, torch.bfloat16)
    assert torch.equal(got[:96], theirs[:96]) and torch.equal(got[128:], theirs[128:])
    assert torch.equal(got[96:128], (q[96:128].float() * scale[0, 0]).bfloat16())
    if torch.equal(got, theirs):
        pytest.skip("this transformers has it fixed")


# --- a merge ---------------------------------------------------------------------------------------------------------

QUANTIZED = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.fixture
def four_bits(make_base: Callable[..., Path]) -> tuple[Path, dict[str, torch.Tensor]]:
    """A base in two shards: two weights in nested NF4, with blocks that span rows, and two that are not quantized."""
    tensors: dict[str, torch.Tensor] = {}
    plain = {"layers.0.norm.weight": torch.randn(40).bfloat16(), "head.weight": torch.randn(24, 40).bfloat16()}
    expected = dict(plain)
    for layer in range(2):
        parts, state = packed_4bit(torch.randn(24, 40).bfloat16(), nested=True)
        tensors |= named(parts, f"layers.{layer}.q")
        expected[f"layers.{layer}.q.weight"] = dequantized_4bit(parts[""], state)
    config = {"torch_dtype": "bfloat16", "quantization_config": QUANTIZED, "hidden_size": 40}
    return make_base(tensors | plain, config, shards=2), expected


def test_merging_into_a_4bit_base(
    four_bits: tuple[Path, dict[str, torch.Tensor]],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, dense = four_bits
    adapter = make_adapter(factors("layers.0.q", 24, 40) | factors("head", 24, 40))
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 400)  # five rows, spanned by blocks of 64 elements
    monkeypatch.setattr(device, "CPU", device.ComputeDevice(torch.device("cpu"), 96))
    plan = adapterkit.plan_merge(base, [adapter], tmp_path / "out")
    assert any("NF4, blocks of 64, nested" in note for note in plan.notes)
    *_, result = adapterkit.run(plan)
    out = {k: v for file in sorted((tmp_path / "out").glob("*.safetensors")) for k, v in load_file(file).items()}
    assert set(out) == set(dense)
    expected = oracle.merged(dense, adapter)
    for name, before in dense.items():
        assert out[name].dtype == torch.bfloat16
        if name in expected:
            assert torch.equal(out[name], oracle.rounded(expected[name].exact, torch.bfloat16))
        else:
            assert torch.equal(out[name], before)
    assert result.tensors == 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"torch_dtype": "bfloat16", "hidden_size": 40}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in out.values())
    assert set(index["weight_map"]) == set(out)
    assert open_checkpoint(tmp_path / "out").quantization is None


def test_another_dtype_for_the_output(
    four_bits: tuple[Path, dict[str, torch.Tensor]], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base, dense = four_bits
    adapter = make_adapter(factors("layers.1.q", 24, 40))
    adapterkit.merge(base, [adapter], tmp_path / "out", dtype="fp32")
    out = {k: v for file in sorted((tmp_path / "out").glob("*.safetensors")) for k, v in load_file(file).items()}
    assert all(tensor.dtype == torch.float32 for tensor in out.values())
    exact = oracle.merged(dense, adapter)["layers.1.q.weight"].exact
    assert torch.equal(out["layers.1.q.weight"], exact.float())
    assert torch.equal(out["layers.0.q.weight"], dense["layers.0.q.weight"].float())


def test_a_dora_on_a_4bit_base(
    four_bits: tuple[Path, dict[str, torch.Tensor]], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base, dense = four_bits
    magnitude = {"layers.0.q.lora_magnitude_vector": torch.rand(24) * 8}
    adapter = make_adapter(factors("layers.0.q", 24, 40) | magnitude, use_dora=True)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    out = {k: v for file in sorted((tmp_path / "out").glob("*.safetensors")) for k, v in load_file(file).items()}
    expected = oracle.merged(dense, adapter)["layers.0.q.weight"].exact
    assert torch.equal(out["layers.0.q.weight"], oracle.rounded(expected, torch.bfloat16))


def test_an_fp8_base_with_scales_in_another_shard(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    q, scale = fp8((48, 40), 32)
    config = {"dtype": "float16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    base = make_base({"m.weight": q, "m.weight_scale_inv": scale, "n.weight": torch.ones(3).half()}, config, shards=2)
    adapter = make_adapter(factors("m", 48, 40))
    adapterkit.merge(base, [adapter], tmp_path / "out")
    out = {k: v for file in sorted((tmp_path / "out").glob("*.safetensors")) for k, v in load_file(file).items()}
    whole = scale.numpy().repeat(32, axis=0).repeat(32, axis=1)[:48, :40]
    dense = (q.float() * torch.from_numpy(whole)).half()
    expected = oracle.merged({"m.weight": dense}, adapter)["m.weight"].exact
    assert set(out) == {"m.weight", "n.weight"}
    assert torch.equal(out["m.weight"], oracle.rounded(expected, torch.float16))


def test_inspect_compares_with_the_dequantized_base(
    four_bits: tuple[Path, dict[str, torch.Tensor]], make_adapter: Callable[..., Path]
) -> None:
    from adapterkit.inspection.match import base_norms, match

    base, dense = four_bits
    checkpoint = open_checkpoint(base)
    found, places = match(adapterkit.load(make_adapter(factors("layers.0.q", 24, 40))), checkpoint, "base")
    assert (found.found, found.total) == (1, 1)
    [(module, norm)] = base_norms(places, checkpoint)
    assert module == "layers.0.q" and norm == pytest.approx(float(dense["layers.0.q.weight"].double().norm()), rel=1e-6)


# --- bad input -------------------------------------------------------------------------------------------------------


def without(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(parts: dict[str, torch.Tensor]) -> None:
        del parts[suffix]

    return change


def replaced(suffix: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(parts: dict[str, torch.Tensor]) -> None:
        parts[suffix] = value

    return change


def restated(**facts: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    """Change the quant_state."""

    def change(parts: dict[str, torch.Tensor]) -> None:
        key = ".quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(parts[key].tolist())) | facts
        parts[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(".absmax"), "m.weight.absmax is missing"),
        (without(".quant_map"), "m.weight.quant_map is missing"),
        (without(".nested_absmax"), "m.weight.nested_absmax is missing"),
        (without(".nested_quant_map"), "m.weight.nested_quant_map is missing"),
        (without(".quant_state.bitsandbytes__nf4"), "has an absmax, but no quant_state"),
        (without(""), "m.weight is missing"),
        (replaced("", torch.zeros(400, 1, dtype=torch.uint8)), "has 400 bytes, expected 480 bytes"),
        (replaced(".absmax", torch.zeros(14, dtype=torch.uint8)), r"U8 \(14,\), expected U8 with 15 elements"),
        (replaced(".absmax", torch.zeros(15)), "F32 .* expected U8 with 15"),
        (replaced(".quant_map", torch.zeros(15)), "expected F32 with 16"),
        (replaced(".quant_state.bitsandbytes__nf4", torch.zeros(4, dtype=torch.uint8)), "is not a valid quant_state"),
        (replaced(".quant_state.bitsandbytes__int3", torch.tensor([123, 125], dtype=torch.uint8)), "expected nf4 or"),
        (restated(blocksize=63), "blocksize 63"),
        (restated(blocksize=0), "blocksize 0"),
        (restated(blocksize="64"), "blocksize '64'"),
        (restated(shape=[24, -40]), "shape"),
        (restated(shape=[2**39, 40]), "bytes for .* in 4 bits"),
        (restated(dtype="float8"), "dtype 'float8'"),
        (restated(quant_type="fp4"), "quant_type is 'fp4'"),
        (restated(nested_offset=None), "nested_offset None"),
        (restated(nested_offset=10**400), "nested_offset 1000"),
        (restated(dtype=["bfloat16"]), r"dtype \['bfloat16'\]"),
    ],
)
def test_broken_4bit_weights_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    parts, _ = packed_4bit(torch.randn(24, 40).bfloat16(), nested=True)
    change(parts)
    with pytest.raises(FormatError, match=message):
        read(tmp_path, named(parts))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"m.weight": torch.zeros(4, 4).char(), "m.SCB": torch.zeros(5)}, "expected I8"),
        ({"m.weight": torch.zeros(4, 4), "m.SCB": torch.zeros(4)}, "expected I8"),
        ({"m.weight": torch.zeros(0, 4).char(), "m.SCB": torch.zeros(0)}, "expected I8"),
        (
            {"m.weight": torch.zeros(4, 4).char(), "m.SCB": torch.zeros(4), "m.weight_format": torch.tensor(2).byte()},
            "only LLM.int8 weights stored by rows",
        ),
        (
            {"m.weight": torch.zeros(4, 4).char(), "n.weight": torch.zeros(4, 4).char(), "n.SCB": torch.zeros(4)},
            "m.weight is I8 and has no scale",
        ),
        ({"m.weight_scale_inv": torch.ones(1, 1)}, "which is missing"),
        (
            {"m.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), "m.weight_scale_inv": torch.ones(2, 1)},
            "expected F8",
        ),
    ],
)
def test_broken_8bit_weights_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    config = {"quantization_config": {"weight_block_size": [128, 128]}}
    with pytest.raises(FormatError, match=message):
        read(tmp_path, tensors, config)


def test_fp8_blocks_larger_than_the_weight_take_no_extra_memory(tmp_path: Path) -> None:
    q, scale = fp8((8, 8), 8)
    config = {"quantization_config": {"weight_block_size": [2**80, 2**40]}, "dtype": "float32"}
    got = read(tmp_path, {"m.weight": q, "m.weight_scale_inv": scale}, config)
    assert torch.equal(got, q.float() * scale)


@pytest.mark.parametrize(("kind", "name"), [("int8", "m.weight_format"), ("nf4", "m.weight.quant_map")])
def test_a_tensor_name_that_quantizing_needs_is_taken(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, kind: str, name: str
) -> None:
    base = make_base({"m.weight": torch.ones(24, 40), name: torch.zeros(3)})
    with pytest.raises(FitError, match=f"{name}: the base has this tensor already"):
        adapterkit.plan_merge(base, [make_adapter(factors("m", 24, 40))], tmp_path / "out", quantize=kind)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_4bit_weights_padded_to_their_storage_dtype(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, storage: torch.dtype
) -> None:
    parts, _ = packed_4bit(torch.randn(5, 33).bfloat16())
    room = torch.zeros(84, dtype=torch.uint8)
    room[:83] = parts[""].view(-1)
    base = make_base(named(parts | {"": room.view(storage).view(-1, 1)}))
    adapterkit.merge(base, [make_adapter(factors("m", 5, 33))], tmp_path / "out", quantize="same", accept_loss=True)
    merged = open_checkpoint(tmp_path / "out")
    assert quant.weights(merged.tensors, merged.config)["m.weight"].shape == (5, 33)


def test_a_float64_base_is_quantized(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base({"m.weight": torch.randn(24, 40).double()})
    adapterkit.merge(base, [make_adapter(factors("m", 24, 40))], tmp_path / "out", quantize="nf4")
    merged = open_checkpoint(tmp_path / "out")
    assert quant.weights(merged.tensors, merged.config)["m.weight"].dtype == "F32"


def test_fp8_without_a_block_size_is_refused(tmp_path: Path) -> None:
    q, scale = fp8((8, 8), 8)
    with pytest.raises(FormatError, match="weight_block_size None"):
        read(tmp_path, {"m.weight": q, "m.weight_scale_inv": scale})


def test_unknown_schemes_are_named_with_what_is_supported(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    base = make_base({"m.qweight": torch.zeros(5, 24, dtype=torch.int32), "n.weight": torch.ones(4, 4)}, config)
    with pytest.raises(FitError, match="quantized .gptq.; supported schemes: bitsandbytes NF4"):
        adapterkit.plan_merge(base, [make_adapter(factors("m", 24, 40))], tmp_path / "out")
    # Plain tensors of such a base can be merged into; the rest stays quantized.
    adapterkit.merge(base, [make_adapter(factors("n", 4, 4), "other")], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_a_truncated_packed_weight_leaves_no_output(
    four_bits: tuple[Path, dict[str, torch.Tensor]], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base, _ = four_bits
    plan = adapterkit.plan_merge(base, [make_adapter(factors("layers.0.q", 24, 40))], tmp_path / "out")
    for file in base.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(ChangedError, match="has changed since it was first read"):
        list(adapterkit.run(plan))
    assert not (tmp_path / "out").exists()


# --- quantizing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_4bit_is_quantized_as_by_bitsandbytes(kind: str, nested: bool, blocksize: int) -> None:
    for shape in SHAPES:
        for dtype, name in zip(DTYPES, ("BF16", "F16", "F32"), strict=True):
            weight = torch.randn(shape).to(dtype)
            expected, state = packed_4bit(weight, kind, blocksize, nested)
            packing = Spec4bit(shape, name, kind, blocksize, nested)
            packer, step = packing.start(shape[1]), packing.rows_together(shape[1])
            rows = [(at, min(shape[0], at + step)) for at in range(0, shape[0], step)]
            packed = {at: packer.pack(weight[at:end].float(), at) for at, end in reversed(rows)}
            assert torch.equal(torch.cat([packed[at] for at, _ in rows]), expected[""].view(-1))
            *parts, facts = packer.finish()
            assert json.loads(facts) == json.loads(bytes(expected[f".quant_state.bitsandbytes__{kind}"].tolist()))
            layout = {part: shape for part, _, shape in packing.layout("")}
            assert {part: value.shape for part, value in expected.items() if "state" not in part} == {
                part: shape for part, shape in layout.items() if "state" not in part
            }
            if not nested:
                assert parts[0] == state.absmax.numpy().tobytes()
                continue
            # Its CPU kernel for the nested scales does not always take the nearest code; it is never nearer than ours.
            absmax = functional.quantize_4bit(weight, blocksize=blocksize, quant_type=kind)[1].absmax
            theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
            assert bool(((packer.restored - absmax).abs() <= (theirs - absmax).abs() + 1e-6).all())
            if len(absmax) > 1:  # a single scale equals its mean: 0 / 0, so any code is right
                others = int((np.frombuffer(parts[0], np.uint8) != state.absmax.numpy()).sum())
                assert others <= max(1, len(absmax) // 50)


def test_int8_is_quantized_as_by_bitsandbytes() -> None:
    weight = torch.randn(33, 47).bfloat16()
    weight[5] = 0
    packer = bnb8.Spec8bit((33, 47), "BF16").start(47)
    packed = torch.cat([packer.pack(weight[:20].float(), 0), packer.pack(weight[20:].float(), 20)])
    q, scale, _ = functional.int8_vectorwise_quant(weight[[i for i in range(33) if i != 5]].half())
    ours = packed.view(torch.int8).view(33, 47)
    assert torch.equal(ours[[i for i in range(33) if i != 5]], q) and not ours[5].any()
    scales, layout = packer.finish()
    assert np.array_equal(np.delete(np.frombuffer(scales, np.float32), 5), scale.numpy()) and layout == b"\0"


# --- what a dtype does not hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [65504.0, 65519.0, 65520.0, 7e4, -1e30, torch.inf, torch.nan])
def test_weights_beyond_float16_are_refused_for_int8(
    most: float, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    """bitsandbytes converts to float16 first, which would give an infinite scale and a row of zeros."""
    weight = torch.randn(24, 40)
    weight[7, 3] = most
    _, scale, _ = functional.int8_vectorwise_quant(weight.half())
    base = make_base({"layers.0.q.weight": weight})
    if bool(scale.isfinite().all()) and not np.isnan(most):
        adapterkit.quantize(base, tmp_path / "out", to="int8")
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["layers.0.q.SCB"], scale)
        return
    says = (
        "exceeds 65504, the maximum of float16; bitsandbytes LLM.int8" if np.isfinite(most) else "contains NaN or Inf"
    )
    with pytest.raises(FitError, match=f"layers.0.q.weight: .*{says}"):
        adapterkit.quantize(base, tmp_path / "out", to="int8")
    assert not (tmp_path / "out").exists()
    if np.isfinite(most):
        adapterkit.quantize(base, tmp_path / "out", to="nf4")
        [packed] = [
            w for w in quant.weights(*opened(tmp_path / "out")).values() if isinstance(w, quant.QuantizedWeight)
        ]
        assert float(packed.open(40)(0, 24)[7, 3]) == pytest.approx(most)


def opened(folder: Path) -> tuple[Any, Any]:
    checkpoint = open_checkpoint(folder)
    return checkpoint.tensors, checkpoint.config


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_merge_beyond_the_dequantized_dtype_is_refused(
    kind: str, make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Requantized to 4 bits, it would silently be infinite when the model is loaded."""
    weight = torch.full((24, 40), 6e4).half()
    adapterkit.quantize(make_base({"layers.0.q.weight": weight}, {"dtype": "float16"}), tmp_path / "packed", to=kind)
    ones = {"layers.0.q.lora_A.weight": torch.ones(1, 40), "layers.0.q.lora_B.weight": torch.full((24, 1), 9e3)}
    adapter = make_adapter(ones, r=1, lora_alpha=1)
    for how in ({"quantize": "same", "accept_loss": True}, {}):
        with pytest.raises(FitError, match="layers.0.q.weight: .* exceeds 65504, the maximum of float16"):
            adapterkit.merge(tmp_path / "packed", [adapter], tmp_path / "out", **how)
        assert not (tmp_path / "out").exists()


def test_nested_scales_that_would_be_infinite_are_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """A scale can grow when quantized, and the mean of many can exceed float32."""
    half = torch.linspace(6.4e4, 65504, 64)[:, None].expand(64, 64).half()
    half[0] = 0.0  # so that the other scales are close to each other and to the next code
    base = make_base({"layers.0.q.weight": half})
    with pytest.raises(FitError, match="with nested quantization it dequantizes to .* exceeds 65504"):
        adapterkit.quantize(base, tmp_path / "out", to="nf4", nested=True)
    adapterkit.quantize(base, tmp_path / "out", to="nf4")
    huge = {"layers.0.q.weight": torch.full((64, 64), 3e38).bfloat16()}
    save_file(huge, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(FitError, match="with nested quantization it dequantizes to (nan|inf)"):
        adapterkit.quantize(base, tmp_path / "nested", to="fp4", nested=True)
    assert not (tmp_path / "nested").exists()


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_weights_beyond_their_own_dtype_are_refused(
    kind: str, make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """A scale of the base that is not finite is accepted, as in bases that are not quantized."""
    config: dict[str, Any] = {"dtype": "float16"}
    name, weight = "layers.0.q", torch.randn(24, 40)
    if kind == "nf4":
        parts, _ = packed_4bit(weight.half())
        tensors, scale = named(parts, name), f"{name}.weight.absmax"
    elif kind == "int8":
        q, rows, _ = functional.int8_vectorwise_quant(weight.half())
        tensors, scale = {f"{name}.weight": q, f"{name}.SCB": rows}, f"{name}.SCB"
    else:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
        tensors = {f"{name}.weight": weight.to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": torch.rand(3, 5)}
        scale = f"{name}.weight_scale_inv"
    adapter = make_adapter(factors(name, 24, 40))
    base = make_base(tensors | {"norm.weight": torch.ones(40).half()}, config)
    for value, passes in ((2.0, True), (1e6, False), (torch.inf, True)):
        tensors[scale].view(-1)[1] = value
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        if passes:
            adapterkit.merge(base, [adapter], tmp_path / "out", overwrite=True)
            merged = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
            assert bool(merged.isfinite().all()) is (value == 2.0)
            continue
        for dtype in (None, "bf16"):
            with pytest.raises(
                FitError, match=f"{name}.weight: dequantizes to .* exceeds 65504, the maximum of float16; set the"
            ):
                adapterkit.merge(base, [adapter], tmp_path / "refused", dtype=dtype)
            assert not (tmp_path / "refused").exists()


@pytest.fixture
def sixteen_bits(make_base: Callable[..., Path]) -> Path:
    tensors = {f"layers.{layer}.q.weight": torch.randn(24, 40).bfloat16() for layer in range(2)}
    tensors |= {"embed_tokens.weight": torch.randn(9, 40).bfloat16(), "lm_head.weight": torch.randn(9, 40).bfloat16()}
    return make_base(tensors | {"norm.weight": torch.randn(40).bfloat16()}, {"torch_dtype": "bfloat16"}, shards=2)


@pytest.mark.parametrize(("to", "nested"), [("nf4", True), ("fp4", False), ("int8", False)])
def test_quantizing_a_base_changes_its_linear_layers_only(
    sixteen_bits: Path, tmp_path: Path, to: str, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 80 * 8)  # eight rows, which make whole blocks
    result = adapterkit.quantize(sixteen_bits, tmp_path / "out", to=to, nested=nested)
    assert result.tensors == 2
    out = open_checkpoint(tmp_path / "out")
    found = quant.weights(out.tensors, out.config)
    before = {k: v for file in sorted(sixteen_bits.glob("*.safetensors")) for k, v in load_file(file).items()}
    assert set(found) == set(before)
    for name, weight in found.items():
        if not name.startswith("layers."):
            assert not isinstance(weight, quant.QuantizedWeight) and torch.equal(weight.read(), before[name])
            continue
        assert isinstance(weight, quant.QuantizedWeight) and (weight.kind, weight.dtype) == (to, "BF16")
        if to == "int8":
            q, scale, _ = functional.int8_vectorwise_quant(before[name].half())
            expected = functional.int8_vectorwise_dequant(q, scale).bfloat16()
            assert torch.equal(weight.open(40)(0, 24), expected)
        else:
            parts, state = packed_4bit(before[name], to, nested=nested)
            assert torch.equal(weight.stored.read(), parts[""])
            if not nested:
                assert torch.equal(weight.open(40)(0, 24), dequantized_4bit(parts[""], state))
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert declared["load_in_4bit"] is (to != "int8") and declared["bnb_4bit_use_double_quant"] is nested
    with pytest.raises(FitError, match="already quantized"):
        adapterkit.quantize(tmp_path / "out", tmp_path / "twice", to=to)


def test_requantizing_uses_the_same_scheme_and_leaves_other_weights_unchanged(
    four_bits: tuple[Path, dict[str, torch.Tensor]], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base, dense = four_bits
    adapter = make_adapter(factors("layers.0.q", 24, 40, size=0.7))
    result = adapterkit.merge(base, [adapter], tmp_path / "out", quantize="same")
    before, out = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    assert out.config == before.config and set(out.tensors) == set(before.tensors)
    for name, info in before.tensors.items():
        if not name.startswith("layers.0.q"):
            assert out.tensors[name].read_bytes() == info.read_bytes()
    weight = quant.weights(out.tensors, out.config)["layers.0.q.weight"]
    assert isinstance(weight, quant.QuantizedWeight) and weight.scheme == "bitsandbytes NF4, blocks of 64, nested"
    after = weight.open(40)(0, 24).double()
    W, exact = dense["layers.0.q.weight"].double(), oracle.merged(dense, adapter)["layers.0.q.weight"].exact
    expected, _ = packed_4bit(exact.float().bfloat16(), nested=True)
    assert (weight.stored.read() != expected[""]).float().mean() < 0.02  # quantized from float32, not from bfloat16
    retention = result.retention["layers.0.q.weight"]
    assert retention.retained == pytest.approx(
        float(((after - W) * (exact - W)).sum() / (exact - W).square().sum()), rel=2e-3
    )


def test_losing_an_update_by_quantizing_is_refused_unless_accepted(
    four_bits: tuple[Path, dict[str, torch.Tensor]], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base, _ = four_bits
    adapter = make_adapter(factors("layers.0.q", 24, 40, size=0.02))
    with pytest.raises(LossError, match="of the update"):
        adapterkit.merge(base, [adapter], tmp_path / "out", quantize="same")
    assert not (tmp_path / "out").exists()
    result = adapterkit.merge(base, [adapter], tmp_path / "out", quantize="same", accept_loss=True)
    assert result.retention["layers.0.q.weight"].retained < 0.5


def test_quantizing_while_merging_equals_merging_then_quantizing(
    sixteen_bits: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(factors("layers.1.q", 24, 40))
    adapterkit.merge(sixteen_bits, [adapter], tmp_path / "wide", dtype="fp32")
    adapterkit.quantize(tmp_path / "wide", tmp_path / "two", to="nf4")
    adapterkit.merge(sixteen_bits, [adapter], tmp_path / "one", quantize="nf4")
    one, two = (open_checkpoint(tmp_path / name).tensors for name in ("one", "two"))
    for name in (f"layers.{layer}.q.weight{part}" for layer in range(2) for part in ("", ".absmax")):
        a, b = one[name].read(), two[name].read()
        close = torch.isclose(a, b, rtol=1e-6) if a.is_floating_point() else a == b
        assert close.float().mean() > 0.99


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"quantize": "int3"}, UsageError, "expected one of nf4, fp4, int8, same"),
        ({"quantize": "same"}, UsageError, "not quantized, so `quantize='same'` has no scheme"),
        ({"quantize": "nf4", "dtype": "fp32"}, UsageError, "exclude each other"),
        ({"accept_loss": True}, UsageError, "goes with `quantize`"),
    ],
)
def test_invalid_quantization_options(
    sixteen_bits: Path, make_adapter: Callable[..., Path], tmp_path: Path, how: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        adapterkit.merge(sixteen_bits, [make_adapter(factors("layers.0.q", 24, 40))], tmp_path / "out", **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [({"accept_loss": True}, "`accept_loss` goes with `quantize`"), ({"resume": True, "receipt": False}, "omit `resume`")],
)  # fmt: skip
def test_options_without_effect_are_refused_before_opening(
    sixteen_bits: Path, make_adapter: Callable[..., Path], tmp_path: Path, how: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        adapterkit.merge("no/base", "no/adapter", "out", **how)
    plan = adapterkit.plan_merge(sixteen_bits, make_adapter(factors("layers.0.q", 24, 40)), tmp_path / "out")
    with pytest.raises(UsageError, match=message):
        adapterkit.run(plan, **how)  # on the call, not on the first event


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"to": "int4"}, "expected one of nf4, fp4, int8"),
        ({"to": "nf4", "blocksize": 48}, "block size 48"),
        ({"to": "int8", "nested": True}, "one scale per row"),
    ],
)
def test_invalid_options_of_quantize(sixteen_bits: Path, tmp_path: Path, how: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        adapterkit.plan_quantize(sixteen_bits, tmp_path / "out", **how)


def test_quantizing_nan_is_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    weight = torch.randn(8, 64)
    weight[3, 3] = torch.nan
    with pytest.raises(FitError, match=r"m\.weight: contains NaN"):
        adapterkit.quantize(make_base({"m.weight": weight}), tmp_path / "out", to="nf4")
    assert not (tmp_path / "out").exists()


def test_inspect_shows_the_storage_of_a_base(four_bits: tuple[Path, dict[str, torch.Tensor]]) -> None:
    base, _ = four_bits
    result = run_adapterkit("inspect", base)
    assert result.code == 0
    assert "bitsandbytes NF4, blocks of 64, nested        2          1,920" in result.out
    facts = json.loads(run_adapterkit("inspect", base, "--json").out)
    packed, plain = sorted(facts["stored"], key=lambda row: row["merge"])
    assert (packed["weights"], packed["parameters"], packed["merge"]) == (2, 1920, "dequantized to BF16")
    assert (plain["scheme"], plain["weights"], plain["parameters"]) == ("BF16", 2, 1000)
    assert packed["bytes"] + plain["bytes"] < facts["bytes"] and facts["unsupported"] is None
    assert run_adapterkit("inspect", base, "--modules").code == 2


def test_inspect_names_unsupported_schemes(make_base: Callable[..., Path]) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    base = make_base({"m.qweight": torch.zeros(5, 24, dtype=torch.int32), "n.weight": torch.ones(4, 4)}, config)
    result = run_adapterkit("inspect", base)
    assert result.code == 0 and "quantized (awq)" in result.out and "copied only" in result.out


@pytest.mark.parametrize(
    ("to", "nested", "dtype"),
    [("nf4", False, "bf16"), ("nf4", True, "fp16"), ("fp4", True, "bf16"), ("int8", False, "bf16")],
)
def test_merging_onto_the_original(
    sixteen_bits: Path, make_adapter: Callable[..., Path], tmp_path: Path, to: str, nested: bool, dtype: str
) -> None:
    adapterkit.quantize(sixteen_bits, tmp_path / "small", to=to, nested=nested)
    adapter = make_adapter(factors("layers.0.q", 24, 40))
    adapterkit.merge(tmp_path / "small", [adapter], tmp_path / "onto", original=sixteen_bits)
    adapterkit.merge(sixteen_bits, [adapter], tmp_path / "plain")
    for file in sorted((tmp_path / "plain").glob("*.safetensors")):
        assert (tmp_path / "onto" / file.name).read_bytes() == file.read_bytes()
    # Requantized, it equals the quantized sum, in the same scheme.
    adapterkit.merge(tmp_path / "small", [adapter], tmp_path / "again", original=sixteen_bits, quantize="same")
    adapterkit.merge(sixteen_bits, [adapter], tmp_path / "at once", quantize=to)
    if not nested:
        for file in sorted((tmp_path / "at once").glob("*.safetensors")):
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    small, again = open_checkpoint(tmp_path / "small"), open_checkpoint(tmp_path / "again")
    assert small.config == again.config
    assert {name: info.dtype for name, info in small.tensors.items()} == {
        name: info.dtype for name, info in again.tensors.items()
    }
    # One weight slightly off makes it another model.
    for file in sixteen_bits.glob("*.safetensors"):
        tensors = load_file(file)
        if "layers.1.q.weight" in tensors:
            tensors["layers.1.q.weight"][7, 9] += 1
            save_file(tensors, file)
    with pytest.raises(FitError, match=r"layers\.1\.q\.weight: \[7, 9\] is .* in the original"):
        adapterkit.merge(tmp_path / "small", [adapter], tmp_path / "wrong", original=sixteen_bits)
    assert not (tmp_path / "wrong").exists()


def test_an_fp8_base_and_its_original(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    scale = torch.rand(2, 2) + 0.5
    weight = torch.randn(48, 40).bfloat16()
    whole = torch.from_numpy(scale.numpy().repeat(32, axis=0).repeat(32, axis=1)[:48, :40])
    q = (weight.float() / whole).to(torch.float8_e4m3fn)
    base = make_base({"m.weight": q, "m.weight_scale_inv": scale}, config)
    original = tmp_path / "original.safetensors"
    save_file({"m.weight": weight}, original)
    adapter = make_adapter(factors("m", 48, 40))
    adapterkit.merge(base, [adapter], tmp_path / "out.safetensors", original=original)
    expected = oracle.merged({"m.weight": weight}, adapter)["m.weight"].exact
    out = load_file(tmp_path / "out.safetensors")["m.weight"]
    assert torch.equal(out, oracle.rounded(expected, torch.bfloat16))
    with pytest.raises(FitError, match="writing .* is not supported"):
        adapterkit.plan_merge(base, [adapter], tmp_path / "no", quantize="same")


def between_steps(kind: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 weights `(rows, 64)` about the middle of the widest step of each row's block, and half of that step.

    The nearer end of that step is poorly represented in bf16, so that dequantizing moves it as far as possible.

    """
    if kind == "fp8":
        low, high = torch.full((rows,), 256 / 448).double(), torch.full((rows,), 288 / 448).double()
    else:
        codes = (
            torch.arange(-127, 128).double() / 127 if kind == "int8" else torch.tensor(CODES[kind]).double().sort()[0]
        )
        widest = (codes.diff() > codes.diff().max() * 0.999).nonzero()[:, 0]
        low = codes[picked := widest[torch.randint(len(widest), (rows,))]]
        high = codes[picked + 1]
    near = low.abs().minimum(high.abs()).clamp(min=1 / 127)
    most = 2.0 ** torch.randint(-3, 3, (rows,)) * (1 + 2.0**-8) / near
    most = (most * (1 + 2.0**-8 * (2 * torch.rand(rows) - 1))).bfloat16().double()
    values = ((low + high) / 2 * most)[:, None] * (1 + 2.0**-8 * (2 * torch.rand(rows, 64).double() - 1))
    values[:, 0] = most * (torch.randint(0, 2, (rows,)) * 2 - 1)
    return values.float(), (high - low) / 2 * most


@pytest.mark.parametrize(
    ("kind", "size"), [("nf4", 1.0), ("fp4", 1.0), ("int8", 1.0), ("int8", 2.0**-16), ("fp8", 1.0)]
)
def test_an_original_is_refused_only_beyond_rounding_errors(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, kind: str, size: float
) -> None:
    """A float32 model loaded in bf16, quantized, and dequantized to bf16: three roundings in the same direction."""
    weight, half = between_steps(kind, 1024)
    weight, half = weight * size, half * size
    adapter = make_adapter(factors("m", 1024, 64))
    if kind == "fp8":
        config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 64]}}
        scale = weight[:, :1].abs() / 448
        q = (weight.bfloat16().float() / scale).to(torch.float8_e4m3fn)
        small = make_base({"m.weight": q, "m.weight_scale_inv": scale}, config)
    else:
        base = make_base({"m.weight": weight.bfloat16()}, {"dtype": "bfloat16"})
        small = tmp_path / "small"
        adapterkit.quantize(base, small, to=kind)
    original = tmp_path / "original.safetensors"
    save_file({"m.weight": weight}, original)
    adapterkit.merge(small, [adapter], tmp_path / "out", original=original)

    checkpoint = open_checkpoint(small)
    packed = quant.weights(checkpoint.tensors, checkpoint.config)["m.weight"]
    assert isinstance(packed, quant.QuantizedWeight)
    there = packed.open(64)(0, 1024)[7, 9].double()
    off = (half[7] + 2 * there.abs() * 2**-8 + 2**-24) * 1.01
    weight[7, 9] = there + off.copysign(weight[7, 9] - there)
    save_file({"m.weight": weight}, original)
    for how in [{}] if kind == "fp8" else [{}, {"quantize": "same"}]:
        with pytest.raises(FitError, match=r"m\.weight: \[7, 9\] is .* in the original"):
            adapterkit.merge(small, [adapter], tmp_path / "wrong", original=original, **how)


def test_wrong_originals(
    four_bits: tuple[Path, dict[str, torch.Tensor]],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base, dense = four_bits
    adapter = make_adapter(factors("layers.0.q", 24, 40))
    other = tmp_path / "other.safetensors"
    for tensors, message in [
        ({"layers.0.q.weight": torch.ones(24, 40)}, "no such tensor"),
        ({name: torch.ones(3, 3) for name in dense}, r"shape \(3, 3\) in the original"),
    ]:
        save_file(tensors, other)
        with pytest.raises(FitError, match=message):
            adapterkit.plan_merge(base, [adapter], tmp_path / "out", original=other)
    with pytest.raises(FitError, match="is quantized; `original`"):
        adapterkit.plan_merge(other, [adapter], tmp_path / "out", original=base)


# --- rounding --------------------------------------------------------------------------------------------------------


def test_random_numbers_are_uniform_and_independent_of_chunking() -> None:
    whole = uniform_at(100_000, seed=7, at=0)
    assert torch.equal(torch.cat([uniform_at(777, 7, 0), uniform_at(99_223, 7, 777)]), whole)
    assert float(whole.min()) >= 0 and float(whole.max()) < 1 and float(whole.mean()) == pytest.approx(0.5, abs=5e-3)
    assert float(torch.histc(whole, 50, 0, 1).std()) < 80  # of 2000 each
    assert abs(float(torch.corrcoef(torch.stack([whole[:-1], whole[1:]]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([whole, uniform_at(100_000, 8, 0)]))[0, 1])) < 0.02


def test_stochastic_rounding_is_unbiased_and_picks_a_neighbour() -> None:
    code = torch.tensor([-1.0, -0.2, 0.0, 0.5, 1.0])
    values = torch.linspace(-1, 1, 41)
    scaled = values.repeat(4000, 1)
    index = choose_codes(scaled, scaled, code, Rounding("stochastic", 3), 0)
    got = code[index]
    assert torch.allclose(got.mean(dim=0), values, atol=0.03)
    below = code[(torch.searchsorted(code, values, right=True) - 1).clamp(0, 3)]
    above = code[torch.searchsorted(code, values)]
    assert bool(((got == below) | (got == above)).all())


def test_compensated_rounding_preserves_row_sums() -> None:
    code = torch.tensor(CODES["nf4"])
    scaled = torch.rand(50, 700) * 1.6 - 0.8
    unit = torch.rand(50, 1).expand(-1, 700) + 0.1
    exact = (scaled * unit).sum(dim=1)
    step = unit[:, 0] * 0.16  # half of the largest step
    for rounding, factor in ((Rounding("compensated"), 1.0), (Rounding("nearest"), None)):
        got = (code[choose_codes(scaled, unit, code, rounding, 0)] * unit).sum(dim=1)
        if factor is not None:
            assert bool(((got - exact).abs() <= step * factor).all())
        else:
            assert bool(((got - exact).abs() > step).any())


def test_compensation_of_zero_blocks_and_single_columns() -> None:
    code = torch.tensor(CODES["nf4"])
    index = choose_codes(torch.zeros(3, 1), torch.zeros(3, 1), code, Rounding("compensated"), 0)
    assert index.tolist() == [[7]] * 3


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_other_rounding_modes_retain_what_nearest_erases(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, rounding: str, to: str
) -> None:
    original = make_base({"m.weight": torch.randn(256, 256).bfloat16()}, {"torch_dtype": "bfloat16"})
    adapterkit.quantize(original, tmp_path / "small", to=to)
    size = {"nf4": 0.05, "int8": 0.02}[to]
    adapter = make_adapter(factors("m", 256, 256, size=size))
    again = {"quantize": "same", "accept_loss": True}
    retentions = {
        how: adapterkit.merge(tmp_path / "small", [adapter], tmp_path / how, rounding=how, **again).retention[
            "m.weight"
        ]
        for how in ("nearest", rounding)
    }
    assert retentions["nearest"].retained < 0.1 < 0.15 < retentions[rounding].retained < 1.2
    once = (tmp_path / rounding / "model.safetensors").read_bytes()
    adapterkit.merge(
        tmp_path / "small", [adapter], tmp_path / rounding, rounding=rounding, threads=1, overwrite=True, **again
    )
    assert (tmp_path / rounding / "model.safetensors").read_bytes() == once


def test_the_seed_matters_for_stochastic_rounding_only(sixteen_bits: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        adapterkit.quantize(sixteen_bits, tmp_path / str(seed), to="nf4", rounding="stochastic", seed=seed)
    names = sorted(file.name for file in (tmp_path / "1").glob("*.safetensors"))
    assert any((tmp_path / "1" / n).read_bytes() != (tmp_path / "2" / n).read_bytes() for n in names)
    for how, message in [
        ({"rounding": "up"}, "expected one of nearest"),
        ({"seed": 3}, "`seed` needs stochastic rounding"),
        ({"seed": 2**63, "rounding": "stochastic"}, "expected a whole number"),
        ({"seed": -1, "rounding": "stochastic"}, "expected a whole number"),
    ]:
        with pytest.raises(UsageError, match=message):
            adapterkit.plan_quantize(sixteen_bits, tmp_path / "out", to="nf4", **how)


def test_requantizing_a_float32_base_measures_the_update(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    W = torch.randn(64, 64)
    base, adapter = make_base({"m.weight": W}), make_adapter(factors("m", 64, 64, size=0.3))
    result = adapterkit.merge(base, [adapter], tmp_path / "out", quantize="nf4")
    out = open_checkpoint(tmp_path / "out")
    weight = quant.weights(out.tensors, out.config)["m.weight"]
    assert isinstance(weight, quant.QuantizedWeight) and weight.dtype == "F32"
    after, exact = weight.open(64)(0, 64).double(), oracle.merged({"m.weight": W}, adapter)["m.weight"].exact
    delta = exact - W.double()
    retained = float(((after - W.double()) * delta).sum() / delta.square().sum())
    assert result.retention["m.weight"].retained == pytest.approx(retained, rel=1e-4)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize(
    "code",
    [torch.tensor(CODES["nf4"]), torch.tensor(CODES["fp4"]).sort().values, torch.arange(-127.0, 128), dynamic_code()],
)
def test_search_is_bucketize(code: torch.Tensor, right: bool) -> None:
    for edges in (code, (code[1:] + code[:-1]) / 2):
        most = float(edges.abs().max())
        next_to = [torch.nextafter(edges, torch.tensor(side)) for side in (torch.inf, -torch.inf)]
        values = torch.cat(
            [torch.empty(50_000).uniform_(-1.1 * most, 1.1 * most), edges, *next_to, torch.randn(99) / 1e4]
        )
        assert torch.equal(
            search(values, edges, right=right), torch.bucketize(values, edges, right=right, out_int32=True)
        )
