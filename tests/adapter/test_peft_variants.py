"""Variants of LoRA in PEFT: merged to the model that was trained, judged by its logits, or refused with a way out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from handmade import adapterkit as run
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, CordaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkit
from adapterkit.combining.initial_factors import INITIAL
from adapterkit.errors import FitError, FormatError
from adapterkit.hub.upload.prepare import prepare

IDS = torch.arange(3, 27).reshape(2, 12)
BASE = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=False,
)  # fmt: skip
TARGETS = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("variants") / "base"
    LlamaForCausalLM(BASE).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def train(base: Path, folder: Path, prepare: Callable[..., None] = lambda *_: None, **config: Any) -> torch.Tensor:
    """Save an adapter as it starts, to `folder`-start, and trained, to `folder`; returns the logits of the trained model."""
    model, settings = loaded(base), LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules=TARGETS)
    for name, value in config.items():
        setattr(settings, name, value)
    with warnings.catch_warnings(action="ignore"):
        prepare(model, settings)
        trained = get_peft_model(model, settings)
        trained.save_pretrained(f"{folder}-start")
        for name, parameter in trained.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
        trained.save_pretrained(folder)
    return logits(trained)


# --- initializations that change the base ----------------------------------------------------------------------------


def with_covariance(model: nn.Module, config: LoraConfig) -> None:
    """CorDA's factors for inputs that are not alike; its own preparation needs the package `attrs`."""
    config.corda_config = CordaConfig()
    for name, layer in model.named_modules():
        if name.endswith(tuple(TARGETS)):
            size = 1 + torch.arange(layer.in_features)  # of each input
            U, S, Vh = torch.linalg.svd(layer.weight.data * size)
            layer.eigens = SimpleNamespace(U_WC=U[:, :4], S_WC=S[:4].clone(), V_WC=(Vh[:4] / size).T)


def with_gradients(model: nn.Module, config: LoraConfig) -> None:
    config.lora_ga_config = LoraGAConfig()
    preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())


INITS: dict[str, Callable[..., None]] = {
    "pissa": lambda *_: None, "pissa_niter_4": lambda *_: None, "olora": lambda *_: None, "corda": with_covariance,
    "lora_ga": with_gradients,
}  # fmt: skip


@pytest.mark.parametrize("init", INITS)
def test_an_unconverted_initialization_is_refused_until_it_is_converted(base: Path, tmp_path: Path, init: str) -> None:
    """Merged as they are, these were off by more than the adapter's whole effect (peft #2270)."""
    adapter = tmp_path / init
    trained = train(base, adapter, INITS[init], init_lora_weights=init)
    message = run("merge", base, adapter, "-o", tmp_path / "out").message(3)
    assert message.startswith(f"{init}: adapter_config.json: init_lora_weights: '{init}' moves a part of the base")
    assert ("--to lora --base BASE" if init in INITIAL else "--to lora --initial INITIAL") in message
    run_ok("convert", adapter, "--to", "lora", "--initial", f"{adapter}-start", "-o", tmp_path / "lora")
    run_ok("merge", base, tmp_path / "lora", "-o", tmp_path / "out")
    assert distance(logits(loaded(tmp_path / "out")), trained) < 1e-5
    again = run("convert", adapter, "--to", "lora", "--base", base, "-o", tmp_path / "again")
    assert again.code == (0 if init in INITIAL else 2)
    if init in INITIAL:
        expected = logits(PeftModel.from_pretrained(loaded(base), adapter))
        assert distance(expected, trained) < 1e-5
        run_ok("merge", base, tmp_path / "again", "-o", tmp_path / "merged")
        assert distance(logits(loaded(tmp_path / "merged")), expected) < 1e-5


@pytest.mark.parametrize("init", INITIAL)
@pytest.mark.parametrize("rslora", [False, True])
def test_initial_factors_are_pefts(base: Path, tmp_path: Path, init: str, rslora: bool) -> None:
    """Also for adapters of several ranks and alphas, and with rsLoRA, for which PEFT has no conversion."""
    train(
        base, adapter := tmp_path / "adapter", init_lora_weights=init, use_rslora=rslora, target_modules=LINEAR,
        rank_pattern={"k_proj": 7, "0.mlp.down_proj": 32}, alpha_pattern={"v_proj": 1.5},
    )  # fmt: skip
    start, model = adapterkit.load(f"{adapter}-start"), loaded(base)
    for name, weights in start.modules.items():
        W = model.get_submodule(name).weight.data
        B, A = INITIAL[init](W, weights.rank, weights.scaling)
        torch.testing.assert_close(B @ A, start[name].B @ start[name].A, atol=1e-5, rtol=1e-4)
    run_ok("convert", adapter, "--to", "lora", "--base", base, "-o", tmp_path / "lora")
    run_ok("merge", base, tmp_path / "lora", "-o", tmp_path / "out")
    expected = logits(PeftModel.from_pretrained(loaded(base), adapter))
    assert distance(logits(loaded(tmp_path / "out")), expected) < 1e-5


def test_with_dora_there_is_no_conversion(base: Path, tmp_path: Path) -> None:
    train(base, adapter := tmp_path / "adapter", init_lora_weights="pissa", use_dora=True)
    assert "merge it with PEFT: `merge_and_unload()`" in run("merge", base, adapter, "-o", tmp_path / "out").message(3)
    for options in (["--base", base, "--rank", "4"], ["--initial", f"{adapter}-start"], ["--rank", "4"], []):
        assert run("convert", adapter, "--to", "lora", *options, "-o", tmp_path / "out").code in (2, 3)


def test_a_base_for_initial_factors_has_16_bits_or_more(base: Path, tmp_path: Path) -> None:
    train(base, adapter := tmp_path / "adapter", init_lora_weights="pissa")
    run_ok("quantize", base, "--to", "nf4", "-o", tmp_path / "nf4")
    message = run("convert", adapter, "--to", "lora", "--base", tmp_path / "nf4", "-o", tmp_path / "out").message(3)
    assert "nf4: is quantized; pissa starts from the 16-bit base" in message
    converted = ["convert", adapter, "--to", "lora", "--base", base, "-o", tmp_path / "out"]
    assert "omit --rank and --energy" in run(*converted, "--rank", "4").message(2)
    assert "needs no base" in run("convert", f"{adapter}", "--to", "rslora", "--base", base, "-o", "x").message(2)


def test_what_peft_converted_on_saving_is_merged(base: Path, tmp_path: Path) -> None:
    """PEFT sets init_lora_weights to true, for the initial adapter too, when it converts."""
    model = get_peft_model(
        loaded(base), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="pissa")
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    run_ok("merge", base, tmp_path / "adapter", "-o", tmp_path / "out")
    assert distance(logits(loaded(tmp_path / "out")), trained) < 1e-5


@pytest.fixture
def loftq(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoftQ as in PEFT, whose own wants a GPU; bitsandbytes' CPU kernel misreads matrices this small."""
    nf4 = pytest.importorskip("bitsandbytes.functional")

    @torch.no_grad()
    def start(weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int) -> tuple[torch.Tensor, ...]:
        low_rank = torch.zeros(())
        for _ in range(num_iter):
            codes, state = nf4.quantize_4bit(weight.data - low_rank, quant_type="nf4")
            pairs = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1)
            rounded = (state.code[pairs.flatten().long()].view(-1, 64) * state.absmax[:, None]).view_as(weight)
            U, S, Vh = torch.linalg.svd(weight.data - rounded, full_matrices=False)
            A, B = S[:reduced_rank, None].sqrt() * Vh[:reduced_rank], U[:, :reduced_rank] * S[:reduced_rank].sqrt()
            low_rank = B @ A
        return rounded, A, B

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", start)


@pytest.mark.usefixtures("loftq")
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_loftq_adapter_belongs_to_the_quantized_base(base: Path, tmp_path: Path, iterations: int) -> None:
    """Merged into the base of 16 bits, the error of quantizing was counted twice (peft #1525)."""
    adapter, nf4, out = tmp_path / "adapter", tmp_path / "nf4", tmp_path / "out"
    settings = {"loftq_bits": 4, "loftq_iter": iterations}
    trained = train(base, adapter, init_lora_weights="loftq", loftq_config=settings, target_modules=LINEAR)
    run_ok("quantize", base, "--to", "nf4", "-o", nf4)
    message = run("merge", base, adapter, "-o", out).message(3)
    assert "init_lora_weights: 'loftq' moves the error of quantizing the base into the initial factors" in message
    assert ("adapterkit merge BASE ADAPTER --as-trained nf4" in message) is (iterations == 1)
    assert run("merge", base, adapter, "--quantize", "nf4", "-o", out).code == 3
    assert run("merge", nf4, adapter, "--original", base, "-o", out).code == 3
    if iterations == 1:  # later iterations quantize the base without the factors, which no file has
        result = run("merge", nf4, adapter, "-o", out)
        assert result.code == 0 and "note: adapter: adapter_config.json: init_lora_weights" in result.err
        assert distance(logits(loaded(out)), trained) < 1e-5
        run_ok("merge", base, adapter, "--as-trained", "nf4", "-o", tmp_path / "as trained")
        assert distance(logits(loaded(tmp_path / "as trained")), trained) < 1e-5
    else:
        assert run("merge", nf4, adapter, "-o", out).code == 3
        assert run("merge", base, adapter, "--as-trained", "nf4", "-o", out).code == 3
    run_ok("convert", adapter, "--to", "lora", "--initial", f"{adapter}-start", "-o", tmp_path / "lora")
    run_ok("merge", base, tmp_path / "lora", "-o", tmp_path / "converted")
    error = distance(logits(loaded(tmp_path / "converted")), trained)
    assert error < distance(logits(loaded(base)), trained)  # all that is left is what the initial factors did not hold


COMMANDS: dict[str, list[str]] = {
    "merge": ["merge", "BASE", "ADAPTER", "-o", "OUT"],
    "verify": ["verify", "BASE", "--base", "BASE", "--adapter", "ADAPTER"],
    "combine": ["combine", "ADAPTER", "OTHER", "-o", "OUT"],
    "resize": ["resize", "ADAPTER", "--rank", "2", "-o", "OUT"],
    "compare": ["compare", "ADAPTER", "OTHER"],
    "convert": ["convert", "ADAPTER", "--to", "rslora", "-o", "OUT"],
    "to DoRA": ["convert", "ADAPTER", "--to", "dora", "--base", "BASE", "-o", "OUT"],
    "eval": ["eval", "BASE", "ADAPTER", "DATA"],
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "init_lora_weights": (
        {"init_lora_weights": "pissa"},
        "convert it first: `adapterkit convert ADAPTER --to lora --base BASE",
    ),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [5, 6]}, "serve the adapter unmerged"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "build that model first"),
    "nvfp4_merge_aware": (
        {"nvfp4_merge_aware": {"scale_mode": "fresh", "pts_policy": "base_fused_max", "encoder": "torchao-0.18.0"}},
        "axolotl merge-lora",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("field", REFUSED)
def test_every_command_that_computes_with_the_update_refuses_it(
    base: Path, make_adapter: Callable[..., Path], tmp_path: Path, field: str, command: str
) -> None:
    config, remedy = REFUSED[field]
    weights = {f"model.layers.0.self_attn.q_proj.lora_{k}.weight": torch.randn(4, 32) for k in "A"}
    weights |= {"model.layers.0.self_attn.q_proj.lora_B.weight": torch.randn(32, 4)}
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    given = {
        "BASE": base, "ADAPTER": make_adapter(weights, **config), "OTHER": make_adapter(weights, "other"),
        "OUT": tmp_path / "out", "DATA": tmp_path / "data.jsonl",
    }  # fmt: skip
    message = run(*(given.get(word, word) for word in COMMANDS[command])).message(3)
    assert f"adapter_config.json: {field}: " in message and remedy in message
    assert not (tmp_path / "out").exists()
    model = loaded(base)
    with pytest.raises(FitError, match=field):
        adapterkit.apply(model, adapterkit.load(given["ADAPTER"]))
    shown = run("inspect", given["ADAPTER"]).out
    assert field in shown and "merge refuses it" in " ".join(shown.split())


@pytest.mark.parametrize("field", REFUSED)
def test_a_card_says_why_an_intact_adapter_is_not_merged(make_adapter: Callable[..., Path], field: str) -> None:
    """It loads in PEFT, so it can be published; the card printed a merge that fails."""
    config, remedy = REFUSED[field]
    weights = {"q.lora_A.weight": torch.randn(4, 32), "q.lora_B.weight": torch.randn(32, 4)}
    cards = {}
    for name, fields in (("refused", config), ("plain", {})):
        files = prepare(make_adapter(weights, name, **fields), "me/lora", "org/base").files
        cards[name] = next(file.content or b"" for file in files if file.name == "README.md").decode()
    assert "adapterkit merge org/base me/lora" in cards["plain"]
    assert "adapterkit merge org/base me/lora" not in cards["refused"]
    assert "Not merged as it is: " in cards["refused"]
    assert remedy.split("`")[0] in cards["refused"]


def run_ok(*args: str | Path) -> None:
    result = run(*args)
    assert result.code == 0, result


# --- variants that are plain LoRA once they are trained --------------------------------------------------------------

PLAIN: dict[str, dict[str, Any]] = {
    "VeLoRA": {"velora_config": VeloraConfig(num_groups=4, init_type="random")},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2)},
    "BD-LoRA": {
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["v_proj"], target_modules_bd_b=["q_proj"], nblocks=2),
        "alpha_pattern": {"v_proj": 3},
    },
    "MiCA": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "EVA": {"init_lora_weights": "eva"},
    "layers by pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layers without pattern": {"layers_to_transform": 0},
    "excluded by name": {"target_modules": "all-linear", "exclude_modules": ["lm_head", "0.self_attn.q_proj"]},
    "excluded by regex": {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    "fan_in_fan_out of a linear layer": {"fan_in_fan_out": True},
    "rank and alpha by layer": {"rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"self_attn": 9}},
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_merge_computes_what_peft_does(base: Path, tmp_path: Path, case: str) -> None:
    trained = train(base, tmp_path / "adapter", **PLAIN[case])
    with warnings.catch_warnings(action="ignore"):
        expected = logits(PeftModel.from_pretrained(loaded(base), tmp_path / "adapter"))
    assert distance(expected, trained) < 1e-5 < distance(expected, logits(loaded(base)))
    run_ok("merge", base, tmp_path / "adapter", "-o", tmp_path / "out")
    assert distance(logits(loaded(tmp_path / "out")), expected) < 1e-5
    adapterkit.save(adapterkit.load(tmp_path / "adapter"), tmp_path / "saved")
    with warnings.catch_warnings(action="ignore"):
        again = PeftModel.from_pretrained(loaded(base), tmp_path / "saved")
    assert distance(logits(again), expected) < 1e-5


# --- modules that the config leaves out ------------------------------------------------------------------------------

LEFT_OUT: dict[str, tuple[dict[str, Any], int]] = {
    "excluded by name": ({"exclude_modules": ["q_proj"]}, 4),
    "excluded by whole name": ({"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, 1),
    "a name that ends alike": ({"exclude_modules": ["_proj"]}, 0),
    "excluded by regex": ({"exclude_modules": r".*\.[01]\..*q_proj"}, 2),
    "a regex that matches a part": ({"exclude_modules": "q_proj"}, 0),
    "another layer": ({"layers_to_transform": 1}, 6),
    "other layers": ({"layers_to_transform": [0, 2, 3]}, 2),
    "another layer by pattern": ({"layers_to_transform": [0], "layers_pattern": "layers"}, 6),
    "a pattern that is not there": ({"layers_to_transform": [0, 1, 2, 3], "layers_pattern": ["h", "blocks"]}, 8),
    "one of the patterns": ({"layers_to_transform": [0, 1, 2, 3], "layers_pattern": ["h", "layers"]}, 0),
    "no layers": ({"layers_to_transform": []}, 0),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_tensors_that_peft_would_ignore_are_refused(tmp_path: Path, case: str) -> None:
    """The file of an adapter of all layers beside a config that leaves some out, as PEFT's own matching tells."""
    fields, ignored = LEFT_OUT[case]
    model = LlamaForCausalLM(LlamaConfig(**BASE.to_diff_dict() | {"num_hidden_layers": 4}))
    whole = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))
    whole.save_pretrained(tmp_path / "a")
    config = LoraConfig(r=4, target_modules=TARGETS, **fields)
    names = [
        name.removeprefix("base_model.model.") for name, layer in whole.named_modules() if hasattr(layer, "lora_A")
    ]
    assert sum(not check_target_module_exists(config, name) for name in names) == ignored
    config.save_pretrained(tmp_path / "a")
    fatal = [problem for problem in adapterkit.load(tmp_path / "a").problems if problem.fatal]
    assert len(fatal) == (ignored > 0)
    if fatal:
        more = f" and {ignored - 1} more" if ignored > 1 else ""
        assert f"{more}, which PEFT ignores" in fatal[0].what and fatal[0].where.endswith(next(iter(fields)))


@pytest.mark.parametrize("field", ["exclude_modules", "layers_to_transform", "layers_pattern"])
@pytest.mark.parametrize("value", [{"a": 1}, [1.5, {}], True])
def test_fields_of_the_wrong_type(make_adapter: Callable[..., Path], field: str, value: Any) -> None:
    with pytest.raises(FormatError, match=f"adapter_config.json: {field} is "):
        adapterkit.load(make_adapter({"q.lora_A.weight": torch.ones(4, 4)}, **{field: value}))
