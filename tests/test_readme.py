"""What the documents say can be typed, and what they point to is there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from lit_multiip.__main__ import PLAIN, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("", "configs", "runs", "tests", "tests/benchmarks", ".github", "lit_multiip", "lit_multiip/*")
DOCUMENTS = {
    file: file.read_text(encoding="utf-8") for folder in FOLDERS for file in ROOT.glob(f"{folder}/*.md".lstrip("/"))
}
LONGEST = 1300  # words of the README


def commands(text: str) -> list[str]:
    """The lines of a document's shell blocks, each command alone and without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [
        part.split("  #")[0].strip() for block in blocks for line in block.splitlines() for part in line.split("&&")
    ]


OWN = sorted(
    {line for text in DOCUMENTS.values() for line in commands(text) if line.startswith("python -m lit_multiip")}
)


def write_gated(folder: Path) -> None:
    [code] = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Gated" in block]
    (folder / "gated.py").write_text(code)


def test_the_readme_is_short():
    assert len(README.split()) <= LONGEST


def test_the_aggregator_of_the_readme_is_average_pooling_until_it_is_trained(tmp_path, monkeypatch):
    write_gated(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    aggregator = importlib.import_module("gated").Gated(8)
    embeds = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))
    out = aggregator(embeds)
    assert out.shape == (3, 1, 8) and torch.allclose(out, embeds.mean(1, keepdim=True), atol=1e-6)
    assert len((tmp_path / "gated.py").read_text().splitlines()) <= 20
    out.square().sum().backward()
    assert aggregator.query.grad.abs().max() > 1e-3


def test_two_commands_set_everything_up():
    first, second = (block.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[:2])
    assert first.endswith("python -m lit_multiip test") and second.endswith("pytest")
    assert "\n" not in first and "\n" not in second


@pytest.mark.parametrize("line", OWN)
def test_every_command_of_the_documents_parses(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if "gated.Gated" in line:
        write_gated(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
    command, *options = shlex.split(line)[3:]
    if options == ["--ckpt_path", "last"]:  # a run of one's own, which tests/properties/test_resume.py has
        return
    if command not in PLAIN and "--config" not in options:  # the newest run, for which a method stands here
        options = ["--config", "configs/self_attn.yaml", *options]
    with pytest.raises(SystemExit) as exit_:
        main([command, *options, "--print_config"])
    assert exit_.value.code in (0, None), capsys.readouterr().err


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_file_that_a_document_names_is_there(document):
    text = DOCUMENTS[document]
    named = {ROOT / path for path in re.findall(r"`((?:tests|lit_multiip|configs)/[\w/.]+)`", text)}
    linked = {document.parent / path.split("#")[0] for path in re.findall(r"\]\((?!https?:)([^)#][^)]*)\)", text)}
    assert not [path for path in sorted(named | linked) if not path.exists()]


def test_the_pictures_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures[0].endswith("grid.png")  # what the project makes comes first
    assert all((ROOT / picture).stat().st_size > 50_000 for picture in pictures)
