"""The whole demo: train or fetch the models, merge, quantize, measure, save, reload elsewhere."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from ... import EPMQConfig
from ...errors import EPMQInputError
from ...io.output import check_output, write_whole
from ...merging import check_merge, merge, merge_methods
from ...publish.card import write_card
from ...publish.page import read_report, report_page
from ...publish.page.retention import ExpertRetention, Retention, read_retention, write_retention
from ...report import PAGE_NAME
from .cache import Models, cache_folder, trained_models
from .domains import ANSWER_TOKENS, DOMAINS, PROMPTS
from .evaluation import Score, score
from .fresh import generate_elsewhere
from .hosting import QuantizeSettings, one_thread, quantize, reload, reload_awq
from .options import PAPER, RESULT_NAME, DemoOptions, DemoResult
from .rows import Row, domain_rows
from .table import result_table


class Demo:
    """One run: its options, its data and the result as it grows."""

    def __init__(self, options: DemoOptions, console: Console):
        out = check_output(options.out, {}, options.overwrite)
        if options.awq and options.quick:
            raise EPMQInputError(
                "`awq` cannot go with `quick`: GPTQModel's AWQ wants layers of at least 64 "
                "outputs.",
                code="EPMQ-O03",
                subject="`awq`",
                remedy="Leave one of the two out.",
            )
        # Refused now, not after minutes of training; the experts' places do not matter to it.
        EPMQConfig(
            bits=options.bits,
            group_size=options.group_size,
            alpha=options.alpha,
            experts=dict.fromkeys(DOMAINS, "-"),
            offload_to_disk=False,
        )
        check_merge(options.merge_method, options.merge_parameters, True, DOMAINS)
        self.options, self.out, self.console = options, out, console
        self.cache = Path(options.cache or cache_folder()).expanduser().absolute()
        self.result = DemoResult(
            settings={
                "bits": options.bits,
                "group_size": options.group_size,
                "alpha": options.alpha,
                "merge_method": options.merge_method,
                "merge_parameters": dict(options.merge_parameters),
                "calibration_rows": options.calibration_rows,
                "evaluation_rows": options.evaluation_rows,
                "plan": asdict(options.plan()),
            }
        )

    def run(self) -> DemoResult:
        with (
            tempfile.TemporaryDirectory(prefix="epmq-demo-") as temporary,
            working_folder(Path(temporary)),
            one_thread(),
        ):
            scratch = Path(temporary)
            models = self.models()
            data = {split: self.rows(models, split) for split in ("calibration", "evaluation")}
            self.pad_id = models.tokenizer().pad_token_id
            self.evaluation = data["evaluation"]
            merged = self.merge(models, data["calibration"], scratch / "merged")
            self.score_unquantized(models, merged)
            methods = ["RTN", "GPTQ", *(["AWQ"] if self.options.awq else []), PAPER, "E-PMQ"]
            for method in methods:
                self.quantized(method, merged, models, data["calibration"], scratch)
            with self.stage("fresh process"):
                prompts = {name: (PROMPTS[name], ANSWER_TOKENS[name]) for name in DOMAINS}
                self.result.served = generate_elsewhere(self.out, prompts, scratch)
        self.report()
        return self.result

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a stage and show that it runs; yields a function that says more."""
        start = time.perf_counter()
        with self.console.status(name) as status:
            yield lambda more: status.update(f"{name}: {more}")
        self.result.seconds[name] = time.perf_counter() - start
        self.console.print(f"[dim]{name}: {self.result.seconds[name]:.1f} s[/dim]")

    def models(self) -> Models:
        with self.stage("models") as say:
            models = trained_models(
                self.options.plan(),
                self.cache,
                retrain=self.options.retrain,
                progress=lambda name, done: say(f"training {name}, {100 * done:.0f} %"),
            )
        self.result.parameters, self.result.trained = models.parameters, models.trained
        how = f"trained in {models.seconds:.0f} s" if models.trained else "from the cache"
        self.console.print(
            f"A base Llama of {models.parameters / 1e6:.2f} M parameters and {len(models.experts)} "
            f"experts of it ({', '.join(models.experts)}), {how}."
        )
        return models

    def rows(self, models: Models, split: str) -> dict[str, list[Row]]:
        options = self.options
        count = {
            "calibration": options.calibration_rows,
            "evaluation": options.evaluation_rows,
        }[split]
        return {
            name: domain_rows(
                models.tokenizer(),
                name,
                split,
                count=count,
                length=options.plan().row_length,
                seed=options.seed,
            )
            for name in DOMAINS
        }

    def merge(self, models: Models, rows: dict[str, list[Row]], out: Path) -> Path:
        method = self.options.merge_method
        needs_rows = merge_methods()[method]["needs_calibration"]
        ids = {name: [list(row.ids) for row in each] for name, each in rows.items()}
        with self.stage("merge"):
            merge(
                method,
                base=models.base,
                experts=models.experts,
                out=out,
                parameters=dict(self.options.merge_parameters),
                calibration=ids if needs_rows else None,
            )
        return out

    def score_all(self, model: torch.nn.Module) -> dict[str, Score]:
        return {name: score(model, rows, self.pad_id) for name, rows in self.evaluation.items()}

    def score_unquantized(self, models: Models, merged: Path) -> None:
        with self.stage("evaluation"):
            self.result.scores["base"] = self.score_all(_load(models.base))
            # Each expert only on its own domain: the level the merge is measured against.
            self.result.scores["experts"] = {
                name: score(_load(path), self.evaluation[name], self.pad_id)
                for name, path in models.experts.items()
            }
            self.result.scores["merged"] = self.score_all(_load(merged))

    def quantized(self, method: str, merged: Path, models: Models, calibration, scratch) -> None:
        options = self.options
        # Only E-PMQ's checkpoint is kept. It replaces an older one when it is complete.
        saved = scratch / method.replace("'", "")
        with self.stage(method):
            quantize(
                method,
                merged,
                models.experts,
                calibration,
                QuantizeSettings(options.bits, options.group_size, options.alpha),
                self.out if method == "E-PMQ" else saved,
                overwrite=options.overwrite,
            )
            path = self.out if method == "E-PMQ" else saved
            self.result.scores[method] = self.score_all(
                reload_awq(path) if method == "AWQ" else reload(path)
            )

    def report(self) -> None:
        result, console = self.result, self.console
        result.checkpoint = self.out
        with self.stage("report"):
            page = self.publish()
        file = self.out.parent / RESULT_NAME
        file.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        console.print(result_table(result))
        console.print(
            "A fresh process with GPTQModel alone loads the E-PMQ checkpoint and continues:"
        )
        for name, text in result.served.texts.items():
            console.print(f"  [bold]{name}[/bold]: {PROMPTS[name]!r} → {text!r}", markup=True)
        console.print(f"Checkpoint: {self.out}\nReport: {page}\nNumbers: {file}", soft_wrap=True)

    def publish(self) -> Path:
        """Leave in the checkpoint what is kept of each expert, the card with it, and the page."""
        write_retention(self.out, kept(self.result.scores))
        write_card(self.out)
        page = self.out / PAGE_NAME
        write_whole(page, report_page(read_report(self.out), retention=read_retention(self.out)))
        return page


def kept(scores: Mapping[str, Mapping[str, Score]]) -> Retention:
    """Each expert on its own domain, beside the models that are to replace it."""
    stages = {"base": "base", "expert": "experts", "merged": "merged", "gptq": "GPTQ"}
    stages["quantized"] = "E-PMQ"
    return Retention(
        {
            name: ExpertRetention(
                task=name,
                metric="accuracy",
                higher_is_better=True,
                **{stage: scores[row][name].accuracy for stage, row in stages.items()},
            )
            for name in scores["experts"]
        }
    )


@contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    """GPTQModel's own processors write a `logs` folder into the current one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _load(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
