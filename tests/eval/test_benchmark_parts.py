"""What the benchmark runs and what it skips: the scan, encoders, whole VLMs."""

import time

import pytest
import torch
from transformers import AutoConfig

from ssm_vlm.configuration.named_encoders import ENCODERS, NamedEncoder
from ssm_vlm.eval import benchmark_contenders, benchmark_encoder, benchmark_op, benchmark_settings, benchmark_vlm

SETTING = {"part": "op", "name": "x", "height": 1, "width": 2, "batch": 3, "dtype": "float32", "passes": "forward"}


def quiet(**options) -> benchmark_settings.Settings:
    return benchmark_settings.Settings(**{"rounds": 2, "budget": 30.0, "say": lambda line: None} | options)


def test_backward_reaches_the_parameters():
    encoder = benchmark_contenders.build_encoder("digit_vmamba.digitscenes_64")
    benchmark_contenders.encoder_call(encoder, torch.randn(1, 3, 16, 16), "chunked", backward=True)()
    assert encoder.stem.conv1.weight.grad.abs().max() > 0


def test_last_stage_runs_what_the_tap_leaves_out():
    name = next(
        name for name, entry in ENCODERS.items() if isinstance(entry, NamedEncoder) and name.startswith("vmamba")
    )
    with torch.device("meta"):
        assert len(benchmark_contenders.build_encoder(name).stages) == 3
        assert len(benchmark_contenders.build_encoder(name, True).stages) == 4


def test_scans_are_timed_within_the_block_only():
    encoder = benchmark_contenders.build_encoder("digit_vmamba.digitscenes_64")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), benchmark_contenders.timed_scans(torch.device("cpu")) as seconds:
        start = time.perf_counter()
        encoder(pixels)
        whole, inside = time.perf_counter() - start, seconds()
        assert 0 < inside < whole
    with torch.no_grad():
        encoder(pixels)
    assert seconds() == inside


def test_compulsory_bytes():
    shape = benchmark_op.OpShape.parse("2x3x32")  # rank 1, one state: 4 * (1 + 1 + 1) values of projections
    maps = 32 + 12
    assert benchmark_op.compulsory_bytes(shape, 2, torch.float32, "forward") == 4 * 2 * 6 * (maps + 32)
    both = 4 * 2 * 6 * (maps + 32 + maps + 32 + maps)
    assert benchmark_op.compulsory_bytes(shape, 2, torch.float32, "forward+backward") == both


def test_throughput_batch_keeps_the_pixels():
    assert benchmark_encoder.throughput_batch(16, 224, 224) == 16
    assert benchmark_encoder.throughput_batch(16, 448, 448) == 4
    assert benchmark_encoder.throughput_batch(16, 2048, 2048) == 1


def test_what_exceeds_the_budget_or_fails_is_named_and_the_others_still_run():
    def fails():
        raise KeyError("no such kernel")

    def too_big():
        raise torch.OutOfMemoryError("CUDA out of memory")

    settings = quiet(budget=6.0)
    calls = {
        "quick": lambda: torch.ones(1),
        "slow": lambda: time.sleep(2.2),
        "foreseen": lambda: 1 / 0,
        "failing": fails,
        "too big": too_big,
    }
    rows = settings.run(SETTING, calls, {"foreseen": 100.0})
    assert [row["variant"] for row in rows] == ["quick"]
    slow, *others = [(entry["what"].split(", ")[-1], entry["reason"]) for entry in settings.skipped]
    assert slow[0] == "slow" and slow[1].endswith(" s a call, more than the budget of 6 s allows")
    assert others == [
        ("foreseen", "about 100 s a call, more than the budget of 6 s allows"),
        ("failing", "KeyError: 'no such kernel'"),
        ("too big", "out of memory"),
    ]


def test_a_call_foreseen_to_be_long_is_not_warmed_up(monkeypatch):
    monkeypatch.setattr(benchmark_settings, "LONG_CALL", 0.5)
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in ("short", "long")}
    rows = quiet(rounds=4).run(SETTING, contenders, {"long": 0.6})
    assert {row["variant"]: len(row["seconds"]) for row in rows} == {"short": 4, "long": 4}
    assert calls.count("long") == 4 and calls.count("short") == 4 + 2


def test_a_kernel_that_compiles_in_its_first_call_is_not_over_the_budget():
    waits = iter([3.0])
    settings = quiet(budget=2.0)
    assert len(settings.run(SETTING, {"new": lambda: time.sleep(next(waits, 0))})) == 1 and settings.skipped == []


def test_the_scan_is_measured_against_its_baselines():
    shape = benchmark_op.OpShape.parse("3x2x32")
    settings = quiet()
    forward, both = benchmark_op.op_rows(
        [shape], [2], ["naive", "chunked", "copy_based", "copy_based_own_scan", "triton"], settings
    )
    assert [row["variant"] for row in forward] == [
        "naive",
        "chunked",
        "chunked alone",
        "copy_based",
        "copy_based_own_scan",
    ]
    assert {row["passes"] for row in both} == {"forward+backward"}
    assert all(row["bytes_per_second"] == row["compulsory_bytes"] / row["median"] for row in forward + both)


def encoder_row(name: str, side: int, seconds: float, **others) -> dict:
    row = {"part": "encoder", "name": name, "variant": "default", "height": side, "width": side, "batch": 1}
    return row | {"median": seconds} | others


def test_exponent_and_crossover():
    rows = [encoder_row("line", side, side**2 * 1e-6) for side in (100, 200, 400)]
    rows += [encoder_row("square", side, side**4 * 1e-6 / 150**2) for side in (100, 200, 400)]
    exponents = benchmark_encoder.exponents(rows)
    assert exponents == {"line, default": pytest.approx(1), "square, default": pytest.approx(2)}
    rows += [row | {"variant": "compiled"} for row in rows if row["name"] == "line"]  # crosses nothing that runs alike
    (crossing,) = benchmark_encoder.crossovers(rows)
    assert (crossing["cheaper_above"], crossing["cheaper_below"]) == ("line", "square")
    assert crossing["side"] == pytest.approx(150) and crossing["median"] == pytest.approx(150**2 * 1e-6)


# Whole VLMs


def on_meta(size: str) -> torch.nn.Module:
    return benchmark_vlm.unfilled(AutoConfig.for_model(**benchmark_vlm.LANGUAGE_MODELS[size]), torch.bfloat16)


@pytest.mark.parametrize("size, billions", [("0.5b", 0.494), ("7b", 6.74)])
def test_language_models_have_the_sizes_that_they_are_named_for(size, billions):
    parameters = sum(parameter.numel() for parameter in on_meta(size).parameters())
    assert parameters == pytest.approx(billions * 1e9, rel=0.01)


def test_a_model_that_does_not_fit_is_named_in_words(monkeypatch):
    settings = quiet(dtype=torch.bfloat16)
    monkeypatch.setattr(benchmark_vlm, "_free_memory", lambda: 24e9)
    assert benchmark_vlm.does_not_fit(on_meta("7b"), settings) is None
    monkeypatch.setattr(benchmark_vlm, "_free_memory", lambda: 16e9)
    assert list(benchmark_vlm.vlm_rows(["digit_vit.digitscenes_64"], [(32, 32)], ["mlp2"], ["7b"], settings)) == []
    (entry,) = settings.skipped
    assert entry["what"] == "vlm with the 7b language model"
    assert entry["reason"] == "its weights are 13.5 GB in bfloat16, more than 80 % of the 16.0 GB that are free"


def test_weights_are_written_everywhere_and_tied_ones_stay_tied():
    config = benchmark_vlm.TOY_LANGUAGE_MODEL | {"tie_word_embeddings": True, "vocab_size": 1 << 16}
    model = benchmark_vlm.unfilled(AutoConfig.for_model(**config), torch.float32)
    benchmark_vlm.materialise(model, torch.device("cpu"), torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        spread = parameter.std().item()
        assert (parameter == 1).all() if "norm" in name else spread == pytest.approx(0.02, rel=0.1), name
    big = model.lm_head.weight.flatten()
    assert len(big) > 1 << 20 and big[-1] != 0  # past the end of the block that is repeated
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_rows_of_a_vlm_say_tokens_and_the_encoders_share():
    settings = quiet()
    connectors = ["mlp2", "pixel_shuffle_mlp2"]
    name = "digit_vmamba.digitscenes_64"
    for connector, tokens in zip(connectors, ({32: 16, 64: 64}, {32: 4, 64: 16}), strict=True):
        groups = list(benchmark_vlm.vlm_rows([name], [(64, 64), (32, 32)], [connector], ["toy"], settings))
        assert [group[0]["height"] for group in groups] == [32, 64]
        for group in groups:
            encoding, first, more = group
            assert {row["image_tokens"] for row in group} == {tokens[first["height"]]}
            assert {row["connector"] for row in group} == {connector}
            assert first["encoder_share"] == encoding["median"] / first["median"]
            assert more["tokens_per_second"] == benchmark_vlm.DECODED_TOKENS / more["median"]
    assert settings.skipped == []


def test_a_size_that_would_take_too_long_is_foreseen(monkeypatch):
    settings = quiet(budget=50.0)
    real = settings.run
    monkeypatch.setattr(settings, "run", lambda *arguments: [row | {"median": 100.0} for row in real(*arguments)])
    sizes = [(32, 32), (64, 64)]
    groups = list(benchmark_vlm.vlm_rows(["digit_vit.digitscenes_64"], sizes, ["mlp2"], ["toy"], settings))
    assert len(groups) == 1 and "at 64x64" in settings.skipped[0]["what"]
    assert "s to the first token of 96" in settings.skipped[0]["reason"]
