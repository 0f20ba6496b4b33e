"""The run files in configs/: each is planned without network on the hardware of its name, has the settings of its
tutorial, and trains a tiny model."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import constants

from job.chat import chat_format, encode
from job.config.learning import Model
from job.config.running import Storage
from job.families import adapted
from job.fit import fits
from job.formats import format_of, segments_of
from job.matching import shares
from job.model import build
from job.outlook import look_ahead, planned_for
from job.plan import FP16_OVERFLOWS
from job.pretrained import read_config
from job.published import published
from job.sharding import own_shares
from job.train import train
from job.world import World
from tests.conftest import losses, write_rows
from tests.native_models import tiny
from tests.originals import ids_of, original
from tests.presets import PRESETS, Preset, module, publish, published_config
from tests.test_readme import READMES, tables
from tests.test_shape import shape_of
from tests.test_tutorial_bugs import RECIPES
from tests.tutorials import PRACTICED, SHARDED, TUTORIALS

EACH = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
BY_NAME = {preset.name: preset for preset in PRESETS}
PARAMETERS = {
    "THUDM/chatglm2-6b": 6_243_584_000,
    "THUDM/chatglm3-6b": 6_243_584_000,
    "THUDM/glm-4-9b-chat-hf": 9_399_951_360,
    "Qwen/Qwen-7B-Chat": 7_721_324_544,
    "Qwen/Qwen-14B-Chat": 14_167_290_880,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "facebook/opt-1.3b": 1_315_758_080,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "microsoft/DialoGPT-medium": 354_823_168,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
}
TINY = {"chatglm2": "chatglm2", "chatglm3": "chatglm3", "qwen-": "qwen1", "qwen3": "Qwen3", "llama-2": "Llama 2"}
TINY |= {"llama-3": "Llama 3.2", "mistral": "Mistral", "glm-4": "GLM-4 (2024)", "dialogpt": "GPT-2", "opt": "OPT"}
"""The tiny model of the same family, by how a preset's name begins."""
ROW = {"instruction": "介绍北京的历史", "input": "一句话", "output": "北京是中国的首都。"}
ADVERTISEMENT = {"content": "类型#裤*版型#宽松", "summary": "宽松的阔腿裤。"}
TALK = {"conversations": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]}
ROWS = {
    "data/alpaca_zh.json": (ROW, "template", "ChatGLM2 on Alpaca rows"),
    "data/sample_data.json": (ROW, "alpaca", None),
    "data/train.jsonl": (ROW, "template", "Qwen on instructions"),
    "HasturOfficial/adgen:train[:1%]": (ADVERTISEMENT, "template", "ChatGLM3 on AdvertiseGen"),
}
"""A row of each source, the format in which a tutorial's preset reads it, and the prompt that it is given."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's cache with the headers of all models, beside the rows of the tutorials."""
    folder = tmp_path_factory.mktemp("presets")
    for model in PARAMETERS:
        publish(folder / "hub", model)
    (folder / "data").mkdir()
    for name in ("alpaca_zh.json", "sample_data.json"):
        (folder / "data" / name).write_text(json.dumps([ROW] * 40, ensure_ascii=False))
    for name in ("train.jsonl", "eval.jsonl"):
        write_rows(folder / "data" / name, [ROW] * 40)
    write_rows(folder / "data/adgen.jsonl", [ADVERTISEMENT] * 40)
    return folder


@pytest.fixture(autouse=True)
def there(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub / "hub"))
    monkeypatch.chdir(hub)


def here(preset: Preset) -> list[str]:
    """The hub's data set as a file."""
    on_hub = str(preset.config().data.train).startswith("HasturOfficial/")
    return ["data.train=data/adgen.jsonl"] if on_hub else []


@EACH
def test_it_is_planned_on_the_hardware_of_its_name_and_fits(preset: Preset) -> None:
    found, (nodes, gpus, memory_gib) = preset.outlook(*here(preset)), preset.hardware
    need = found.plan.memory
    assert need and fits(need, memory_gib)
    assert (found.world.nodes, found.world.ranks_per_node) == (nodes, gpus)
    assert found.rows and found.plan.steps > 0
    sharded = [strategy for strategy in ("zero2", "zero3") if strategy in preset.name]
    assert [found.plan.zero.strategy] == (sharded or ["replicate"])


@EACH
def test_it_opens_with_its_purpose_its_commands_and_what_was_measured(preset: Preset) -> None:
    purpose, empty, plan, train, *_ = preset.head.splitlines()
    assert purpose.endswith(".") and empty == "#"
    assert plan == f"#   {preset.plan_command}"
    assert train.startswith("#   ") and train.endswith(f" train configs/{preset.path.name}")
    assert re.search(r"^# Memory and speed: (not measured\.|.+, \d{4}-\d\d-\d\d)", preset.head, re.MULTILINE)


@pytest.mark.parametrize("model", PARAMETERS)
def test_models_have_as_many_parameters_as_published_and_the_tensors_of_transformers_class(model: str) -> None:
    _, tensors = published(Model(name=model), Storage())
    expected = {name: tuple(value.shape) for name, value in module(model).named_parameters()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert sum(tensor.numel for tensor in tensors.values()) == PARAMETERS[model]


@EACH
def test_it_quantizes_and_adapts_linears_that_the_model_has(preset: Preset) -> None:
    config, found = preset.config(), preset.outlook(*here(preset))
    assert config.quantization.type == "nf4" and found.shape.quantized > 0.8 * found.shape.parameters
    targets = adapted(config.lora.targets, found.shape.model_type)
    assert targets and set(targets) <= {linear.name for linear in found.shape.linears}


@EACH
def test_its_precision_holds_what_the_model_computes_and_no_remote_code_is_run(preset: Preset) -> None:
    config, found = preset.config(), preset.outlook(*here(preset))
    assert not config.model.trust_remote_code
    published_in = published_config(config.model.name).get("torch_dtype", "float16")
    if found.plan.precision == "fp16":
        assert found.shape.model_type not in FP16_OVERFLOWS and published_in == "float16"


@pytest.mark.parametrize("name", TUTORIALS)
def test_settings_are_those_of_its_tutorial(name: str) -> None:
    config, expected = BY_NAME[name].config(), TUTORIALS[name]
    found = {key: getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]) for key in expected}
    assert found == expected
    assert "but:\n# - " in BY_NAME[name].head


@pytest.mark.parametrize("name", TUTORIALS)
def test_its_rows_are_read_in_the_format_of_its_tutorial(name: str) -> None:
    data = BY_NAME[name].config().data
    row, expected, recipe = ROWS[str(data.train)]
    if name.startswith("opt"):
        expected, recipe = "alpaca", None
    found, kind = format_of(data.format, data.template, row)
    assert found == expected
    assert data.template == (RECIPES[recipe].template if recipe else None)
    *_, answer = segments_of(kind, found, row)
    assert answer.learn and answer.content == row.get("output", row.get("summary"))


def typed(preset: Preset, start: str) -> list[str]:
    """The settings of the command in its head that starts so, as a shell would hand them over."""
    lines = "".join(line.removeprefix("#") + "\n" for line in preset.head.splitlines())
    (found,) = [shlex.split(line) for line in lines.replace("\\\n", "").splitlines() if line.strip().startswith(start)]
    return found[3:]


@pytest.mark.parametrize("name", PRACTICED)
def test_conversations_are_read_by_the_command_in_its_head(name: str) -> None:
    preset = BY_NAME[name]
    data = preset.config(*typed(preset, f"qlora train configs/{name}.yaml data.format")).data
    kind = format_of(data.format, data.template, TALK)[1]
    tokenizer = original("qwen1")
    parts = encode(segments_of(kind, data.format, TALK), tokenizer, chat_format(tokenizer, data.template))
    assert tokenizer.decode(ids_of(parts)) == "User: 你好\nAssistant: 你好！<|endoftext|>\n"


@pytest.mark.parametrize("name", SHARDED)
def test_offload_to_files_is_planned_with_aio_s_numbers_of_the_tutorial(name: str) -> None:
    preset = BY_NAME[name]
    words = ["parallel.offload_optimizer=nvme", "parallel.offload_parameters=nvme", "parallel.nvme_path=/local_nvme"]
    words += ["parallel.prefetch=0"] * (preset.config().parallel.prefetch is not None)
    assert " ".join(words) in preset.head
    written = preset.outlook(*words).plan.deepspeed()
    assert written["aio"] == {"block_size": 1048576, "queue_depth": 8, "intra_op_parallelism": 1}
    assert {written["zero_optimization"][key]["device"] for key in ("offload_optimizer", "offload_param")} == {"nvme"}


@pytest.mark.parametrize("name", SHARDED)
def test_the_faster_way_that_its_head_tells_is_planned(name: str) -> None:
    preset = BY_NAME[name]
    words = ["parallel.strategy=replicate", "parallel.offload_optimizer=none", "parallel.offload_parameters=none"]
    words += ["parallel.prefetch=null", "parallel.persistence=null"] * (preset.config().parallel.prefetch is not None)
    assert " ".join(words) in preset.head.replace("\n# ", " ")
    found = preset.outlook(*words).plan
    assert found.zero.strategy == "replicate" and found.memory and fits(found.memory, preset.hardware[2])


@pytest.mark.parametrize(
    ("name", "gpus", "accumulation"),
    [("chatglm2-6b-zero2-1x16g", 1, 8), ("chatglm2-6b-zero2-1x16g", 4, 2), ("dialogpt-medium-zero3-2x8g", 1, 2)],
)
def test_a_step_has_as_many_rows_on_any_number_of_gpus(name: str, gpus: int, accumulation: int) -> None:
    config, (_, _, memory_gib) = BY_NAME[name].config(), BY_NAME[name].hardware
    plan = look_ahead(config, *planned_for(config, 1, gpus, memory_gib)).plan
    assert (plan.accumulation, plan.deepspeed()["train_batch_size"]) == (accumulation, 8)


@pytest.mark.parametrize("model", ["meta-llama/Llama-2-7b-chat-hf", "Qwen/Qwen-7B-Chat"])
def test_llama_and_qwen_take_the_place_of_mistral(model: str) -> None:
    preset = BY_NAME["mistral-7b-zero3-2x16g"]
    found = preset.outlook(f"model.name={model}").plan.memory
    assert found and fits(found, preset.hardware[2])


def test_fp4_takes_as_much_memory_as_nf4_and_8_bits_take_more() -> None:
    preset = BY_NAME["qwen-7b-chat-qlora-1x24g"]
    nf4, fp4, int8 = (preset.outlook(f"quantization.type={kind}").plan.memory for kind in ("nf4", "fp4", "int8"))
    assert nf4 and int8 and nf4 == fp4 and nf4.total_gib < int8.total_gib <= preset.hardware[2]


def test_each_of_eight_ranks_reads_an_eighth_of_chatglm2() -> None:
    config = BY_NAME["chatglm2-6b-zero3-2x4x24g"].config()
    _, tensors = published(config.model, config.storage)
    folder = Path(constants.HF_HUB_CACHE) / "models--THUDM--chatglm2-6b/snapshots"
    (snapshot,) = folder.iterdir()
    skeleton = build(read_config(str(snapshot), config.model), config.model, config.quantization, "bf16", "bf16")
    wanted = shares(skeleton, tensors, "it")
    whole = sum(share.nbytes for share in wanted)
    read = [sum(share.nbytes for share in own_shares(wanted, World(rank, 8, rank % 4))) for rank in range(8)]
    assert sum(read) == whole == 2 * PARAMETERS["THUDM/chatglm2-6b"]
    assert max(read) < 1.01 * whole / 8


@EACH
def test_it_trains_a_tiny_model_of_the_same_make(preset: Preset, hub: Path, tmp_path: Path) -> None:
    make = next(make for start, make in TINY.items() if preset.name.startswith(start))
    folder = hub / make
    model = folder if folder.exists() else tiny(make, folder)
    words = [f"model.name={model}", f"output.url={tmp_path}", "train.max_steps=2", "data.max_length=160"]
    words += ["train.precision=fp32", "quantization.compute_dtype=fp32", "data.workers=1"]  # for a CPU
    config = preset.config(*words, *here(preset))
    said: list[str] = []
    train(config, World(), said.append)
    assert all(math.isfinite(loss) for loss in losses(tmp_path)) and len(losses(tmp_path)) == 2
    kind = "template" if config.data.template else "alpaca"
    assert any(line.startswith(f"format {kind}, ") for line in said)
    about = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    expected = adapted(config.lora.targets, shape_of(model).model_type)
    assert (about["r"], set(about["target_modules"])) == (config.lora.rank, set(expected or ()))


@READMES
def test_the_readme_lists_them_with_their_planned_memory(readme: Path) -> None:
    (listed,) = [table for table in tables(readme) if any("configs/" in cell for cell in table[1])]
    expected = []
    for preset in PRESETS:
        need, cards = preset.outlook(*here(preset)).plan.memory, preset.name.rpartition("-")[2]
        assert need
        command = preset.head.splitlines()[3].removeprefix("#   ")
        gpus = cards.replace("x", " x ").replace("g", " GB")
        expected.append([f"`{preset.config().model.name}`", f"`{command}`", gpus, f"{need.total_gib:.1f}"])
    assert sorted([model, *rest] for model, _, *rest in listed[1:]) == sorted(expected)
    assert all(licence for _, licence, *_ in listed)
