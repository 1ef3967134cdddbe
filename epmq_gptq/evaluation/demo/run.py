"""The whole demo: train or find the models, merge, quantize, measure, save, load elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from ...config import EPMQConfig
from ...errors import EPMQError
from ...io.declared import conflict
from ...io.output import check_output, write_whole
from ...merging import check_merge, merge, merge_methods
from ...publish.card import write_card
from ...publish.page import read_report, report_page
from ...publish.page.retention import ExpertRetention, Retention, read_retention, write_retention
from ...run_report import PAGE_NAME
from ..baselines import QuantizeSettings, quantize
from ..loading import load_model
from .domains import ANSWER_TOKENS, DOMAINS, PROMPTS
from .rows import Row, domain_rows, score
from .table import (
    PAPER,
    PAPER_ALPHA,
    RESULT_NAME,
    DemoOptions,
    DemoResult,
    Score,
    Served,
    result_table,
)
from .train import Models, cache_folder, one_thread, plan_of, trained_models


class Demo:
    """One run: its options, its data and the result as it grows."""

    def __init__(self, options: DemoOptions, console: Console):
        self.out = check_output(options.out, {}, options.overwrite)
        if options.awq and options.quick:
            raise conflict(
                "awq",
                "cannot go with `quick`: GPTQModel's AWQ wants layers of at least 64 outputs",
                "Leave one of the two out.",
            )
        # Refused now, not after minutes of training; the experts' folders do not matter to it.
        EPMQConfig(
            bits=options.bits,
            group_size=options.group_size,
            alpha=options.alpha,
            experts=dict.fromkeys(DOMAINS, "-"),
            offload_to_disk=False,
        )
        check_merge(options.merge_method, options.merge_parameters, True, DOMAINS)
        self.options, self.console = options, console
        self.plan = plan_of(options.seed, options.quick)
        self.cache = Path(options.cache or cache_folder()).expanduser().absolute()
        shown = ("bits", "group_size", "alpha", "merge_method", "merge_parameters")
        shown += ("calibration_rows", "evaluation_rows")
        settings = {name: getattr(options, name) for name in shown}
        self.result = DemoResult(settings=settings | {"plan": asdict(self.plan)})

    def run(self) -> DemoResult:
        with (
            tempfile.TemporaryDirectory(prefix="epmq-demo-") as temporary,
            working_folder(temporary),
            one_thread(),
        ):
            scratch = Path(temporary)
            models = self.models()
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(models.base)
            calibration = self.rows("calibration", self.options.calibration_rows)
            self.evaluation = self.rows("evaluation", self.options.evaluation_rows)
            ids = {name: [list(row.ids) for row in rows] for name, rows in calibration.items()}
            merged = self.merge(models, ids, scratch / "merged")
            self.score_unquantized(models, merged)
            for method in ("RTN", "GPTQ", *(["AWQ"] if self.options.awq else []), PAPER, "E-PMQ"):
                self.quantize(method, merged, models, ids, scratch)
            with self.stage("fresh process"):
                self.result.served = generate_elsewhere(self.out, scratch)
        self.report()
        return self.result

    @contextlib.contextmanager
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
                self.plan,
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

    def rows(self, split: str, count: int) -> dict[str, list[Row]]:
        options = {"count": count, "length": self.plan.row_length, "seed": self.options.seed}
        return {name: domain_rows(self.tokenizer, name, split, **options) for name in DOMAINS}

    def merge(self, models: Models, ids: dict[str, list], out: Path) -> Path:
        method = self.options.merge_method
        with self.stage("merge"):
            merge(
                method,
                base=models.base,
                experts=models.experts,
                out=out,
                parameters=dict(self.options.merge_parameters),
                calibration=ids if merge_methods()[method]["needs_calibration"] else None,
            )
        return out

    def scores(
        self, folder: Path, domains: tuple[str, ...] = DOMAINS, dtype: str = "float32"
    ) -> dict[str, Score]:
        """A saved model on the rows of some domains; ``dtype`` holds it, float32 computes."""
        model = load_model(folder, device="cpu", dtype=dtype).module.float()
        pad = self.tokenizer.pad_token_id
        return {name: score(model, self.evaluation[name], pad) for name in domains}

    def score_unquantized(self, models: Models, merged: Path) -> None:
        scores = self.result.scores
        with self.stage("evaluation"):
            scores["base"] = self.scores(models.base)
            # Each expert only on its own domain: the level the merge is measured against.
            scores["experts"] = {}
            for name, folder in models.experts.items():
                scores["experts"] |= self.scores(folder, (name,))
            scores["merged"] = self.scores(merged)

    def quantize(
        self, row: str, merged: Path, models: Models, ids: dict[str, list], scratch: Path
    ) -> None:
        options = self.options
        own = {"alpha": options.alpha}
        if row == PAPER:
            own = {"profile": "paper", "alpha": PAPER_ALPHA}
        # Only E-PMQ's checkpoint is kept. It replaces an older one when it is complete.
        out = self.out if row == "E-PMQ" else scratch / row.replace("'", "")
        with self.stage(row):
            quantize(
                "E-PMQ" if row == PAPER else row,
                merged,
                models.experts,
                ids,
                QuantizeSettings(options.bits, options.group_size, options=own),
                out,
                overwrite=options.overwrite,
            )
            # A GPTQ checkpoint is served in half precision: so are its embeddings and norms here.
            dtype = "float32" if row == "AWQ" else "float16"
            self.result.scores[row] = self.scores(out, dtype=dtype)

    def report(self) -> None:
        result, console = self.result, self.console
        result.checkpoint = self.out
        with self.stage("report"):
            # What is kept of each expert goes into the checkpoint, the card with it, and the page.
            write_retention(self.out, kept(result.scores))
            write_card(self.out)
            page = self.out / PAGE_NAME
            text = report_page(read_report(self.out), retention=read_retention(self.out))
            write_whole(page, text)
        file = self.out.parent / RESULT_NAME
        file.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        console.print(result_table(result))
        console.print(
            "A fresh process with GPTQModel alone loads the E-PMQ checkpoint and continues:"
        )
        for name, text in result.served.texts.items():
            console.print(f"  [bold]{name}[/bold]: {PROMPTS[name]!r} → {text!r}", markup=True)
        console.print(f"Checkpoint: {self.out}\nReport: {page}\nNumbers: {file}", soft_wrap=True)


@contextlib.contextmanager
def working_folder(folder: str) -> Iterator[None]:
    """GPTQModel's own processors write a `logs` folder into the current one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def kept(scores: Mapping[str, Mapping[str, Score]]) -> Retention:
    """Each expert on its own domain, beside the models that are to replace it."""
    stages = {"base": "base", "expert": "experts", "merged": "merged", "gptq": "GPTQ"}
    stages["quantized"] = "E-PMQ"
    return Retention(
        experts={
            name: ExpertRetention(
                task=name,
                metric="accuracy",
                higher_is_better=True,
                **{stage: scores[row][name].accuracy for stage, row in stages.items()},
            )
            for name in scores["experts"]
        }
    )


# Runs in the fresh process: GPTQModel only. The answer goes to a file, as the host prints a lot.
_FRESH = """
import json, sys
import torch
from gptqmodel import BACKEND, GPTQModel
path, request, answer = sys.argv[1:]
torch.set_num_threads(1)
model = GPTQModel.load(path, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
texts = {}
for name, (prompt, count) in json.load(open(request, encoding="utf-8")).items():
    tokenizer = model.tokenizer
    ids = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(
        input_ids=ids["input_ids"], attention_mask=ids["attention_mask"],
        max_new_tokens=count, do_sample=False, pad_token_id=tokenizer.pad_token_id,
    )
    texts[name] = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
linears = sum("Linear" in type(m).__name__ and hasattr(m, "qweight") for m in model.modules())
assert not any(m == "epmq_gptq" or m.startswith("epmq_gptq.") for m in sys.modules)
json.dump({"texts": texts, "packed": linears}, open(answer, "w", encoding="utf-8"))
"""


def generate_elsewhere(checkpoint: Path, scratch: Path) -> Served:
    """Load a checkpoint in a new Python that imports GPTQModel alone, and let it continue prompts.

    Args:
        scratch: where the two processes leave notes for each other.

    Raises:
        EPMQError: it could not, or it came to import ``epmq_gptq``.
    """
    request, answer = scratch / "request.json", scratch / "answer.json"
    prompts = {name: (PROMPTS[name], ANSWER_TOKENS[name]) for name in DOMAINS}
    request.write_text(json.dumps(prompts), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", _FRESH, str(checkpoint), str(request), str(answer)],
        cwd=scratch,  # not the checkout, from where epmq_gptq could be imported by accident
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not answer.is_file():
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        raise EPMQError(
            f"a fresh process could not load `{checkpoint.name}`: {last.rstrip('.')}.",
            code="EPMQ-S01",
            subject=f"`{checkpoint.name}`",
            remedy="Load it with `GPTQModel.load` in a Python of your own to see more.",
        )
    return Served(**json.loads(answer.read_text(encoding="utf-8")))
