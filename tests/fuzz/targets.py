"""What is fuzzed: a folder of valid files, the one that is mutated, how, and who reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mutations import json_files, safetensors_files, yaml_files

from epmq_gptq.checks.engines.check import ENGINES, check_checkpoint
from epmq_gptq.checks.structure import normalised
from epmq_gptq.experts.adapters import Adapter
from epmq_gptq.host.recorded.bundle import Bundle
from epmq_gptq.io.checkpoints import Checkpoint, check_folder
from epmq_gptq.merging.lineage.read import read_lineage
from epmq_gptq.publish.page.render import report_page
from epmq_gptq.publish.page.retention import read_retention
from epmq_gptq.recipe import Recipe
from epmq_gptq.run_report import read_report

CORPUS = Path(__file__).parent / "corpus"


def read_model(folder: Path) -> Any:
    """A checkpoint, to the last tensor."""
    check_folder(folder, what="the model")
    checkpoint = Checkpoint(folder, what="the model")
    names = list(checkpoint)
    for name in names:
        checkpoint.prefetch(name)
        info = checkpoint.info(name)
        tensor = checkpoint.read(name)
        assert tuple(tensor.shape) == info.shape and tensor.numel() == info.numel
        if info.shape and info.shape[0]:
            checkpoint.read_rows(name, 0, 1)
    return names, normalised(checkpoint.config()), checkpoint.digest()


def read_quantized(folder: Path) -> Any:
    """What `epmq-gptq check` says of it, for every engine."""
    return check_checkpoint(folder, engines=[*ENGINES, "TGI"], tensor_parallel=2).to_dict()


def read_bundle(folder: Path) -> Any:
    """Kept statistics, with every sum in them."""
    bundle = Bundle(folder)
    bundle.verify()
    return bundle.index


def read_recipe(folder: Path) -> Any:
    """A recipe, and what it would be written as."""
    (file,) = folder.iterdir()
    return Recipe.from_file(file).to_options()


def read_adapter(folder: Path) -> Any:
    """An adapter's options and factors."""
    adapter = Adapter.open(folder, what="expert `x`")
    return adapter.base, adapter.modules, adapter.digest()


def read_figures(folder: Path) -> Any:
    """The page of a report, with its evaluation if there is one."""
    return report_page(read_report(folder), retention=read_retention(folder))


class Target(NamedTuple):
    """One reader and one of its files.

    Attributes:
        folder: of the corpus.
        file: that is mutated; as the reader knows it.
        mutate: content → strategy of files.
        read: folder → a value, or an EPMQError.
        source: its name in the corpus, where that is another.
    """

    folder: str
    file: str
    mutate: Callable
    read: Callable[[Path], Any]
    source: str = ""

    def __str__(self) -> str:
        return f"{self.folder}-{self.source or self.file}"

    @property
    def valid(self) -> bytes:
        return (CORPUS / self.folder / (self.source or self.file)).read_bytes()


WEIGHTS = "model.safetensors"
MERGEKIT = "mergekit_config.yml"
TARGETS = [
    Target("checkpoint", WEIGHTS, safetensors_files, read_model),
    Target("checkpoint", "config.json", json_files, read_model),
    Target("sharded", f"{WEIGHTS}.index.json", json_files, read_model),
    Target("sharded", "model-00002-of-00002.safetensors", safetensors_files, read_model),
    Target("quantized", WEIGHTS, safetensors_files, read_quantized),
    Target("quantized", "config.json", json_files, read_quantized),
    Target("quantized", "quantize_config.json", json_files, read_quantized),
    Target("recipe", "plain.yaml", yaml_files, read_recipe),
    Target("recipe", "merge.yaml", yaml_files, read_recipe),
    Target("recipe", "recipe.json", json_files, read_recipe),
    *(
        Target("mergekit", MERGEKIT, yaml_files, read_lineage, f"{n}.yml")
        for n in ("ties", "slerp", "linear")
    ),
    Target("record", "epmq_merge.json", json_files, read_lineage),
    Target("card", "README.md", yaml_files, read_lineage),
    Target("card", "README.md", yaml_files, read_lineage, "front.md"),
    Target("adapter", "adapter_config.json", json_files, read_adapter),
    Target("adapter", "adapter_model.safetensors", safetensors_files, read_adapter),
    Target("bundle", "index.json", json_files, read_bundle),
    Target("bundle", "00001.safetensors", safetensors_files, read_bundle),
    Target("report", "epmq_report.json", json_files, read_figures),
    Target("retention", "epmq_evaluation.json", json_files, read_retention),
]
# Readers of one file: nothing else is in their folder.
ALONE = {"recipe", "mergekit", "card"}
