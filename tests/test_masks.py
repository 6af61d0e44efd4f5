"""Masks as files: round trips, refusals, and zeros that stay."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from topiarist import masks
from topiarist.core.errors import CheckpointError, PatternError
from topiarist.core.patterns import NM, Unstructured
from topiarist.masks.bitpack import encoding_for, pack, packed_size, unpack
from topiarist.results.pages import Result

PATTERNS = [NM(2, 4), NM(1, 4), NM(1, 2), NM(2, 8), NM(4, 8), NM(3, 7), NM(8, 16), NM(16, 32), Unstructured(0.6)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PATTERNS), st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**31))
def test_round_trip_of_every_pattern(pattern, rows, groups, seed):
    width = groups * getattr(pattern, "of", 5)
    mask = pattern.mask(torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)))
    packed, encoding = pack(mask, pattern)
    assert packed.dtype == torch.uint8 and len(packed) == packed_size((rows, width), pattern, encoding)
    assert torch.equal(unpack(packed, (rows, width), pattern, encoding), mask)


@pytest.mark.parametrize("pattern, encoding, bits", [
    (NM(2, 4), "index8", 2 / 3), (NM(1, 4), "index8", 0.5), (NM(4, 8), "index64", 0.8), (NM(2, 8), "index64", 64 / 104),
    (NM(8, 16), "bitmap", 1.0), (Unstructured(0.5), "bitmap", 1.0),
])  # fmt: skip
def test_bits_per_weight(pattern, encoding, bits):
    assert encoding_for(pattern) == encoding
    shape = (32, 104 * 480)
    assert packed_size(shape, pattern, encoding) * 8 / (shape[0] * shape[1]) == pytest.approx(bits, rel=0.01)


def test_bytes_are_pinned():
    """Files must be readable by later versions: base 6, first group lowest; bitmap with the lowest bit first."""
    rows = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0, 1]], dtype=torch.bool)
    assert pack(rows, NM(2, 4))[0].tolist() == [0 + 5 * 6 + 1 * 36, 4]
    assert pack(rows, Unstructured(0.5))[0].tolist() == [0b11000011, 0b10100101]


def test_impossible_bytes_are_refused():
    with pytest.raises(CheckpointError, match="does not exist"):
        unpack(torch.tensor([216], dtype=torch.uint8), (1, 12), NM(2, 4), "index8")
    with pytest.raises(CheckpointError, match="do not hold"):
        unpack(torch.zeros(2, dtype=torch.uint8), (1, 12), NM(2, 4), "index8")
    with pytest.raises(PatternError, match="exactly 2 of 4"):
        pack(torch.ones(1, 4, dtype=torch.bool), NM(2, 4))


WEIGHTS = {"a.weight": (8, 16), "b.weight": (16, 8), "c.weight": (3, 4, 8)}


def base_weights(seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in WEIGHTS.items()}


def made_masks(weights, pattern="2:4"):
    """Masks of a, b (stored transposed) and the 3-D c."""
    generator = torch.Generator().manual_seed(9)
    nm = NM(2, 4)
    b = nm.mask(torch.rand(8, 16, generator=generator)).T.contiguous()
    c = nm.mask(torch.rand(12, 8, generator=generator)).view(3, 4, 8)
    return {"a.weight": nm.mask(torch.rand(8, 16, generator=generator)), "b.weight": b, "c.weight": c}


@pytest.fixture
def saved(tmp_path):
    weights = base_weights()
    made = made_masks(weights)
    path = tmp_path / "masks.safetensors"
    masks.save_masks(path, made, weights=weights, pattern="2:4", base_model="toy", transposed={"b.weight"})
    return path, made, weights


@pytest.fixture
def folder(tmp_path):
    """A base checkpoint with one tensor that has no mask."""
    base = tmp_path / "base"
    base.mkdir()
    save_file({**base_weights(), "norm.weight": torch.ones(8)}, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (base / "tokenizer.json").write_text("{}")
    return base


def test_a_file_gives_back_its_masks(saved):
    path, made, _ = saved
    file = masks.MaskFile(path)
    assert list(file) == sorted(made) and file.base_model == "toy"
    for name, mask in made.items():
        assert torch.equal(file[name], mask)
    assert file.metadata["order"] == "lexicographic" and file.metadata["tool"].startswith("topiarist ")
    assert file.entries["b.weight"].axis == -2 and file.entries["a.weight"].encoding == "index8"


def test_the_same_masks_are_the_same_bytes(saved, tmp_path):
    path, made, weights = saved
    again = tmp_path / "again.safetensors"
    masks.save_masks(again, made, weights=weights, pattern="2:4", base_model="toy", transposed={"b.weight"})
    assert again.read_bytes() == path.read_bytes()


def test_apply_writes_plain_zeros_and_all_else_unchanged(saved, folder, tmp_path):
    path, made, weights = saved
    out = masks.apply(folder, path, tmp_path / "out")
    written = {}
    for shard in out.glob("*.safetensors"):
        written.update(load_file(shard))
    for name, mask in made.items():
        assert torch.equal(written[name], weights[name] * mask)
        assert not written[name].view(torch.int16)[~mask].any()  # +0.0, not -0.0
    assert torch.equal(written["norm.weight"], torch.ones(8)) and (out / "tokenizer.json").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["pruning_config"]["pattern"] == "2:4" and "quantization_config" not in config
    assert masks.apply(folder, path, tmp_path / "out") == out  # finished: nothing to do


def test_the_page_of_applied_masks_says_what_they_are(saved, folder, tmp_path):
    path, made, _ = saved
    out = masks.apply(folder, path, tmp_path / "out")
    result = Result.from_folder(out)
    assert result.sparsity == 0.5 and [layer["name"] for layer in result.layers] == ["a", "b", "c"]
    page, card = (out / "pruning_report.html").read_text(), (out / "README.md").read_text()
    assert "50 % of the weights in 3 matrices are zero" in page and "50 % of the weights of 3 matrices are zero" in card
    weights = sum(mask.numel() for mask in made.values())
    assert result.size is not None and result.size["matrices_packed"] == weights + -(-128 // 12) * 2 + -(-96 // 12)


def test_apply_refuses_another_base_and_names_the_tensor(saved, folder, tmp_path):
    path, _, weights = saved
    other = {**weights, "b.weight": weights["b.weight"].clone(), "norm.weight": torch.ones(8)}
    other["b.weight"][3, 3] += 1
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"another base model \(toy\).*b\.weight"):
        masks.apply(folder, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_file({"a.weight": weights["a.weight"]}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no b\.weight"):
        masks.apply(folder, path, tmp_path / "out")


@pytest.mark.parametrize(
    "damage", ["cut in the header", "cut in the data", "empty", "a flipped bit", "not a mask file"]
)
def test_damaged_files_are_refused(saved, damage, tmp_path):
    path, *_ = saved
    raw = bytearray(path.read_bytes())
    if damage == "cut in the header":
        raw = raw[:100]
    elif damage == "cut in the data":
        raw = raw[:-2]
    elif damage == "empty":
        raw = bytearray()
    elif damage == "a flipped bit":
        raw[-1] ^= 1
    path.write_bytes(raw)
    if damage == "not a mask file":
        save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError):
        file = masks.MaskFile(path)
        dict(file.items())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_is_an_error_or_harmless(saved, tmp_path, data):
    """Never another exception, never another mask under the same name."""
    path, made, _ = saved
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(raw)
    try:
        read = dict(masks.MaskFile(changed).items())
    except CheckpointError:
        return
    for name in set(read) & set(made):
        assert read[name].shape != made[name].shape or torch.equal(read[name], made[name])


def rewrite(path, change):
    """The same file with other metadata: `change` edits it in place."""
    with safe_open(path, "pt") as reader:
        stated = json.loads(reader.metadata()["topiarist_masks"])
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"topiarist_masks": change(stated, tensors) or json.dumps(stated)})


def entry(name="a.weight", **changes):
    """Change an entry as someone would who knows of no checksum."""

    def change(stated, _):
        stated.pop("digest")
        stated["masks"][name].update(changes)

    return change


@pytest.mark.parametrize(("change", "says"), [
    (entry(shape=[1 << 40, 1 << 10]), "do not hold a 2:4 mask"), (entry(shape=[8, -16]), "damaged metadata"),
    (entry(shape=[]), "damaged metadata"), (entry(shape=["8", 16]), "damaged metadata"), (entry(shape=8), "damaged metadata"),
    (entry(shape=[16], axis=-2), "no axis -2"), (entry(axis=0), "damaged metadata"), (entry(axis="-1"), "damaged metadata"),
    (entry(dtype="nonsense"), "no dtype nonsense"), (entry(encoding="zip"), "damaged metadata"),
    (entry(encoding="index64"), "do not hold"), (entry(pattern="3:7"), "no 3:7 mask"), (entry(pattern="nonsense"), "nonsense"),
    (entry(more=1), "damaged metadata"), (lambda stated, _: "[" * 100_000, "damaged metadata"), (lambda *_: "[1]", "damaged"),
    (lambda *_: '{"version": ' + "1" * 5000 + "}", "damaged metadata"),
    (lambda stated, _: stated["masks"]["b.weight"].update(axis=-1), "checksum differs"),
    (lambda stated, _: stated.update(base_model="other"), "checksum differs"),
])  # fmt: skip
def test_metadata_that_does_not_fit_is_one_line(saved, change, says):
    path, *_ = saved
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=says) as refused:
        masks.MaskFile(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_a_bitmap_that_breaks_its_pattern_is_refused(tmp_path):
    path, weight = tmp_path / "masks.safetensors", torch.ones(8, 20)
    mask = Unstructured(0.5).mask(torch.rand(8, 20))
    with pytest.raises(PatternError, match=r"w: the mask keeps more weights than 0\.5 allows"):
        masks.save_masks(path, {"w": mask | True}, weights={"w": weight}, pattern="0.5", base_model="toy")
    masks.save_masks(path, {"w": mask}, weights={"w": weight}, pattern="0.5", base_model="toy")

    def fill(stated, tensors):
        stated.pop("digest")
        tensors["w"].fill_(255)
        stated["masks"]["w"]["packed_sha256"] = masks.weight_digest(tensors["w"])

    rewrite(path, fill)
    with pytest.raises(CheckpointError, match=r"w: the mask keeps more weights than 0\.5 allows"):
        masks.MaskFile(path)["w"]


def test_files_without_a_checksum_are_still_read(saved):
    path, made, _ = saved
    rewrite(path, lambda stated, _: stated.pop("digest") and None)
    assert all(torch.equal(mask, made[name]) for name, mask in masks.MaskFile(path).items())


def test_an_npz_that_claims_too_much_is_refused_before_it_is_read(tmp_path):
    import io
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 43,)})
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "m.npz", "w", compression) as archive:
            archive.writestr("a.weight.mask.npy", header.getvalue())
        with pytest.raises(CheckpointError, match="holds 8796093022208 uint8"):
            masks.read_npz(tmp_path / "m.npz", {"a.weight": (8, 16)})


def test_missing_file_and_wrong_shapes(saved, tmp_path):
    path, made, weights = saved
    with pytest.raises(CheckpointError, match="does not exist"):
        masks.MaskFile(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="shape"):
        masks.MaskFile(path).check("a.weight", torch.zeros(4, 4))
    with pytest.raises(PatternError, match=r"a\.weight"):
        masks.save_masks(path, {"a.weight": ~made["b.weight"].T}, weights=weights, pattern="1:4", base_model="toy")
    with pytest.raises(CheckpointError, match="cannot write"):
        masks.save_masks(tmp_path / "no" / "x", made, weights=weights, pattern=Unstructured(0.5), base_model="toy")


def module(weights):
    model = nn.Module()
    for name, weight in weights.items():
        part = nn.Module()
        part.weight = nn.Parameter(weight.clone())
        model.add_module(name.removesuffix(".weight"), part)
    return model


def test_swap_there_and_back(saved, tmp_path):
    """One base, several masks; also when the model was loaded in a wider dtype."""
    path, made, weights = saved
    second = tmp_path / "second.safetensors"
    masks.save_masks(
        second, {"a.weight": ~made["a.weight"]}, weights=weights, pattern=Unstructured(0.5), base_model="toy"
    )
    for dtype in (torch.bfloat16, torch.float32):
        model = module({name: w.to(dtype) for name, w in weights.items()})
        for _ in range(2):
            masks.swap(model, path)
            for name, mask in made.items():
                assert torch.equal(model.get_parameter(name), (weights[name] * mask).to(dtype))
            masks.swap(model, second)
            assert torch.equal(model.get_parameter("a.weight"), (weights["a.weight"] * ~made["a.weight"]).to(dtype))
            assert torch.equal(model.get_parameter("b.weight"), weights["b.weight"].to(dtype))
    pruned = module({name: w * made[name] for name, w in weights.items()})
    with pytest.raises(CheckpointError, match="pass base="):
        masks.swap(pruned, second)
    for base in (weights, None):  # with a base, too, what the file before masked and this one does not is dense again
        masks.swap(pruned, path, base=base)
        masks.swap(pruned, second, base=base)
        assert torch.equal(pruned.get_parameter("a.weight"), weights["a.weight"] * ~made["a.weight"])
        assert all(torch.equal(pruned.get_parameter(name), weights[name]) for name in ("b.weight", "c.weight"))


def test_swap_changes_nothing_when_it_refuses(saved):
    path, _, weights = saved
    other = {**weights, "c.weight": weights["c.weight"] + 1}
    model = module(other)
    with pytest.raises(CheckpointError, match=r"c\.weight"):
        masks.swap(model, path)
    for name, weight in other.items():
        assert torch.equal(model.get_parameter(name), weight)
    parts = load_file(path)
    parts["c.weight"][0] ^= 1  # a damaged mask, the last of the file
    with safe_open(path, framework="pt") as stored:
        save_file(parts, path, stored.metadata())
    model = module(weights)
    with pytest.raises(CheckpointError, match=r"the mask of c\.weight is damaged"):
        masks.swap(model, path)
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())


def test_npz_round_trip_and_refusals(tmp_path):
    made = {name: m for name, m in made_masks(base_weights()).items() if m.ndim == 2}
    made["odd.weight"] = torch.rand(3, 7) > 0.5
    path = tmp_path / "mask.npz"
    masks.write_npz(path, made)
    with np.load(path) as raw:
        assert set(raw.files) == {f"{name}.mask" for name in made}
        assert np.array_equal(raw["a.weight.mask"], np.packbits(made["a.weight"].numpy()))
    shapes = {name: tuple(mask.shape) for name, mask in made.items()}
    read = masks.read_npz(path, shapes)
    assert all(torch.equal(read[name], mask) for name, mask in made.items())
    with pytest.raises(CheckpointError, match="no such parameter"):
        masks.read_npz(path, {"a.weight": (8, 16)})
    with pytest.raises(CheckpointError, match="needs"):
        masks.read_npz(path, {**shapes, "a.weight": (8, 32)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="not a readable"):
        masks.read_npz(path, shapes)
    with pytest.raises(CheckpointError):
        masks.read_npz(tmp_path / "nothing.npz", shapes)
    shutil.copy(__file__, path)
    with pytest.raises(CheckpointError):
        masks.read_npz(path, shapes)


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    lambda p: torch.optim.Adagrad(p, lr=0.1),
])  # fmt: skip
def test_hold_keeps_zeros_and_trains_the_rest(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    mask = NM(2, 4).mask(torch.rand(16, 16))
    with torch.no_grad():
        model[0].weight.mul_(mask)
    before = model[0].weight.detach().clone()
    with masks.hold(model) as held:
        assert held.sparsity == 0.5
        trainer = optimizer(model.parameters())
        for _ in range(4):
            for _ in range(2):  # gradient accumulation
                model(torch.randn(8, 16)).square().mean().backward()
            trainer.step()
            trainer.zero_grad()
        assert torch.equal(model[0].weight != 0, mask)
        assert not torch.equal(model[0].weight, before)
    model(torch.randn(8, 16)).square().mean().backward()
    trainer.step()
    assert (model[0].weight[~mask] != 0).any()  # released


def test_hold_survives_an_optimizer_that_wrote_to_the_zeros():
    model = nn.Linear(8, 8, bias=False)
    mask = NM(2, 4).mask(torch.rand(8, 8))
    trainer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 8)).square().mean().backward()
    trainer.step()  # the moments know the zeros-to-be
    with masks.hold(model, {"weight": mask}) as held:
        assert torch.equal(model.weight != 0, mask)
        model(torch.randn(4, 8)).square().mean().backward()
        trainer.step()
        assert torch.equal(model.weight != 0, mask)
        with torch.no_grad():
            model.weight.add_(1.0)
        held.apply()
        assert torch.equal(model.weight != 0, mask)


def test_hold_refuses_a_dense_model_and_foreign_masks():
    model = nn.Linear(8, 8)
    with pytest.raises(PatternError, match="nothing to hold"):
        masks.hold(model)
    with pytest.raises(PatternError, match="no such parameter"):
        masks.hold(model, {"other": torch.ones(8, 8, dtype=torch.bool)})


class Adapted(nn.Module):
    """A linear with a low-rank adapter beside it, named as peft names them."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize("recorded", [True, False], ids=["pruning_config", "pruned in memory"])
def test_hold_trains_adapters_alike_wrapped_before_or_after(recorded: bool):
    def trained(first: str) -> tuple[list[float], nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"proj": nn.Linear(8, 8)})
        mask = NM(2, 4).mask(torch.rand(8, 8))
        with torch.no_grad():
            model["proj"].weight.mul_(mask)
        if recorded:
            model.config = SimpleNamespace(pruning_config={"pattern": "2:4", "modules": {"proj": 0.5}})
        if first == "hold":
            masks.hold(model)
        model["proj"] = Adapted(model["proj"])
        if first == "wrap":
            assert masks.hold(model).sparsity == 0.5
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        x, losses = torch.randn(16, 8), []
        for _ in range(8):
            loss = (model["proj"](x) - 1.0).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, model, mask

    before, model, mask = trained("hold")
    after, _, _ = trained("wrap")
    assert before == after and after[-1] < 0.8 * after[0]
    assert torch.equal(model["proj"].base_layer.weight != 0, mask)


def test_hold_takes_what_the_checkpoint_records_and_nothing_else():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "experts": nn.Module()})
    model["experts"].up = nn.Parameter(torch.rand(2, 8, 8))
    with torch.no_grad():
        for weight in (model["a"].weight, model["b"].weight, model["experts"].up):
            weight[..., ::2] = 0.0
    model.config = SimpleNamespace(pruning_config={"modules": {"a": 0.5, "experts.up.0": 0.5, "experts.up.1": 0.5}})
    held = masks.hold(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    held.apply()
    assert not model["a"].weight[:, ::2].any() and not model["experts"].up[..., ::2].any()
    assert bool(model["b"].weight[:, ::2].all())


def test_what_is_no_bool_mask_is_refused_by_name(tmp_path):
    ones, about = torch.ones(4, 4), {"pattern": "2:4", "base_model": "b"}
    with pytest.raises(PatternError, match="float32, and True means kept"):
        masks.write_npz(tmp_path / "m.npz", {"a": ones})
    with pytest.raises(PatternError, match="float32, and True means kept"):
        masks.save_masks(tmp_path / "m", {"a": ones}, weights={"a": ones}, **about)
    with pytest.raises(PatternError, match="a has a mask and no weight"):
        masks.save_masks(tmp_path / "m", {"a": ones.bool()}, weights={}, **about)
    with pytest.raises(CheckpointError, match="cannot write"):
        masks.write_npz(tmp_path / "no" / "m.npz", {"a": ones.bool()})
    assert not any(tmp_path.iterdir())


def test_a_base_that_names_weights_otherwise_is_told(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    mask = NM(2, 4).mask(model[0].weight.detach().abs())
    masks.save_masks(
        tmp_path / "m.safetensors", {"0.weight": mask}, weights=dict(model.state_dict()), pattern="2:4", base_model="b"
    )
    with pytest.raises(CheckpointError, match="give the state dict of the loaded base"):
        masks.swap(model, tmp_path / "m.safetensors", base={})
