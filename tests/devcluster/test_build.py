"""What goes into an image build, and what does not stay in the image."""

import shutil
import subprocess

import pytest

from devcluster import build, network, paths
from devcluster.build import RECIPES


@pytest.fixture(autouse=True)
def own_machine(monkeypatch):
    """What the machine that runs the tests has configured is none of their business."""
    monkeypatch.setattr(network, "SYSTEM_CONFIGURATION", ())


def test_settings_go_into_a_build_as_a_secret_that_a_shell_can_read(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:a'b@packages.example.com/simple")
    with build.secrets() as options:
        file = options[1].removeprefix("id=network,src=")
        script = f'. {file}; printf %s "$PIP_INDEX_URL"'
        said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, env={})
        assert said.stdout == "https://user:a'b@packages.example.com/simple"
        assert not any("packages.example.com" in option for option in options)


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A copy of what images are made of."""
    for folder in ("operator", "trainer-image", "requirements"):
        shutil.copytree(paths.REPOSITORY / folder, tmp_path / folder)
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path)
    return tmp_path


CHANGES = {
    "the contract changes all": ("operator/attune/contract/__init__.py", {"operator", "trainer", "inference"}),
    "the trainer's code leaves the operator alone": (
        "trainer-image/attune_trainer/__main__.py",
        {"trainer", "inference"},
    ),
    "the operator's code leaves the trainer alone": ("operator/attune/api/__init__.py", {"operator"}),
    "the trainer's requirements leave the operator alone": ("requirements/trainer.txt", {"trainer", "inference"}),
    "compiled code is no source": ("operator/attune/contract/__pycache__/x.pyc", set()),
}


@pytest.mark.parametrize(("file", "changed"), CHANGES.values(), ids=CHANGES.keys())
def test_an_image_is_built_anew_exactly_when_its_sources_change(repository, file, changed):
    before = {name: recipe.digest() for name, recipe in RECIPES.items()}
    (repository / file).parent.mkdir(exist_ok=True)
    with (repository / file).open("a") as opened:
        opened.write("\n")
    assert {name for name, recipe in RECIPES.items() if recipe.digest() != before[name]} == changed


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_everything_that_a_dockerfile_copies_is_a_source(recipe):
    lines = [line.split() for line in (paths.REPOSITORY / recipe.dockerfile).read_text().splitlines()]
    copied = {source for line in lines if line[:1] == ["COPY"] for source in line[1:-1]}
    assert copied
    for source in copied:
        assert any(source == known or source.startswith(f"{known}/") for known in recipe.sources), source
