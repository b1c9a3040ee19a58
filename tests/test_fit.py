"""``kvmerge fit``: what it says against what llama.cpp then allocates, and what it refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest

import kvmerge
from kvmerge import cli, pocket
from kvmerge.byte_size import parse_bytes
from kvmerge.errors import OptionError, ProjectorError, StateError
from kvmerge.estimate.dry_load import CacheSize, ContextOptions, ContextSizes, DryModel, GraphSizes
from kvmerge.estimate.projector_size import DryProjector
from kvmerge.native.log import caught
from kvmerge.policies import PRESETS
from mrope_model import PICTURE, PICTURE_TOKENS, write_mrope_model
from random_model import Shape, write_random_model
from session import Session

# Only now: the libraries that it loads are those that `kvmerge` has named.
from llama_cpp import mtmd_cpp  # isort: skip

MODEL, MMPROJ = str(pocket.model_path()), str(pocket.mmproj_path())


def fit(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert cli.main(["fit", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def write_large_model(path: Path) -> Path:
    """Write the header of a model of 7 B; its weights are a hole in the file."""
    layers, width, ffn, vocab = 32, 4096, 11008, 32000
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (vocab, width),
        "output": (vocab, width),
        "output_norm": (width,),
    }
    for layer in range(layers):
        for name, shape in {
            **dict.fromkeys(("attn_norm", "ffn_norm"), (width,)),
            **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width)),
            **dict.fromkeys(("ffn_gate", "ffn_up"), (ffn, width)),
            "ffn_down": (width, ffn),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    n_bytes = 0
    for name, shape in shapes.items():
        kind = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        size = int(np.prod(shape)) * kind.itemsize
        writer.add_tensor_info(f"{name}.weight", shape, kind, size)
        n_bytes += size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + n_bytes + 4096)
    return path


@pytest.mark.parametrize(("cache", "flash"), [("f16", True), ("f16", False), ("q8_0", True)])
def test_buffers_are_those_of_llama_cpp(
    cache: str, flash: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_random_model(tmp_path / "random.gguf", Shape(layers=6))
    options = ["--n-ubatch", 128, "--n-batch", 128, "--type-k", cache, "--type-v", cache]
    options += ["--flash-attn"] if flash else []
    said = fit(capsys, model, "--ctx", 2048, "--text-tokens", 1024, "--kv-budget", 300,
        "--kv-merge", "flowmm", *options)  # fmt: skip
    filled = fit(capsys, model, "--ctx", 2048, "--text-tokens", 2048, *options)
    engine = PRESETS["flowmm"].engine_params()
    for column, merge, n_ctx in (("full", None, 2048), ("merged", engine, 2048)):
        with caught(1, quiet=True) as log:
            with Session(
                model,
                merge=merge,
                n_ctx=n_ctx,
                n_batch=128,
                cache_type=cache,
                flash_attention=flash,
                first_cells=256 if merge else 0,
            ) as session:
                kv = sum(map(float, re.findall(r"KV buffer size = +([\d.]+)", "".join(log))))
                if merge:
                    for _ in range(8):
                        session.decode(list(range(128)))
                    session.engine.merge(300)
                    session.decode(list(range(100)))
                    kv = session.engine.bytes() / 2**20
                    assert said["merged"]["cells"] == session.engine.size() == 512
                    # Cells that were never used take no memory; V without fused attention lies in
                    # rows over all cells.
                    bias = 6 * 2 * 512 * (2 if flash else 4) / 2**20
                    kv -= (kv - bias) * (512 - 301) / 512 * (1 if flash else 0.5)
            (compute,) = re.findall(r"compute buffer size (?:is|of) +([\d.]+)", "".join(log))
        assert said[column]["kv"] / 2**20 == pytest.approx(kv, rel=0.02)
        if merge:
            # buffers of their own, of which a token writes to little
            assert 0 < said["merged"]["compute"] < said["full"]["compute"] / 2
        else:
            # of the logits of a batch, those of one token are written, and copied
            logits = Shape().vocab * 4 / 2**20
            most, least = float(compute) + logits, float(compute) - 127 * logits
            assert least - 0.02 <= filled["full"]["compute"] / 2**20 <= most + 0.02
            assert said["full"]["compute"] < filled["full"]["compute"]
    assert said["full"]["weights"] == pytest.approx(model.stat().st_size, rel=0.01)


def test_weights_are_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_large_model(tmp_path / "large.gguf")
    process = psutil.Process()
    before = process.memory_info().rss
    said = fit(capsys, model, "--ctx", 4096, "--image-tokens", 576, "--images", 6)
    assert process.memory_info().rss - before < 512 * 2**20
    assert said["full"]["weights"] > 12 * 2**30
    # 32 layers, K and V, 4096 values of two bytes
    assert said["full"]["kv"] == 4096 * 32 * 2 * 4096 * 2
    assert said["tokens"] == 6 * 576 + 256
    # all text, and a fifth of the pictures
    assert said["merged"]["held"] == 256 + 692
    assert said["merged"]["cells"] == 1024


def test_pictures_of_the_pocket_model(capsys: pytest.CaptureFixture[str]) -> None:
    said = fit(capsys, MODEL, "--mmproj", MMPROJ, "--images", 10, "--size", "640x480")
    assert (said["image_tokens"], said["tokens"]) == (64, 10 * 64 + 256)
    full = said["full"]
    assert full["total"] == sum(
        value for key, value in full.items() if key not in ("total", "cells", "held")
    )
    assert full["mmproj"] == pytest.approx(Path(MMPROJ).stat().st_size, rel=0.01)
    with caught(1, quiet=True) as log, kvmerge.Llama(MODEL, mmproj=MMPROJ, verbose=False):
        found = re.findall(r"reserve_compute_meta.* = +([\d.]+) MiB", "".join(log))
    assert full["encoder"] / 2**20 == pytest.approx(float(found[0]), rel=0.05)


def test_pictures_of_any_size_count_as_when_they_are_read(tmp_path: Path) -> None:
    model, mmproj = write_mrope_model(tmp_path)
    sizes = [(PICTURE, PICTURE), (320, 80), (1024, 768), (33, 400)]
    with DryModel(model) as dry:
        projector = DryProjector(mmproj)
        counted = projector.image_tokens(dry, sizes)
        params = mtmd_cpp.mtmd_context_params_default()
        params.warmup = params.use_gpu = False
        context = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), dry.pointer, params)
        read = [projector._count(context, *size) for size in sizes]
        mtmd_cpp.mtmd_free(context)
    assert counted == read
    assert counted[0].piece == PICTURE_TOKENS
    assert counted[2].piece > counted[1].piece > PICTURE_TOKENS


def test_an_unknown_projector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mmproj = tmp_path / "unknown.gguf"
    writer = gguf.GGUFWriter(mmproj, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "nonesuch")
    writer.add_tensor("v.class_embd", np.zeros(1024, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert cli.main(["fit", MODEL, "--mmproj", str(mmproj)]) == 1
    error = capsys.readouterr().err
    assert "'nonesuch'" in error
    assert "--image-tokens" in error
    said = fit(capsys, MODEL, "--mmproj", mmproj, "--image-tokens", 100, "--images", 3)
    assert said["tokens"] == 3 * 100 + 256
    assert said["full"]["encoder"] is None


def test_more_memory_takes_more_pictures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # that of the tests would be another each time
    monkeypatch.setattr("kvmerge.resident.resident", lambda: 40 * 2**20)
    counts = [
        fit(capsys, MODEL, "--mmproj", MMPROJ, "--flash-attn", "--memory", memory)
        for memory in ("39MiB", "90MiB", "120MiB")
    ]
    within = [said["images_within_memory"] for said in counts]
    assert counts[0]["full"]["process"] == 40 * 2**20
    assert set(within[0].values()) == {0}
    for name in ("full", "merged", "merged_in_turns"):
        assert within[0][name] < within[1][name] < within[2][name]
    assert within[2]["full"] < within[2]["merged_in_turns"]


def test_only_cells_that_were_written_take_memory() -> None:
    large, window = CacheSize(1024, 4096, 8192), CacheSize(256, 512, 512)
    sizes = ContextSizes((large, window), 0, GraphSizes(0, 0))
    assert sizes.kv_of(1024, together=True) == sizes.kv == 4096 + 8192 + 2 * 512
    assert sizes.kv_of(256, together=True) == sizes.kv - (4096 + 8192) * 3 // 4
    assert sizes.kv_of(256, together=False) == sizes.kv - 4096 * 3 // 4


def test_merged_cells_take_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text-tokens", 2000, "--ctx", 4096, "--flash-attn", "--kv-merge", "flowmm"]
    options += ["--kv-budget"]
    few, many = (fit(capsys, MODEL, *options, cells)["merged"] for cells in (300, 400))
    assert few["cells"] == many["cells"] == 512
    assert (few["held"], many["held"]) == (300, 400)
    # 4 KiB a cell, and 20 bytes for each layer and KV head
    assert many["kv"] - few["kv"] == 100 * 4096
    assert many["records"] * 300 == few["records"] * 400
    assert few["graphs"] > fit(capsys, MODEL, *options, 300)["full"]["graphs"]


def test_only_a_model_without_weights_is_laid_out() -> None:
    with Session(Path(MODEL), merge={}) as session, pytest.raises(StateError, match="no_alloc"):
        session.engine.lay_out(True)


def test_a_cap_holds_while_reading(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--mmproj", MMPROJ, "--images", 100, "--kv-max-cells"]
    for cap in ("1024", "4MiB"):  # 4 KiB a cell
        said = fit(capsys, MODEL, *options, cap)
        assert said["while_reading"]["cells"] == said["merged"]["cells"] == 1024


def test_a_prompt_that_is_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", MODEL, "--mmproj", MMPROJ, "--images", "100", "--ctx", "1024"]) == 0
    output = capsys.readouterr().out
    assert "12 of these pictures fit" in output
    assert "at least 6656" in output


def test_nothing_is_logged_on_the_way(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", MODEL, "--mmproj", MMPROJ]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.gguf"], "does not exist"),
        ([__file__], "is not a GGUF file"),
        ([MMPROJ], "It looks like an mmproj"),
        ([MODEL, "--mmproj", "nowhere.gguf"], "does not exist"),
        ([MODEL, "--mmproj", __file__], "is not a GGUF file"),
        ([MODEL, "--mmproj", MODEL], "is not an mmproj"),
        ([MODEL, "--images", "3"], "--images needs --mmproj"),
        ([MODEL, "--image-max-tokens", "9"], "need --mmproj"),
        ([MODEL, "--type-k", "q8"], "Did you mean 'q8_0'?"),
        ([MODEL, "--type-v", "q8_0"], "needs --flash-attn"),
        ([MODEL, "--kv-max-cells", "1MiB"], "at least 512 are needed, 2.0MiB"),
        ([MODEL, "--kv-merge", "flowm"], "Did you mean 'flowmm'?"),
    ],
)
def test_bad_input(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("kvmerge fit: ")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--images", "0", "from 1 to 2147483647"),
        ("--size", "abc", "WIDTHxHEIGHT"),
        ("--size", "0x10", "WIDTHxHEIGHT"),
        ("--ctx", "0", "from 1 to 2147483647"),
        ("--ctx", "4294967296", "from 1 to 2147483647"),
        ("--kv-budget", "2.5", "(0, 1]"),
        ("--kv-budget", "big", "(0, 1]"),
        ("--kv-max-cells", "511", "at least 512"),
        ("--kv-max-cells", "some", "at least 512"),
        ("--memory", "plenty", "such as 8GiB"),
    ],
)
def test_out_of_range(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", MODEL, option, value])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_auto_merges_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    said = fit(capsys, MODEL, "--text-tokens", 2000)
    assert said["merged"]["held"] == said["while_reading"]["held"] == 2000


def test_cells_are_those_of_kv_stats(capsys: pytest.CaptureFixture[str]) -> None:
    text = "What is told here is of no use. " * 60
    for policy in ("auto", "flowmm", "streaming"):
        with kvmerge.Llama(MODEL, n_ctx=2048, kv_merge=policy, verbose=False) as llm:
            tokens = llm.tokenize(text.encode())[:600]
            llm.create_completion(tokens, max_tokens=1)
            held, size = llm.kv_stats().cells, llm.engine.size()
        said = fit(capsys, MODEL, "--text-tokens", 600, "--ctx", 2048, "--kv-merge", policy)
        assert said["merged"]["held"] == pytest.approx(held, abs=1)
        assert said["merged"]["cells"] == size


def test_a_window_has_a_cache_of_its_own() -> None:
    everything, window = CacheSize(512, 4096, 4096), CacheSize(2048, 9000, 9000)
    sizes = ContextSizes((everything, window), 0, GraphSizes(0, 0))
    assert sizes.cells == 512
    assert sizes.kv_of(256, together=True) == 4096 + 18000


def test_a_very_long_context_takes_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    said = fit(capsys, MODEL, "--ctx", 2**31 - 1, "--text-tokens", 10**9, "--kv-merge", "flowmm")
    assert process.memory_info().rss - before < 64 * 2**20
    assert said["full"]["kv"] == pytest.approx((2**31 - 1) * 4096, rel=1e-3)
    assert said["while_reading"]["kv"] > 10**9 * 4096
    twice = [fit(capsys, MODEL, "--ctx", n)["full"]["kv"] for n in (2**17, 2**18)]
    assert twice[1] == 2 * twice[0]


@pytest.mark.parametrize("keep", [10, 100, 3000])
def test_a_file_that_is_cut_off(keep: int, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(MMPROJ).read_bytes()[:keep])
    with pytest.raises(ProjectorError, match="broken.gguf"):
        DryProjector(broken)


def test_amounts_of_memory() -> None:
    assert parse_bytes("--memory", "8GiB") == 8 * 2**30
    assert parse_bytes("--memory", "1.5 mb") == 1_500_000
    assert parse_bytes("--memory", "4096") == 4096
    for text in ("", "0", "-1GiB", "GiB", "8 bananas", "1iB"):
        with pytest.raises(OptionError, match="such as 8GiB"):
            parse_bytes("--memory", text)


def test_a_context_is_laid_out_once() -> None:
    with DryModel(MODEL) as model:
        options = ContextOptions(512)
        assert model.context(options) is model.context(options)
