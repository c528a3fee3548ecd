"""Overrides, files, and that reading a recipe executes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qat.errors import RecipeError
from qat.recipes import Phase, Recipe, Rule, Slot, as_recipe, check, from_dict, load_recipe, to_dict

SMALL = "rules: {linears: {types: [Linear], weight: {bits: 4}}}"


def test_overrides_reach_every_kind_of_value() -> None:
    recipe = load_recipe(
        "w4a16_g128",
        [
            "name=mine",
            "rules.linears.weight.bits=3",
            r"rules.linears.match=['*mlp*', 're:h\.\d+']",
            "rules.linears.input={bits: 8, granularity: token}",
            "rules.head=null",
            "rules.new={types: [Conv1d], weight: {bits: 8}}",
            "init.method=none",
            "phases.qat.ramp=50",
            "distill.weight=0.5",
            "train.lr=3e-4",
            "train.weight_decay=1",
            "train.devices=2",
            "train.data=[a.txt, b.jsonl]",
            "train.model=/models/one=two",
            "export.targets=[]",
        ],
    )
    assert recipe.name == "mine"
    assert recipe.rules["linears"].weight is not None and recipe.rules["linears"].weight.bits == 3
    assert recipe.rules["linears"].weight.group_size == 128
    assert recipe.rules["linears"].match == ["*mlp*", r"re:h\.\d+"]
    assert recipe.rules["linears"].input == Slot(bits=8, granularity="token")
    assert list(recipe.rules) == ["linears", "embeddings", "new"]
    assert recipe.phases == {"qat": Phase(ramp=50)}
    assert recipe.distill.weight == 0.5
    assert recipe.train.lr == 3e-4
    assert recipe.train.weight_decay == 1.0 and isinstance(recipe.train.weight_decay, float)
    assert recipe.train.devices == "2"
    assert recipe.train.data == ["a.txt", "b.jsonl"]
    assert recipe.train.model == "/models/one=two"
    assert recipe.train.out == "runs/mine"
    assert recipe.export.targets == []


def test_later_overrides_win_and_the_preset_stays() -> None:
    assert load_recipe("w8a8", ["train.seed=1", "train.seed=2"]).train.seed == 2
    assert load_recipe("w8a8").train.seed == 0


def test_phases_are_replaced_and_default_phases_can_be_addressed(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(SMALL)
    assert load_recipe(path).name == "own"
    assert load_recipe(path).phases == {"qat": Phase()}
    assert load_recipe(path, ["phases.qat.ramp=3"]).phases == {"qat": Phase(ramp=3)}
    path.write_text(SMALL + "\nphases: {wait: {steps: 2, quantize: false}, go: {}}")
    assert list(load_recipe(path).phases) == ["wait", "go"]
    assert load_recipe(path, ["phases.wait=null"]).phases == {"go": Phase()}


def test_defaults_are_left_to_the_schema() -> None:
    recipe = from_dict({"rules": {"all": {"weight": {"bits": 4}}}})
    assert recipe.rules == {"all": Rule(weight=Slot(bits=4))}
    assert recipe.train.out == "runs/recipe"
    assert recipe.rules["all"].weight is not None
    assert recipe.rules["all"].weight.spec_fields()["signed"] is True
    assert Slot(zero_point="int").spec_fields()["signed"] is False
    assert Slot(zero_point="int", signed=True).is_signed


def test_spec_fields_are_those_of_the_spec() -> None:
    from qat.specs import QuantSpec

    assert QuantSpec(**Slot(bits=4, granularity="group", group_size=32).spec_fields()).group_size == 32
    assert set(Slot().spec_fields()) == set(QuantSpec().to_dict())


def test_records_without_newer_words_stay_the_same() -> None:
    """What a checkpoint says of its recipe. Mutation: a word kept that was not set -> red."""
    data = to_dict(from_dict({"rules": {"a": {"weight": {"quantizer": "lsq"}}}}))
    assert not {"percentile", "signed_scale", "desc_act"} & data["rules"]["a"]["weight"].keys()
    assert not {"imatrix", "file"} & set(data["init"]) and "offload" not in data["train"]
    data = to_dict(from_dict({"rules": {"a": {"weight": {"quantizer": "lsq", "percentile": 99.9}}}}))
    assert data["rules"]["a"]["weight"]["percentile"] == 99.9


def test_as_recipe_takes_all_that_a_user_may_hold(tmp_path: Path) -> None:
    preset = load_recipe("w2_g64")
    path = tmp_path / "w2.yaml"
    OmegaConf.save(OmegaConf.create(to_dict(preset)), path)
    for form in ("w2_g64", path, to_dict(preset), preset, OmegaConf.create(to_dict(preset))):
        assert as_recipe(form) == preset
    with pytest.raises(RecipeError, match=r"rules\.a\.weight\.bits: 9"):
        as_recipe(Recipe(rules={"a": Rule(weight=Slot(bits=9))}))


def test_reading_leaves_the_callers_data_alone() -> None:
    data = {"rules": {"a": {"weight": {"bits": 4}}, "b": None}, "train": {"betas": (0.9, 0.99)}}
    assert list(from_dict(data).rules) == ["a"]
    assert data == {"rules": {"a": {"weight": {"bits": 4}}, "b": None}, "train": {"betas": (0.9, 0.99)}}


def test_hand_made_recipe_is_checked_for_its_classes() -> None:
    recipe = Recipe(rules={"a": {"weight": {"bits": 4}}})  # type: ignore[dict-item]
    assert check(recipe) == ["rules.a: a dict is not a Rule; use qat.recipes.from_dict for plain data"]
    assert check(Recipe(rules={"a": Rule(weight=Slot())})) == []


def test_every_mistake_is_reported_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("w8a8", ["rules.linears.weight.bits=9", "train.lr=-1", "distill.loss=hinge"])
    assert all(key in str(error.value) for key in ("rules.linears.weight.bits", "train.lr", "distill.loss"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rules.linears.weight.bits", "not of the form"),
        ("=3", "not of the form"),
        ("rules..bits=3", "not of the form"),
        ("train.lr=", "the value is missing; write train.lr=null"),
        ("rules.linear.weight.bits=3", r"rules\.linear: .*did you mean \"linears\"\?; allowed: linears, head; .*whole"),
        ("phases.qta.ramp=3", r"phases\.qta: .*did you mean \"qat\"\?"),
        ("name.first=x", r"name\.first: name is \"w8a8\", without keys"),
        ("rules.linears.match.0=x", r"rules\.linears\.match is \[\"\*\"\], without keys"),
        ("rule.linears.weight.bits=3", r"rule: unknown key; did you mean \"rules\"\?"),
        ("train.lr=[1", "not YAML"),
        ("train.model=${oc.env:HOME}", r"train\.model: .*interpolation"),
        ("train.model=!!python/name:os.system", "tag .* is not allowed"),
        ("rules.linears.weight=null", r"linears"),
    ],
)
def test_wrong_overrides(override: str, message: str) -> None:
    overrides = [override, "rules.linears.input=null"] if override.endswith("weight=null") else [override]
    with pytest.raises(RecipeError, match=message):
        load_recipe("w8a8", overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['touch {mark}']", "tag .* is not allowed"),
        ("!!python/object/new:subprocess.check_call [['touch', '{mark}']]", "tag .* is not allowed"),
        ("name: !touch x", "tag .* is not allowed"),
        ("name: !!str x", "tag .* is not allowed"),
        ("name: &a x\ndescription: *a", "anchors and aliases are not allowed"),
        ("name: x\nname: y", 'the key "name" is there twice'),
        ("train: {{model: '${{oc.env:HOME}}'}}", r"train\.model: .*interpolation"),
        ("train: {{model: '${{run:}}'}}", r"train\.model: .*interpolation"),
        ("train: {{data: [a, '${{run:}}']}}", r"train\.data\[1\]: .*interpolation"),
        ("rules: {{'${{run:}}': {{keep_float: true}}}}", "rules: the key .*interpolation"),
        ("name: ${{train.task}}", "name: .*interpolation"),
        ("description: ???", r"description: \"\?\?\?\" stands for a missing value"),
        ("name: 2020-01-01", "name: .* is neither text, number"),
        ("1: x", "the key 1 is not text"),
        ("name: x\n---\nname: y", "not YAML"),
        ("name: [", "not YAML"),
        ("- name", "a recipe is a mapping"),
        ("just text", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("name: " + "[" * 5000, "not YAML|nested too deeply"),
        ("train: {{max_steps: 0x" + "f" * 5000 + "}}", r"train\.max_steps: the number is too large"),
        ("train: {{lr: .nan}}", r"train\.lr: nan is not a finite number"),
        ("train: {{lr: .inf}}", r"train\.lr: inf is not a finite number"),
    ],
)
@pytest.mark.filterwarnings("ignore:register_new_resolver")
def test_reading_a_file_executes_nothing(text: str, message: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    OmegaConf.register_new_resolver("run", lambda: mark.touch(), replace=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(text.format(mark=mark))
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
    assert not mark.exists()
    OmegaConf.clear_resolver("run")


def test_interpolations_in_python_data_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"train\.model: .*interpolation"):
        from_dict(OmegaConf.create({"train": {"model": "${oc.env:HOME}"}}))  # type: ignore[arg-type]
    loop: dict[str, object] = {}
    loop["rules"] = loop
    with pytest.raises(RecipeError, match="nested too deeply"):
        from_dict(loop)


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"missing\.yaml.*does not exist"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(path)
    path.write_bytes(b"#" * (1 << 20) + b"##")
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        load_recipe(path)


def test_reading_a_recipe_needs_no_torch() -> None:
    """The modules of qat.recipes, loaded without qat's own __init__, bring no torch with them."""
    root = Path(__file__).parents[2]
    code = f"""
import sys
from importlib.util import module_from_spec, spec_from_file_location
folder = {str(root / "qat")!r}
sys.modules["qat"] = module_from_spec(
    spec_from_file_location("qat", folder + "/__init__.py", submodule_search_locations=[folder])
)
from qat.recipes import load_recipe, preset_names
print(len([load_recipe(name) for name in preset_names()]), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, torch = done.stdout.split()
    assert int(count) >= 6 and torch == "False"


def test_records_of_earlier_versions_stay_the_same() -> None:
    """A phase has only these words in a checkpoint unless others are used: another record would be refused there."""
    data = to_dict(load_recipe("w2_g64"))
    assert data["phases"] == {
        "qat": {"steps": -1, "quantize": True, "ramp": 0, "freeze_scales": False, "bits": {}},
    }
    used = from_dict(
        {"name": "n", "rules": data["rules"], "phases": {"qat": {"dampen": 0.5, "freeze_batch_norm": True}}}
    )
    assert to_dict(used)["phases"]["qat"]["dampen"] == 0.5 and to_dict(used)["phases"]["qat"]["freeze_batch_norm"]
    assert set(data["batch_norm"]) == {"reestimate"}
    slot = data["rules"]["linears"]["weight"]
    assert set(slot) == {
        "bits", "granularity", "group_size", "zero_point", "narrow", "scale", "quantizer", "grid", "signed",
    }  # fmt: skip
