"""Imports go down only, and `import qat` brings no trainer, compiler, logger or model library with it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Part of the package -> its layer. A part may import from its own layer and from lower ones.
LAYERS = {
    "errors": 0,
    # scales are rounded and QTensors decoded with the kernels' own arithmetic, which is written once
    "fake_quant_kernels": 0,
    "grids": 0,
    "layout": 0,
    "registry": 0,
    "scales": 0,
    "specs": 0,
    "qtensor": 1,
    "quantizers": 2,
    "recipes": 2,
    "activations": 3,
    "adapters": 3,
    "allocate": 3,
    "attention": 3,
    "batch_norm": 3,
    "bypass": 3,
    "codes": 3,
    "convert": 3,
    "distill": 3,
    "export": 3,
    "fold": 3,
    "health": 3,
    "hf": 3,
    "init": 3,
    "layers": 3,
    "linear_node": 3,
    "node": 3,
    "norm_fold": 3,
    "norm_pairs": 3,
    "ops": 3,
    "oscillation": 3,
    "plan": 3,
    "prepare": 3,
    "reparam": 3,
    "row_reasons": 3,
    "schedule": 3,
    "slot": 3,
    "state": 3,
    "steps": 3,
    "callbacks": 4,
    "cli": 5,
    "refusals": 5,
    "report": 5,
    "tasks": 5,
    "verify": 5,
    "__main__": 5,
}
# Libraries -> the lowest layer, or the only parts, that may import them.
FROM_LAYER = {"lightning": 4, "pytorch_lightning": 4, "wandb": 4, "rich": 3, "typer": 5, "matplotlib": 5, "jinja2": 5}
ONLY_IN = {"triton": {"fake_quant_kernels"}, "omegaconf": {"recipes"}, "yaml": {"recipes"}}
# A recipe is read without torch.
TORCH_FREE = {"errors", "recipes"}
# What leaves training is a Bundle: the export sees neither the layers that made it nor their quantizers.
EXPORT_MAY_NOT = {
    "quantizers",
    "layers",
    "attention",
    "ops",
    "prepare",
    "schedule",
    "state",
    "bypass",
    "callbacks",
    "recipes",
}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST) -> Iterator[str]:
    """Every module, or name of a module, that the code below `node` imports when it runs, inside functions too."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child)


def parts() -> list[tuple[str, Path, set[str]]]:
    """(part of the package, file, modules that it imports) of every file but qat/__init__.py."""
    found = []
    for top in ("qat", "callbacks", "fake_quant_kernels", "recipes"):
        for path in sorted((ROOT / top).rglob("*.py")):
            relative = path.relative_to(ROOT / "qat" if top == "qat" else ROOT)
            linked = top == "qat" and relative.parts[0] in ("callbacks", "fake_quant_kernels", "recipes")
            if "benchmarks" in relative.parts or linked or (top == "qat" and str(relative) == "__init__.py"):
                continue
            modules = set(imports(ast.parse(path.read_text(encoding="utf-8"))))
            found.append((relative.parts[0].removesuffix(".py"), path.relative_to(ROOT), modules))
    assert len(found) >= 30
    return found


def test_every_part_has_a_layer() -> None:
    unknown = {name for name, _, _ in parts()} - set(LAYERS)
    assert not unknown, f"give {unknown} a layer in this file"


def test_imports_go_down_only() -> None:
    wrong = []
    for name, path, modules in parts():
        for module in sorted(modules):
            # qat/__init__.py imports all of layers 0 to 3, so only what lies above may use the names that it exports.
            if module == "qat" and LAYERS[name] < 4:
                wrong.append(f"{path} imports the bare name qat")
            if module.startswith("qat."):
                target = module.split(".")[1]
                if target not in LAYERS and LAYERS[name] >= 4:
                    continue
                if LAYERS.get(target, 99) > LAYERS[name]:
                    wrong.append(f"{path} (layer {LAYERS[name]}) imports {module} (layer {LAYERS.get(target)})")
    assert not wrong, "\n".join(wrong)


def test_libraries_are_imported_where_they_belong() -> None:
    wrong = []
    for name, path, modules in parts():
        for library in {module.split(".")[0] for module in modules}:
            if LAYERS[name] < FROM_LAYER.get(library, 0) or name not in ONLY_IN.get(library, {name}):
                wrong.append(f"{path} imports {library}")
            if library == "torch" and name in TORCH_FREE:
                wrong.append(f"{path} imports torch")
    assert not wrong, "\n".join(wrong)


def test_recipes_see_nothing_of_the_core_but_its_errors() -> None:
    for name, path, modules in parts():
        if name == "recipes":
            seen = {module.split(".")[1] for module in modules if module.startswith("qat.")}
            assert seen <= {"errors", "recipes"}, f"{path} imports {seen}"


def test_kernels_take_tensors_and_numbers() -> None:
    for name, path, modules in parts():
        if name == "fake_quant_kernels":
            seen = {module.split(".")[1] for module in modules if module.startswith("qat.")}
            assert seen <= {"errors", "fake_quant_kernels"}, f"{path} imports {seen}"


def test_export_sees_bundles_only() -> None:
    for name, path, modules in parts():
        if name == "export":
            seen = {module.split(".")[1] for module in modules if module.startswith("qat.")}
            assert not seen & EXPORT_MAY_NOT, f"{path} imports {seen & EXPORT_MAY_NOT}"


def test_import_qat_is_light() -> None:
    heavy = ("lightning", "pytorch_lightning", "triton", "deepspeed", "transformers", "wandb", "matplotlib", "typer")
    code = f"import sys, qat, qat.recipes; print([name for name in {heavy!r} if name in sys.modules])"
    # torch brings triton itself where it is installed; then only what qat adds counts.
    code = "import torch, sys; before = set(sys.modules); " + code.replace("sys.modules]", "set(sys.modules) - before]")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
