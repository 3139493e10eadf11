"""The rules of the house: what lies at the root, who imports whom, what is declared, and what the front door gives."""

import ast
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import packages_distributions
from importlib.util import resolve_name
from pathlib import Path

import pytest
import setuptools
import stts_molmo
from helpers import ROOT, TINY, make_model
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor
from stts_molmo.tools.checkpoint import CODE_FILES

MAX_LINES = 900
CODE = {path.stem.removesuffix("_stts_molmo"): path for path in CODE_FILES}
# Which rooms a room may look into.
DOORS = {
    "configuration": set(),
    "pruning": {"configuration"},
    "attention": {"configuration", "pruning"},
    "outputs": set(),
    "prompt": set(),
    "saving": set(),
    "generation": {"outputs", "prompt"},
    "modeling": {"configuration", "pruning", "attention", "outputs", "prompt", "generation", "saving"},
    "download": set(),
    "video": {"configuration", "download"},
    "processing": {"configuration", "download", "video"},
}
# What is imported where it is there, and done without where it is not.
OPTIONAL = {"torchao", "torchcodec", "triton"}
# What an extra's own file or folder in tools/ imports.
IN_EXTRAS = {
    "adapters.py": "lora",
    "demo.py": "demo",
    "evaluation.py": "train",
    "lmms": "eval",
    "serving.py": "serve",
    "tables.py": "parquet",
    "trl.py": "trl",
}
EXTRAS = {"benchmarks": ["test"], "examples": ["train", "ray"], "tests": ["test"]}
TESTED_APART = {"test_lmms.py": "eval"}  # in an environment of its own


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


PACKAGE_FILES = [ROOT / "__init__.py", *CODE_FILES, *python_files("tools", "stts_kernels")]
OUR_FILES = [ROOT / "setup.py", *PACKAGE_FILES, *python_files(*EXTRAS)]
ENGINES = sorted((ROOT / "engines").iterdir())  # packages of their own, in environments of their own
ALL_FILES = [*OUR_FILES, *python_files("engines")]


def imported_modules(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, `.name` for one beside the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def guarded_imports(path: Path) -> set[str]:
    """Modules that a file imports in a `try` that goes on without them."""
    return {
        module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Try) and any(getattr(x.type, "id", "") == "ImportError" for x in node.handlers)
        for statement in node.body
        for module in [getattr(statement, "module", None)]
        if module
    }


# ----------------------------------------------------------------------------------------------------------------------
# Rooms
# ----------------------------------------------------------------------------------------------------------------------


def test_the_root_holds_what_a_hub_repository_carries(tmp_path):
    make_model().save_pretrained(tmp_path)
    STTSMolmoProcessor.from_pretrained(TINY).save_pretrained(tmp_path)
    at_the_root = {path.name for path in ROOT.glob("*.py")} - {"__init__.py", "setup.py"}
    assert {path.name for path in tmp_path.glob("*.py")} == at_the_root == {path.name for path in CODE_FILES}


def test_the_bundled_checkpoint_links_to_it():
    assert sorted(path.resolve() for path in TINY.glob("*.py")) == [path.resolve() for path in CODE_FILES]
    assert all(path.is_symlink() for path in TINY.glob("*.py"))


@pytest.mark.parametrize("room", CODE)
def test_rooms_at_the_root_look_one_way(room):
    doors = {f".{name}_stts_molmo" for name in DOORS[room]}
    for module in imported_modules(CODE[room]):
        ours = module.startswith(".") or module.partition(".")[0] in ("stts_molmo", "stts_kernels", "tools")
        assert not ours or module in doors or (room, module) == ("attention", "stts_kernels"), module
    assert ("stts_kernels" in guarded_imports(CODE[room])) == (room == "attention")


def test_nobody_looks_into_the_workshop():
    """What pip adds builds on what a Hub repository carries; benchmarks, examples and tests build on both."""
    for path in python_files("tools"):
        for module in imported_modules(path):
            assert module.partition(".")[0] not in EXTRAS, (path, module)
    for path in python_files("stts_kernels"):
        assert not [module for module in imported_modules(path) if "stts_molmo" in module], path


@pytest.mark.parametrize("engine", ENGINES, ids=lambda folder: folder.name)
def test_an_engine_looks_into_the_package_and_nobody_into_an_engine(engine):
    for path in OUR_FILES:
        for module in imported_modules(path):
            assert module.partition(".")[0] not in (engine.name, f"{engine.name}_stts_molmo"), (path, module)
    for path in python_files(f"engines/{engine.name}/{engine.name}_stts_molmo"):
        for module in imported_modules(path):
            assert module.partition(".")[0] not in ("stts_kernels", "tools", *EXTRAS), (path, module)


@pytest.mark.parametrize("path", python_files("tools/lmms"), ids=lambda path: path.name)
def test_what_is_tested_apart_finds_what_it_takes_from_the_package(path):
    """`make test` would not notice: lmms-eval is installed elsewhere."""
    package = ".".join(["stts_molmo", *path.parent.relative_to(ROOT).parts])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("stts_molmo")):
            name = resolve_name("." * node.level + (node.module or ""), package)
            if not name.startswith("stts_molmo.tools.lmms"):
                module = import_module(name)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], name


def test_test_files_stand_alone():
    """They share helpers.py; none imports from another or changes where modules are found."""
    for path in python_files("tests", "engines"):
        modules = set(imported_modules(path))
        assert not [module for module in modules if module.startswith(("test_", "conftest"))], path
        attributes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
        assert not [node for node in attributes if ast.unparse(node) == "sys.path"], path


def test_no_file_is_too_long():
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in ALL_FILES}
    assert not {name: count for name, count in lines.items() if count > MAX_LINES}


# ----------------------------------------------------------------------------------------------------------------------
# Dependencies
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def declared() -> dict[str, list[Requirement]]:
    """The requirements in setup.py: `install`, and those of each extra."""
    given = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(setuptools, "setup", given.update)
        runpy.run_path(str(ROOT / "setup.py"))
    lines = {"install": given["install_requires"], **given["extras_require"]}
    return {name: list(map(Requirement, group)) for name, group in lines.items()}


def third_party_packages(paths: list[Path]) -> set[str]:
    """Distributions whose modules the files import."""
    own = {
        "stts_molmo",
        "stts_kernels",
        "tools",
        *EXTRAS,
        *(path.stem for path in paths if path.parent.name != "tools"),
    }
    modules = {module.partition(".")[0] for path in paths for module in imported_modules(path)} - {""}
    distributions = packages_distributions()
    return {
        canonicalize_name(distributions.get(module, [module])[0])
        for module in modules - own - OPTIONAL - set(sys.stdlib_module_names)
    }


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def test_what_is_imported_is_declared(declared):
    of_extras = {name: [p for p in PACKAGE_FILES if p.is_relative_to(ROOT / "tools" / name)] for name in IN_EXTRAS}
    of_all = [path for path in PACKAGE_FILES if path not in sum(of_extras.values(), [])]
    assert third_party_packages(of_all) <= names(declared["install"])
    for name, paths in of_extras.items():
        allowed = names(declared["install"] + declared[IN_EXTRAS[name]])
        assert paths and third_party_packages(paths) <= allowed, name
    for folder, extras in EXTRAS.items():
        paths = [path for path in python_files(folder) if path.name not in TESTED_APART]
        known = names(sum((declared[extra] for extra in extras), declared["install"]))
        assert third_party_packages(paths) <= known, folder
    for name, extra in TESTED_APART.items():
        allowed = names(declared["install"] + declared["test"] + declared[extra])
        assert third_party_packages([ROOT / "tests" / name, ROOT / "tests" / "helpers.py"]) <= allowed, name


@pytest.mark.parametrize("engine", ENGINES, ids=lambda folder: folder.name)
def test_what_an_engine_imports_is_declared(engine):
    """But for the engine itself, which comes under several names."""
    package = f"{engine.name}_stts_molmo"
    project = tomllib.loads((engine / "pyproject.toml").read_text())["project"]
    requirements = list(map(Requirement, project["dependencies"]))
    imported = {
        module.partition(".")[0] for path in (engine / package).glob("*.py") for module in imported_modules(path)
    }
    third_party = imported - {"", engine.name} - set(sys.stdlib_module_names)
    assert {module.replace("_", "-") for module in third_party} == names(requirements)


def test_each_requirement_has_the_lower_bound_that_test_oldest_runs(declared):
    for requirements in declared.values():
        for requirement in requirements:
            assert [bound for bound in requirement.specifier if bound.operator == ">="], requirement


def test_each_requirement_ends_with_what_the_suite_ran_with(declared):
    """The constraints hold a version of each, and no requirement claims a major release after that."""
    for extra, requirements in declared.items():
        own = ROOT / f"constraints-{extra.removeprefix('test-')}.txt"  # where an extra has an environment of its own
        lock = own if own.exists() else ROOT / "constraints.txt"
        lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
        ran_with = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}
        for requirement in requirements:
            version = ran_with[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, requirement
            assert Version(str(version.major + 1)) not in requirement.specifier, requirement


# ----------------------------------------------------------------------------------------------------------------------
# The front door
# ----------------------------------------------------------------------------------------------------------------------


def run_python(script: str) -> str:
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_types_and_loader_know_the_same_names():
    body = ast.parse((ROOT / "__init__.py").read_text()).body
    (block,) = (node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == stts_molmo.MODULES
    assert set(stts_molmo.__all__) == {*typed, "__version__"} == set(dir(stts_molmo))


@pytest.mark.parametrize("name", stts_molmo.__all__)
def test_public_names_resolve(name):
    value = getattr(stts_molmo, name)
    assert name == "__version__" or value.__name__ == name


def test_the_repository_may_lie_in_a_folder_of_any_name():
    """`stts-molmo`, for one: pytest then runs the file at the root as a module that is no package."""
    assert runpy.run_path(str(ROOT / "__init__.py"), run_name="__init__")["__all__"] == stts_molmo.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="STTSMolmo2"):
        stts_molmo.STTSMolmo2  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    heavy = {"torch", "transformers", "numpy", "av", "matplotlib", "huggingface_hub"}
    assert run_python(f"import sys, stts_molmo; print({heavy} & set(sys.modules))").strip() == "set()"


FROM_PRETRAINED = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers import AutoProcessor, AutoVideoProcessor
for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
             AutoVideoProcessor):
    kind = type(auto.from_pretrained({path!r}))
    print(kind.__module__, kind.__name__)
"""


def test_the_installed_package_needs_no_trust_in_remote_code():
    imports = "from stts_molmo import STTSMolmoForConditionalGeneration, STTSMolmoProcessor"
    assert run_python(imports + FROM_PRETRAINED.format(path=str(TINY))).splitlines() == [
        "stts_molmo.configuration_stts_molmo STTSMolmoConfig",
        "stts_molmo.modeling_stts_molmo STTSMolmoModel",
        "stts_molmo.modeling_stts_molmo STTSMolmoForConditionalGeneration",
        "stts_molmo.modeling_stts_molmo STTSMolmoForConditionalGeneration",
        "stts_molmo.processing_stts_molmo STTSMolmoProcessor",
        "stts_molmo.processing_stts_molmo STTSMolmoVideoProcessor",
    ]
