"""The file that names a worker's models: what it says is what is served, and what has no meaning is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentline.errors import ConfigurationError
from latentline_worker.models import authors, catalog
from latentline_worker.models.catalog import Defaults, ModelEntry

FULL = """
[[models]]
source = "owner/name"
id = "portraits"
revision = "v2"
dtype = "bfloat16"
lora_dir = "./loras"
[models.defaults]
scheduler = "euler"
num_inference_steps = 25
guidance_scale = 6
width = 512
height = 768

[[models]]
source = "./files/one.safetensors"
config = "somebody/configs"
"""


def refusal(text: str, tmp_path: Path) -> str:
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        catalog.read(path)
    return refused.value.message.removeprefix(f"{path}: ")


def test_a_file_says_where_models_are_and_how_they_are_served(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(FULL)
    first, second = catalog.read(path).models
    assert first == ModelEntry(
        source="owner/name",
        id="portraits",
        revision="v2",
        dtype="bfloat16",
        lora_dir=tmp_path / "loras",
        defaults=Defaults(scheduler="euler", num_inference_steps=25, guidance_scale=6.0, width=512, height=768),
    )
    assert (first.name, first.location) == ("portraits", "owner/name@v2")
    assert (second.name, second.source, second.config) == ("one", f"{tmp_path}/files/one.safetensors", "somebody/configs")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("latentline-emoji", "latentline-emoji"),
        ("owner/name@0123abc", "owner/name"),
        ("/models/mine/", "mine"),
        ("/models/mine-v1.5", "mine-v1.5"),
        ("one.v2.safetensors", "one.v2"),
    ],
)
def test_a_model_without_an_id_is_served_under_the_name_of_its_source(source: str, name: str) -> None:
    assert ModelEntry(source=source).name == name


ONE = '[[models]]\nsource = "a/b"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE + "steps = 4", "models.0.steps: got 4; allowed: only the known keys: source, id, config, revision, dtype, lora_dir, defaults"),
        (
            ONE + "[models.defaults]\nsteps = 4",
            "models.0.defaults.steps: got 4; allowed: only the known keys: scheduler, num_inference_steps, guidance_scale, width, height",
        ),
        (ONE + "[workers]", "workers: got {}; allowed: only the known keys: models, weights_mb, cold_wait_s"),
        ("weights_mb = 0\n" + ONE, "weights_mb: got 0; allowed: more than 0.0"),
        ("cold_wait_s = 0.01\n" + ONE, "cold_wait_s: got 0.01; allowed: at least 0.1"),
        (ONE + 'dtype = "int8"', "models.0.dtype: got 'int8'; allowed: one of 'auto', 'float32', 'float16' or 'bfloat16'"),
        (ONE + "[models.defaults]\nwidth = 100", "models.0.defaults.width: got 100; allowed: a multiple of 8"),
        (ONE + "[models.defaults]\nnum_inference_steps = 0", "models.0.defaults.num_inference_steps: got 0; allowed: at least 1"),
        (ONE + 'id = "a@b"', "models.0.id: got 'a@b'; allowed: text that matches ^[A-Za-z0-9][A-Za-z0-9._/-]*$"),
        (ONE + ONE, "models.1.id: got 'a/b'; allowed: one that no other model of the file has"),
        ('[[models]]\nid = "x"', "models.0.source: got nothing; allowed: a value (the field is required)"),
        ("models = []", "models: got []; allowed: at least one model"),
        ("", "models: got nothing; allowed: a value (the field is required)"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    assert refusal(text, tmp_path) == message


def test_two_revisions_are_refused(tmp_path: Path) -> None:
    message = refusal('[[models]]\nsource = "a/b@1"\nrevision = "2"', tmp_path)
    assert message.startswith("models.0: got ") and message.endswith("; allowed: one revision: 'a/b@1' names one already")


def test_a_file_that_is_no_toml_or_is_not_there(tmp_path: Path) -> None:
    assert refusal("[[models", tmp_path).startswith("not TOML: ")
    with pytest.raises(ConfigurationError, match=r"^models: got .*nothing\.toml'; allowed: a TOML file that can be read"):
        catalog.read(tmp_path / "nothing.toml")


def test_an_entry_is_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    odd = ModelEntry(source='/models/a "b" \\ \u00e4 \U0001f600\t', id="odd", defaults=Defaults(guidance_scale=0.0, width=64))
    for entry in (ModelEntry(source="a/b"), odd, ModelEntry(source="c/d", lora_dir=Path("/loras"))):
        catalog.append(path, entry)
    assert [entry.name for entry in catalog.read(path).models] == ["a/b", "odd", "c/d"]
    assert catalog.read(path).models[1] == odd and catalog.read(path).models[2].lora_dir == Path("/loras")


def test_an_entry_that_the_file_cannot_take_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(f"# a comment\n{ONE}")
    with pytest.raises(ConfigurationError, match="allowed: one that no other model of the file has"):
        catalog.append(path, ModelEntry(source="a/b"))
    assert path.read_text() == f"# a comment\n{ONE}" and list(tmp_path.iterdir()) == [path]
    catalog.append(path, ModelEntry(source="a/b", id="again"))
    assert path.read_text().startswith(f"# a comment\n{ONE}")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("stabilityai/sdxl-turbo", ("euler_ancestral", 1, 0.0)),
        ("stabilityai/sd-turbo@main", ("euler", 1, 0.0)),
        ("ByteDance/SDXL-Lightning", ("euler", 4, 0.0)),
        ("/models/sdxl_lightning_8step.safetensors", ("euler", 8, 0.0)),
        ("/models/sd_xl_turbo_1.0_fp16.safetensors", ("euler_ancestral", 1, 0.0)),
        ("Tongyi-MAI/Z-Image-Turbo", ("euler", 8, 0.0)),
        ("stabilityai/stable-diffusion-xl-base-1.0", None),
        ("/models/sd_xl_base_1.0.safetensors", None),
    ],
)
def test_authors_defaults_of_few_step_models(source: str, expected: tuple[str, int, float] | None) -> None:
    found = authors.advice(source)
    assert (found and (found.scheduler, found.num_inference_steps, found.guidance_scale)) == expected
    flow = source.startswith("Tongyi-MAI/")  # its timesteps are its noise levels: there is no spacing to choose
    assert found is None or found.scheduler_config == ({} if flow else {"timestep_spacing": "trailing"})
