"""Jobs with LoRA adapters of their own in one batch: the latents that diffusers and peft give for each alone."""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from support.adapters import Updates, updates_of
from support.engines import FIXED_ROWS, RELATIVE, drain, make_engine, run, snapshot, solo, work
from support.tiny import tiny_pipeline
from support.tiny_families import TINY, unpacked

from latentline.errors import InvalidRequest, ModelError
from latentline.jobs import StoredLora
from latentline_worker.engine.checkpoint import Checkpoint
from latentline_worker.models import registry
from latentline_worker.models.base import Family
from latentline_worker.models.lora import Folder, read
from latentline_worker.models.lora import adapters as adapters_module
from latentline_worker.models.parts import lora_target

CPU = torch.device("cpu")
SIZE = 64
DENOISER = {
    "sd": "unet", "sdxl": "unet", "sd3": "transformer", "flux-dev": "transformer", "z-image": "transformer", "qwen-image": "transformer",
}  # fmt: skip
NO_TEXT = ("z-image", "qwen-image")  # diffusers loads adapters of the transformer alone


def to_kohya(updates: Updates, alpha: float) -> Updates:
    """The same in kohya's format, where the product is scaled by alpha / rank."""
    return {
        key: tensor
        for key, tensor in convert_state_dict_to_kohya(dict(updates)).items()
        if not key.endswith(".alpha")
    } | {
        key.replace(".lora_down.weight", ".alpha"): torch.tensor(alpha)
        for key in convert_state_dict_to_kohya(dict(updates))
        if key.endswith(".lora_down.weight")
    }  # fmt: skip


def make_adapters(pipeline: Any, kind: str, folder: Path) -> None:
    """Three adapters: on attention; on feed-forward and convolutions, of another rank; on a text encoder as well."""
    denoiser = DENOISER[kind]
    wide = {
        "sd": "ff.net.0.proj|conv1|proj_in", "sdxl": "ff.net.2|conv2|conv_shortcut", "flux-dev": "ff.net.2|proj_mlp",
        "z-image": "feed_forward.w2|cap_embedder.1|all_x_embedder.2-1|t_embedder.mlp.0|adaLN_modulation.[01]",
        "qwen-image": "img_mlp.net.2|txt_mlp.net.0.proj|img_in|img_mod.1|norm_out.linear",
    }  # fmt: skip
    files = {
        "attention": updates_of(pipeline, denoiser, "to_q|to_k|to_v|to_out.0", 4, 1),
        "wide": updates_of(pipeline, denoiser, wide.get(kind, "ff.net.0.proj"), 8, 2),
        "text": updates_of(pipeline, denoiser, "to_q", 3, 4),
    }
    if kind not in NO_TEXT:
        files["text"] |= updates_of(pipeline, "text_encoder", "q_proj|fc1", 3, 3)
    for name, updates in files.items():
        save_file(updates, folder / f"{name}.safetensors")


@dataclasses.dataclass
class Loaded:
    pipeline: Any
    family: Family
    folder: Path

    def alone(self, loras: dict[str, float], **options: Any) -> torch.Tensor:
        """What the plain pipeline gives, with the adapters as peft applies them."""
        for name in loras:
            self.pipeline.load_lora_weights(self.folder / f"{name}.safetensors", adapter_name=name)
        try:
            if loras:
                self.pipeline.set_adapters(list(loras), adapter_weights=list(loras.values()))
            images = self.pipeline(width=SIZE, height=SIZE, output_type="latent", **options).images
        finally:
            self.pipeline.unload_lora_weights()
        return unpacked(self.pipeline, images, SIZE, SIZE)


@pytest.fixture(scope="module", params=DENOISER)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return make("sd", tmp_path_factory.mktemp("sd"))


def make(kind: str, folder: Path) -> Loaded:
    build: Callable[[], Any] = tiny_pipeline if kind == "sd" else TINY[kind]
    pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    adapters = folder / "adapters"
    adapters.mkdir()
    make_adapters(pipeline, kind, adapters)
    family = registry.load(str(folder / "model"), CPU, torch.float32)
    registry.add_adapters(family, [Folder(adapters)], slots=4, rank=16)
    family.info = family.info.model_copy(update={"default_width": SIZE, "default_height": SIZE})
    return Loaded(pipeline, family, adapters)


def job(family: Family, number: int, loras: dict[str, float], steps: int = 4, **options: Any) -> Any:
    stored = tuple(StoredLora(name=name, scale=scale) for name, scale in loras.items())
    return work(
        family, f"thing {'abcdefgh'[number]}", family.info.default_scheduler, steps + number % 3, 4.0, (number,), (SIZE, SIZE),
        negative_prompt="", loras=stored, **options,
    )  # fmt: skip


SETS: list[dict[str, float]] = [
    {},
    {"attention": 1.0},
    {"wide": 0.7},
    {"text": 1.3},
    {"attention": 0.5, "wide": -0.4},
    {"attention": 1.0, "text": 0.6},
    {"wide": 0.7},
    {},
]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # the reference loads several
def test_eight_jobs_with_adapters_of_their_own_equal_diffusers(loaded: Loaded) -> None:
    family = loaded.family
    engine = make_engine(family)
    works = [job(family, number, loras) for number, loras in enumerate(SETS)]
    requests = []
    for one in works:  # more sets than slots: the last wait until one is free
        requests.append(engine.submit(one))
        engine.step()
    drain(engine)
    assert engine.num_shared_steps > 4
    plain = loaded.alone({}, **asked(loaded, 1, {}))
    for number, (request, loras) in enumerate(zip(requests, SETS, strict=True)):
        expected = loaded.alone(loras, **asked(loaded, number, loras))
        error = (request.result(0) - expected).abs().max() / expected.abs().max()
        assert error <= RELATIVE, f"{loras}: {error:.1e}"
        if number == 1:
            assert (expected - plain).abs().max() > 0.01 * plain.abs().max(), "the adapter changes nothing: the test shows nothing"


def asked(loaded: Loaded, number: int, loras: dict[str, float]) -> dict[str, Any]:
    """The same job for a plain pipeline."""
    request = job(loaded.family, number, loras).request
    options: dict[str, Any] = {"guidance_scale": request.guidance_scale}
    if loaded.family.info.family == "qwen-image":
        options = {"true_cfg_scale": request.guidance_scale, "negative_prompt": ""}
    if loaded.family.info.family == "sd":
        from latentline_worker.samplers import make_scheduler

        loaded.pipeline.scheduler = make_scheduler(request.scheduler, loaded.family.scheduler_config)  # type: ignore[attr-defined]
    return {
        "prompt": request.prompt,
        "num_inference_steps": request.num_inference_steps,
        "generator": torch.Generator().manual_seed(request.seed),
        **options,
    }


def test_in_any_company_and_resumed_it_is_equal_to_the_bit(loaded: Loaded) -> None:
    family = loaded.family
    subjects = [job(family, 1, {"attention": 1.0, "text": 0.5}, steps=6), job(family, 2, {}, steps=6)]
    expected = [solo(family, subject, fixed_rows=FIXED_ROWS) for subject in subjects]
    engine = make_engine(family, fixed_rows=FIXED_ROWS)
    engine.submit(job(family, 3, {"wide": 1.0}))
    requests = [engine.submit(subject) for subject in subjects]
    while requests[0].step < 3:
        engine.step()
    data = snapshot(engine, requests[0]).to_bytes(subjects[0])
    drain(engine)
    for request, picture in zip(requests, expected, strict=True):
        assert request.shared_steps > 0 and torch.equal(request.result(0), picture)
    resumed = dataclasses.replace(subjects[0], resume=Checkpoint.from_bytes(data, subjects[0]))
    assert resumed.resume is not None and torch.equal(solo(family, resumed, fixed_rows=FIXED_ROWS), expected[0])
    other = job(family, 1, {"attention": 0.9, "text": 0.5}, steps=6)
    assert Checkpoint.from_bytes(data, other) is None, "another scale is another picture"


def test_the_recorded_forward_sees_adapters_that_come_later(sd: Loaded) -> None:
    family, bank = sd.family, sd.family.adapters.bank  # type: ignore[union-attr]
    engine = make_engine(family, max_rows=4)
    engine.warm_up()
    for number, loras in ((1, {"attention": 1.0}), (2, {"wide": 0.7}), (3, {})):
        expected = sd.alone(loras, **asked(sd, number, loras))
        got = run(engine, job(family, number, loras))[0].result(0)
        assert (got - expected).abs().max() <= RELATIVE * expected.abs().max()
    assert bank.index is None


def test_kohyas_format_with_an_alpha_of_each_layer(sd: Loaded, tmp_path: Path) -> None:
    updates = updates_of(sd.pipeline, "unet", "to_q|to_v", 4, 1)
    flat = to_kohya({key.replace("unet.", "", 1): tensor for key, tensor in updates.items()}, alpha=2.0)
    renamed = {f"lora_unet_{key.split('.', 1)[0]}.{key.split('.', 1)[1]}": tensor for key, tensor in flat.items()}
    alphas = sorted(key for key in renamed if key.endswith(".alpha"))
    for number, key in enumerate(alphas):
        renamed[key] = torch.tensor(float(1 + number))
    save_file(renamed, tmp_path / "kohya.safetensors")
    assert sd.family.lora_target().pipeline is not None
    adapter = read(tmp_path / "kohya.safetensors", "kohya", sd.family.lora_target())
    layers = adapter.layers["unet"]
    assert len(layers) == len(updates) // 2
    for name, (down, up) in layers.items():
        alpha = float(renamed[f"lora_unet_{name.replace('.', '_')}.alpha"])
        whole = updates[f"unet.{name}.lora_B.weight"] @ updates[f"unet.{name}.lora_A.weight"]
        assert torch.allclose(up @ down, whole * alpha / 4, atol=1e-6), name


@pytest.mark.parametrize("kind", NO_TEXT)
def test_kohyas_format_of_a_transformer(kind: str, tmp_path: Path) -> None:
    pipeline = TINY[kind]()
    updates = updates_of(pipeline, "transformer", "to_q|to_out.0|add_k_proj|img_mlp.net.2|feed_forward.w1", 4, 1)
    ends = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
    renamed = {}
    for key, tensor in updates.items():
        layer, end = key.removeprefix("transformer.")[: -len(".lora_A.weight")].replace(".", "_"), key[-len(".lora_A.weight") :]
        renamed |= {f"lora_unet_{layer}{ends[end]}": tensor, f"lora_unet_{layer}.alpha": torch.tensor(2.0)}
    save_file(renamed, tmp_path / "kohya.safetensors")
    layers = read(tmp_path / "kohya.safetensors", "kohya", lora_target(pipeline, ("transformer",))).layers["transformer"]
    assert len(layers) == len(updates) // 2
    for name, (down, up) in layers.items():
        whole = updates[f"transformer.{name}.lora_B.weight"] @ updates[f"transformer.{name}.lora_A.weight"]
        assert torch.allclose(up @ down, whole / 2, atol=1e-6), name


@pytest.mark.parametrize("kind", NO_TEXT)
def test_an_adapter_of_a_text_encoder_that_diffusers_would_not_load_is_refused(kind: str, tmp_path: Path) -> None:
    pipeline = TINY[kind]()
    save_file(updates_of(pipeline, "text_encoder", "q_proj", 2, 1), tmp_path / "text.safetensors")
    with pytest.raises(ModelError, match=r"adapter text: text_encoder\..*q_proj.*; allowed: updates of the transformer"):
        read(tmp_path / "text.safetensors", "text", lora_target(pipeline, ("transformer",)))


def test_an_adapter_of_our_own_training_is_read_with_its_alpha(sd: Loaded, tmp_path: Path) -> None:
    """The format of diffusers with peft's configuration beside it, as ``latentline train lora`` writes it."""
    from peft import LoraConfig

    pipeline = tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], alpha_pattern={"mid_block.*to_q": 2}))
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(5))
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    pipeline.save_lora_weights(tmp_path, layers, **_collate_lora_metadata({"unet": pipeline.unet}))
    (path,) = tmp_path.glob("*.safetensors")
    adapter = read(path, "own", sd.family.lora_target())
    for name, (down, up) in adapter.layers["unet"].items():
        layer = pipeline.unet.get_submodule(name)
        assert torch.allclose(up @ down, layer.get_delta_weight("default"), atol=1e-6), name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda u: {**u, "unet.mid_block.attentions.0.proj_in.dora_scale": torch.ones(1)}, "DoRA; allowed: LoRA"),
        (lambda u: {"lora_unet_x.lokr_w1": torch.ones(2, 2)}, "LoKr; allowed: LoRA"),
        (lambda u: {key: tensor[..., :3] if "lora_A" in key else tensor for key, tensor in u.items()}, "belongs to another model"),
        (lambda u: {key.replace("attn1", "attn9"): tensor for key, tensor in u.items()}, "this model has no such layer"),
        (lambda u: {key: tensor for key, tensor in u.items() if "lora_B" not in key}, "not those of a LoRA"),
        (lambda u: {"something": torch.ones(1)}, "is no LoRA update|not those of a LoRA"),
        (lambda u: {key: torch.cat([tensor] * 9, 1 if "lora_B" in key else 0) for key, tensor in u.items()}, "its rank is 18; allowed: 16"),
    ],
)
def test_files_that_are_no_adapters_of_the_model_are_refused_at_start(
    sd: Loaded, tmp_path: Path, change: Callable[[Updates], Updates], sentence: str
) -> None:
    updates = updates_of(sd.pipeline, "unet", "attn1.to_q", 2, 1)
    save_file({key: tensor.contiguous() for key, tensor in change(updates).items()}, tmp_path / "bad.safetensors")
    save_file(updates, tmp_path / "good.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-8])
    registry.add_adapters(fresh := fresh_family(sd), [Folder(tmp_path)], 2, 16)
    assert fresh.info.loras == ("good",)
    assert fresh.adapters is not None and re.search(sentence, fresh.adapters.refused["bad"]), fresh.adapters.refused
    assert "cannot be read as safetensors" in fresh.adapters.refused["cut"]


def test_adapters_that_come_change_and_go_are_noticed(sd: Loaded, tmp_path: Path) -> None:
    updates = updates_of(sd.pipeline, "unet", "attn1.to_q", 2, 1)
    whole = tmp_path / "whole"
    save_file(updates, whole)
    registry.add_adapters(family := fresh_family(sd), [Folder(tmp_path)], 2, 16)
    adapters = family.adapters
    assert adapters is not None and adapters.names == () and not adapters.rescan()

    def put(name: str, data: bytes) -> None:
        (tmp_path / f"{name}.safetensors").write_bytes(data)

    put("new", whole.read_bytes()[:-8])  # still being copied
    assert not adapters.rescan() and "cannot be read" in adapters.refused["new"]
    put("new", whole.read_bytes())
    assert adapters.rescan() and adapters.names == ("new",) and adapters.refused == {}
    family.info = family.info.model_copy(update={"loras": adapters.names})
    save_file(updates, tmp_path / "alone.safetensors")
    registry.add_adapters(other := fresh_family(sd), [Folder(tmp_path)], 2, 16)
    came, there = (solo(one, job(one, 1, {"new": 0.9}, steps=3)) for one in (family, other))
    assert came.equal(there), "one that came later gives the same picture as one that was there at the start"

    assert adapters.rescan() and adapters.names == ("alone", "new")
    reads = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters_module, "read", lambda path, *_, **__: reads.append(path))
        assert not adapters.rescan() and reads == [], "what has not changed is not read again"
    put("new", b"something else")
    assert adapters.rescan() and adapters.names == ("alone",) and "new" in adapters.refused
    (tmp_path / "alone.safetensors").unlink()
    assert adapters.rescan() and adapters.names == ()
    with pytest.raises(InvalidRequest, match=r"'alone'; allowed: one of: none"):
        adapters.find([StoredLora(name="alone")])


def fresh_family(loaded: Loaded) -> Family:
    return registry.load(str(loaded.folder.parent / "model"), CPU, torch.float32)


def test_what_a_request_may_not_name(sd: Loaded) -> None:
    with pytest.raises(InvalidRequest, match=r"loras\.0\.name.*'absent'.*one of: attention, text, wide"):
        job(sd.family, 1, {"absent": 1.0})
    with pytest.raises(InvalidRequest, match=r"loras\.0\.name.*'attention'; allowed: one of: none"):
        job(fresh_family(sd), 1, {"attention": 1.0})
    assert sd.family.adapters is not None
    with pytest.raises(InvalidRequest, match=r"ranks of 16 together; theirs make 22"):
        sd.family.adapters.find([StoredLora(name=name) for name in ("wide", "text", "attention", "attention", "text")])


def test_jobs_wait_for_a_slot_and_all_are_served(sd: Loaded) -> None:
    family = fresh_family(sd)
    registry.add_adapters(family, [Folder(sd.folder)], slots=1, rank=16)
    engine = make_engine(family)
    requests = run(engine, *[job(family, number, {"attention": 0.1 * (number + 1)}) for number in range(4)], job(family, 4, {}))
    assert all(torch.isfinite(request.result(0)).all() for request in requests)
    cancelled = engine.submit(job(family, 1, {"wide": 1.0}, steps=9))
    engine.step()
    cancelled.cancel()
    drain(engine)
    assert family.adapters is not None and not any(family.adapters._users.values()), "a slot stays taken"


def test_a_thousand_adapters_leave_nothing_behind(sd: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = fresh_family(sd)
    updates = updates_of(sd.pipeline, "unet", "mid_block.*to_q", 2, 1)
    save_file(updates, tmp_path / "one.safetensors")
    registry.add_adapters(family, [Folder(tmp_path)], slots=3, rank=4)
    adapters = family.adapters
    assert adapters is not None
    num_bytes = read(tmp_path / "one.safetensors", "one", family.lora_target()).num_bytes
    monkeypatch.setattr("latentline_worker.models.lora.adapters.CACHE_BYTES", 3 * num_bytes)
    before = None
    for number in range(1000):
        save_file(updates | {}, tmp_path / "one.safetensors", {"number": "x" * number})  # another size: another file
        slot = adapters.acquire(adapters.find([StoredLora(name="one", scale=1 + number / 1000)]))
        assert slot is not None
        adapters.release(slot)
        if number in (20, 999):
            gc.collect()
            alive = sum(type(one) is torch.Tensor for one in gc.get_objects())
            before = before or alive
    assert alive <= before + 5
    assert len(adapters._held) <= 3 and len(adapters._cache) <= 4


@pytest.fixture(autouse=True)
def _no_index_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "sd" in request.fixturenames:
        assert request.getfixturevalue("sd").family.adapters.bank.index is None
