"""Packed tensors and folders: exact for every dtype and pattern, as small as promised, and never silently wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from topiarist.core.errors import CheckpointError, TopiaristError
from topiarist.core.patterns import NM, Unstructured
from topiarist.runtime import bits, loading, packed

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern may occur: NaNs with payloads, infinities, denormals, -0.0."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def zeroed(tensor: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    raw = bits.raw_bits(tensor).clone()
    raw[~keep] = 0
    return raw.view(tensor.dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits.raw_bits(a), bits.raw_bits(b))


@st.composite
def sparse_tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**31))
    kind = draw(st.sampled_from(["2:4", "1:4", "4:8", "8:16", "free", "3d"]))
    if kind in ("free", "3d"):
        shape = tuple(draw(st.lists(st.integers(1, 21), min_size=1, max_size=2 if kind == "free" else 3)))
        tensor = random_bits(shape, dtype, seed)
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < draw(st.floats(0, 1))
    else:
        of = int(kind.split(":")[1])
        shape = (draw(st.integers(1, 9)), of * draw(st.integers(1, 6)))
        tensor = random_bits(shape, dtype, seed)
        keep = NM(int(kind.split(":")[0]), of).mask(torch.rand(shape, generator=torch.Generator().manual_seed(seed)))
        keep &= torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < draw(st.sampled_from([0.7, 1.0]))
    return zeroed(tensor, keep)


@settings(deadline=None, max_examples=300)
@given(sparse_tensors())
def test_round_trip_is_exact_and_never_larger(tensor):
    small = bits.pack(tensor)
    if small is not None:
        assert small.nbytes < tensor.nbytes
        assert same_bits(bits.unpack(small), tensor)


def test_negative_zero_and_nan_payloads_are_values():
    raw = torch.tensor([0x8000 - 0x10000, 0, 0x7FC1, 0, 0, 0, 0, 1], dtype=torch.int16)
    tensor = raw.view(torch.bfloat16)
    small = bits.pack(tensor)
    assert small is not None and small.values.numel() == (4 if small.form == "six" else 3)
    assert same_bits(bits.unpack(small), tensor)


@pytest.mark.parametrize(
    ("pattern", "dtype", "limit", "form"),
    [
        (NM(2, 4), torch.bfloat16, 0.55, "six"),
        (NM(2, 4), torch.float32, 0.53, "six"),
        (NM(1, 4), torch.bfloat16, 0.32, "bitmask"),
        (NM(4, 8), torch.bfloat16, 0.57, "bitmask"),
        (Unstructured(0.7), torch.bfloat16, 0.37, "bitmask"),
        (Unstructured(0.7), torch.float32, 0.34, "bitmask"),
        (NM(2, 4), torch.float8_e4m3fn, 0.59, "six"),
    ],
    ids=str,
)
def test_sizes(pattern, dtype, limit, form):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    mask = pattern.mask(weight.abs())
    weight = (weight + weight.sign()).to(dtype)  # away from zero, so that fp8 rounds none to it
    weight = zeroed(weight, mask)
    small = bits.pack(weight)
    assert small is not None and small.form == form
    assert small.nbytes <= limit * weight.nbytes
    assert bits.describe(bits.nonzero_mask(weight)) == str(pattern)


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(8, 8), torch.tensor(0.0), torch.zeros(0, 4), torch.ones(3, dtype=torch.int64)],
    ids=["full", "scalar", "empty", "ints"],
)
def test_what_does_not_shrink_stays_as_it_is(tensor):
    assert bits.pack(tensor) is None


def test_all_zero_tensor():
    small = bits.pack(torch.zeros(5, 7))
    assert small is not None and small.values.numel() == 0
    assert same_bits(bits.unpack(small), torch.zeros(5, 7))


def test_unpack_refuses_parts_that_do_not_belong_together():
    small = bits.pack(torch.eye(16))
    assert small is not None
    for wrong in (
        bits.PackedTensor("bitmask", (16, 16), small.values[:-1], small.index),
        bits.PackedTensor("bitmask", (16, 20), small.values, small.index),
        bits.PackedTensor("other", (16, 16), small.values, small.index),
    ):
        with pytest.raises(ValueError):
            bits.unpack(wrong)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    weight = random_bits((64, 64), torch.bfloat16, 1)
    weight = torch.where(weight.isfinite(), weight, 1.0)  # a folder of others is refused
    save_file(
        {
            "a.weight": zeroed(weight, NM(2, 4).mask(torch.rand(64, 64))),
            "b.weight": zeroed(weight.clone(), torch.rand(64, 64) < 0.3),
            "norm.weight": torch.randn(64),
            "step": torch.tensor(7),
            "odd": torch.ones(3, dtype=torch.int8),
        },
        folder / "model-00001-of-00002.safetensors",
        metadata={"format": "pt"},
    )
    save_file(
        {"experts": zeroed(torch.randn(3, 16, 24), torch.rand(3, 16, 24) < 0.5)},
        folder / "model-00002-of-00002.safetensors",
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    files = sorted(folder.glob("*.safetensors"))
    weight_map = {name: file.name for file in files for name in load_file(file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"a.weight": torch.ones(4, dtype=torch.uint8)}, folder / "masks.safetensors")
    (folder / "recipe.yaml").write_text("topiarist: 1\n")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("shard_bytes", [1, 6000, 1 << 30])
def test_folder_round_trip(model_folder, tmp_path, shard_bytes):
    report = packed.pack_folder(model_folder, tmp_path / "packed", shard_bytes=shard_bytes)
    packed.unpack_folder(tmp_path / "packed", tmp_path / "back", shard_bytes=shard_bytes)
    before, after = tensors_of(model_folder), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)
    assert (tmp_path / "packed/config.json").read_text() == (tmp_path / "back/config.json").read_text()
    assert not (tmp_path / "back" / packed.MANIFEST).exists()
    assert report.num_packed == 3 and report.num_tensors == 6
    assert report.packed_bytes < report.dense_bytes == sum(tensor.nbytes for tensor in before.values())
    files = sorted(file.name for file in (tmp_path / "back").glob("model*.safetensors"))
    if len(files) > 1:
        index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files and index["weight_map"].keys() == before.keys()
    else:
        assert files == ["model.safetensors"]
    for name in ("masks.safetensors", "recipe.yaml"):
        assert (tmp_path / "back" / name).read_bytes() == (model_folder / name).read_bytes()


def test_a_packed_folder_has_no_file_that_transformers_takes_for_weights(model_folder, tmp_path):
    packed.pack_folder(model_folder, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("model*"))


def test_refusals(model_folder, tmp_path):
    with pytest.raises(TopiaristError, match="group 32 is of rounded values, and none are asked for"):
        packed.pack_folder(model_folder, tmp_path / "x", group=32)
    out = tmp_path / "packed"
    packed.pack_folder(model_folder, out)
    with pytest.raises(CheckpointError, match="exists"):
        packed.pack_folder(model_folder, out)
    with pytest.raises(CheckpointError, match="exists"):
        packed.unpack_folder(out, model_folder)
    with pytest.raises(CheckpointError, match="packed already"):
        packed.pack_folder(out, tmp_path / "twice")
    with pytest.raises(CheckpointError, match="not a packed model"):
        packed.unpack_folder(model_folder, tmp_path / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        packed.pack_folder(tmp_path / "empty", tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model", "packed"], "nothing is left behind"


@pytest.mark.parametrize("version", [0, 3, "1"])
def test_another_version_is_refused(model_folder, tmp_path, version):
    out = tmp_path / "packed"
    packed.pack_folder(model_folder, out)
    manifest = json.loads((out / packed.MANIFEST).read_text())
    (out / packed.MANIFEST).write_text(json.dumps(manifest | {"version": version}))
    with pytest.raises(CheckpointError, match="version"):
        dict(packed.read_packed(out))


def test_another_version_of_one_shard_is_refused(model_folder, tmp_path):
    out = tmp_path / "packed"
    packed.pack_folder(model_folder, out)
    shard = next(out.glob("packed-*.safetensors"))
    with safe_open(shard, "pt") as handle:
        metadata = handle.metadata()
    header = json.loads(metadata["topiarist_packed"]) | {"version": 9}
    save_file(load_file(shard), shard, metadata={"topiarist_packed": json.dumps(header)})
    with pytest.raises(CheckpointError, match="version 9"):
        dict(packed.read_packed(out))


def test_version_1_is_read(tmp_path):
    """A folder that topiarist 0.1 wrote."""
    folder = Path(__file__).parent / "data/packed_version_1"
    packed.unpack_folder(folder, tmp_path / "back")
    before, after = load_file(folder / "expected.safetensors"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    forms = json.loads((folder / packed.MANIFEST).read_text())
    assert forms["version"] == 1


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 0.999])
def test_truncated(model_folder, tmp_path, fraction):
    out = tmp_path / "packed"
    packed.pack_folder(model_folder, out)
    shard = next(out.glob("packed-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[: int(fraction * shard.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"damaged|truncated"):
        packed.unpack_folder(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_missing_shard(model_folder, tmp_path):
    out = tmp_path / "packed"
    packed.pack_folder(model_folder, out, shard_bytes=1)
    next(out.glob("packed-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="lacks"):
        dict(packed.read_packed(out))


def test_any_flipped_bit_is_refused_or_harmless(model_folder, tmp_path):
    """Header, index and values alike. Harmless: a bit in the header's `pattern`, which is for people."""
    out = tmp_path / "packed"
    packed.pack_folder(model_folder, out)
    expected = dict(packed.read_packed(out))
    shard = next(out.glob("packed-*.safetensors"))
    good, refused, draw = shard.read_bytes(), 0, random.Random(0)
    header = int.from_bytes(good[:8], "little") + 8
    for place in [draw.randrange(header) for _ in range(150)] + [draw.randrange(header, len(good)) for _ in range(50)]:
        bad = bytearray(good)
        bad[place] ^= 1 << draw.randrange(8)
        shard.write_bytes(bad)
        try:
            read = dict(packed.read_packed(out))
        except CheckpointError:
            refused += 1
        else:
            assert place < header and read.keys() == expected.keys()
            assert all(same_bits(read[name], expected[name]) for name in read)
    assert refused > 150


def test_from_packed_is_the_same_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(NM(2, 4).mask(weight.abs()))
    model.save_pretrained(tmp_path / "model")
    packed.pack_folder(tmp_path / "model", tmp_path / "packed")
    loaded = loading.from_packed(tmp_path / "packed")
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded(tokens).logits, expected(tokens).logits)
